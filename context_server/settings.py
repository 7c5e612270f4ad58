"""Every knob, read once: unit in its name, default, bound, and a ``CONTEXT_SERVER_…`` variable of the same name.

Only ``app``, ``serving`` and ``__main__`` read settings; every other room is handed the few values that it needs.
``docs/settings.md`` has a heading for each field, and a test holds the two together.
"""

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

LOOPBACK_HOSTS: tuple[str, ...] = ("localhost", "127.0.0.1", "::1")

CommaSeparated = Annotated[tuple[str, ...], NoDecode]


class Settings(BaseSettings):
    """The configuration of one server process."""

    model_config = SettingsConfigDict(env_prefix="CONTEXT_SERVER_", extra="forbid", frozen=True, env_ignore_empty=True)

    # Where it listens, and who may talk to it.
    host: str = Field("127.0.0.1", description="Address to listen on. Loopback by default; there is no authentication.")
    port: int = Field(8000, ge=0, le=65535, description="TCP port to listen on; 0 takes a free one.")
    allowed_hosts: CommaSeparated = Field(
        (), description="Names accepted in the Host header besides the loopback names. Stops DNS rebinding."
    )
    cors_origins: CommaSeparated = Field(
        (), description="Exact origins of web pages that may call this server, such as http://localhost:5173."
    )
    workers: int = Field(1, ge=1, le=256, description="Processes that serve the port; more than one needs PostgreSQL.")
    path_prefix: str = Field("", pattern=r"^(/[A-Za-z0-9._~-]+)*$", description="Path below which every route lies.")

    # What it stores in, and what writes the replies.
    database: str = Field("context-server.db", min_length=1, description="Path of a SQLite file, or a SQLAlchemy URL.")
    database_connections: int = Field(
        10, ge=3, le=500, description="Connections of this process to PostgreSQL; SQLite needs no such bound."
    )
    lease_seconds: float = Field(
        5.0, ge=1, le=300, description="How long a run on PostgreSQL stays with a node of which nothing is heard."
    )
    bus: str = Field(
        "", description="What carries wake-ups between nodes: a redis:// URL, or nothing for the database's own way."
    )
    agent: str = Field("demo", min_length=1, description="A built-in agent (demo, metronome) or module:name.")
    model: str = Field("", description="The model that writes replies, as provider:name, such as openai-chat:gpt-oss.")
    models: CommaSeparated = Field((), description="Further models that a context may be switched to by /model.")
    model_url: str = Field("", description="Where an OpenAI-compatible server has the model; nothing: the provider's.")
    model_retries: int = Field(
        2, ge=0, le=10, description="How often a failed request to a model is sent again, before its first word."
    )
    mcp: CommaSeparated = Field((), description="MCP servers whose tools the agent gets: URLs, or commands to start.")

    # What it says to the person who runs it.
    log_format: Literal["console", "json"] = Field("console", description="How log lines are written.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="The least level to log.")

    # Signals.
    heartbeat_seconds: float = Field(15.0, gt=0, le=300, description="Time between two heartbeats of a stream.")
    signal_settle_ms: float = Field(
        10.0, ge=0, le=1000, description="Least time between the answer of a pull and the next signal of its message."
    )
    signal_interval_ms: float = Field(
        15.0, ge=0, le=1000, description="Least time between two content_delta of a message that nobody pulls here."
    )
    completion_delay_ms: float = Field(
        50.0, ge=0, le=1000, description="As signal_settle_ms and signal_interval_ms, for message_completed."
    )
    signal_patience_ms: float = Field(
        1000.0,
        ge=0,
        le=5000,
        description="How long the next signal of a message waits for a pull; 0: no pacing.",
    )
    send_timeout_seconds: float = Field(10.0, gt=0, le=300, description="How long a stalled reader may block a stream.")
    max_streams: int = Field(10_000, ge=1, description="Open streams at once; further ones are refused with 503.")
    max_contexts_per_stream: int = Field(
        200, ge=1, le=1000, description="Contexts that one multiplexed stream may name."
    )

    # The ledger.
    commit_interval_ms: float = Field(
        0.2, ge=0, le=100, description="Rest between two group commits, per run that wrote in the last one."
    )
    max_commit_interval_ms: float = Field(
        20.0, ge=0, le=1000, description="The longest rest between two group commits."
    )
    max_pending_bytes: int = Field(
        262_144, ge=1024, description="Text of one run that may wait for its commit; then its agent is slowed."
    )
    recent_chunk_bytes: int = Field(
        67_108_864, ge=0, description="Memory for recently committed chunks, which serves pulls without the database."
    )

    # Bounds of what clients and agents may send.
    max_body_bytes: int = Field(1_048_576, ge=1024, description="Largest request body.")
    max_page_bytes: int = Field(
        1_048_576, ge=1024, le=67_108_864, description="Text in one answer of a pull or a list."
    )
    max_reply_bytes: int = Field(
        16_777_216, ge=1024, le=268_435_456, description="Text of one reply; a longer one fails cleanly."
    )
    max_history_bytes: int = Field(4_194_304, ge=1024, description="Text of earlier messages handed to an agent.")
    max_active_runs: int = Field(1000, ge=1, description="Runs at once in this process; further ones stay queued.")

    # Files.
    files_directory: str = Field(
        "", description="Folder for uploaded files; nothing: beside the SQLite file, or context-server-files."
    )
    max_file_bytes: int = Field(20_971_520, ge=1024, le=1_073_741_824, description="Largest uploaded file.")
    file_types: CommaSeparated = Field(
        (
            "image/*",
            "audio/*",
            "video/*",
            "text/*",
            "application/json",
            "application/pdf",
            "application/xml",
            "application/yaml",
        ),
        description="Media types of files that are taken, as patterns.",
    )

    max_waiting_messages: int = Field(
        20, ge=1, le=1000, description="Messages that may wait for their turn in one busy context."
    )

    # Bounds of one run; 0 stands for none.
    max_run_seconds: float = Field(0, ge=0, le=604_800, description="The longest run; anew after each approval.")
    max_silence_seconds: float = Field(
        300, ge=0, le=86_400, description="How long an agent may yield nothing, while no tool runs."
    )
    max_run_steps: int = Field(50, ge=0, description="Steps of one run: requests to its model.")
    max_run_tokens: int = Field(0, ge=0, description="Tokens of one run, input and output.")

    # Time-outs.
    approval_hours: float = Field(168, gt=0, le=87_600, description="How long a person may take to decide on a call.")
    cancel_grace_seconds: float = Field(5.0, gt=0, le=300, description="How long a cancelled agent may take to stop.")
    shutdown_grace_seconds: float = Field(
        6.0, ge=0, le=300, description="How long running replies may go on after SIGTERM; then they are interrupted."
    )
    idempotency_hours: float = Field(24.0, gt=0, le=8760, description="How long an Idempotency-Key is remembered.")

    # Keeping house.
    compact_after_hours: float = Field(
        24.0, ge=0, le=87_600, description="Age at which the chunks of an ended message are merged; 0: never."
    )
    retain_days: float = Field(
        0.0, ge=0, le=36_500, description="Days without activity after which a context is deleted; 0: never."
    )
    housekeeping_share: float = Field(
        0.05, gt=0, le=1, description="Part of one core, at most, that keeping house takes."
    )

    @field_validator("allowed_hosts", "cors_origins", "file_types", "mcp", "models", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        """``a,b`` → ``("a", "b")``: how a list is written in an environment variable."""
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("cors_origins")
    @classmethod
    def _exact_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            scheme, separator, rest = origin.partition("://")
            if scheme not in ("http", "https") or not separator or not rest or "/" in rest or "*" in rest:
                msg = f"{origin!r} is not an exact origin; write scheme://host[:port], such as http://localhost:5173"
                raise ValueError(msg)
        return origins

    @field_validator("allowed_hosts")
    @classmethod
    def _exact_hosts(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        for host in hosts:
            if "*" in host or "/" in host:
                msg = f"{host!r} is not a host name; write it as it stands in the Host header, without port"
                raise ValueError(msg)
        return hosts

    @field_validator("file_types")
    @classmethod
    def _patterns(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            if re.fullmatch(r"[a-z0-9.+*-]+/[a-z0-9.+*-]+", pattern) is None:
                msg = f"{pattern!r} is no pattern of media types; write image/png or image/*, in lower case"
                raise ValueError(msg)
        return patterns

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max_pending_bytes > self.max_reply_bytes:
            msg = "max_pending_bytes must not exceed max_reply_bytes"
            raise ValueError(msg)
        return self

    @property
    def writer(self) -> str:
        """What writes the replies, for people: the agent's name, or that of the model in the place of the default."""
        return self.model if self.model and self.agent == type(self).model_fields["agent"].default else self.agent

    @property
    def database_url(self) -> str:
        """The database as a SQLAlchemy URL: a plain path means a SQLite file."""
        if "://" in self.database:
            return self.database
        return f"sqlite:///{Path(self.database).expanduser().absolute()}"
