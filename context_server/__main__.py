"""The command line: serve · migrate · chat · new-epoch."""

import gc

# Until everything is read in: what is imported is no garbage, and looking for some took a quarter of the start.
gc.disable()

import asyncio
import os
import sys
from typing import Any, NoReturn

import click
import structlog
import uvloop
from pydantic import ValidationError
from pydantic_settings import SettingsError

from context_server import __version__
from context_server.app import create_app
from context_server.errors import ContextServerError, DatabaseNotSupported, DatabaseUnreachable, StorageBroken
from context_server.logs import configure_logs
from context_server.metrics import Metrics, share_values
from context_server.serving import build_server, listen, listen_apart, listen_beside
from context_server.settings import LOOPBACK_HOSTS, Settings
from context_server.store.maintenance import change_schema, renew_epoch
from context_server.workers import EXIT_STORAGE_BROKEN, Assignment, Supervisor, values_directory

gc.enable()

EXIT_USAGE = 2
WORKER_PROGRAM: tuple[str, ...] = (sys.executable, "-m", "context_server", "worker")
STOP_SECONDS = 15.0
"""Time for a worker to stop, beyond what running replies and cancelled agents may take."""
SWITCH_INTERVAL_SECONDS = 0.001
"""How long a thread may keep the interpreter from another. The default of 5 ms is what a commit would wait, several
times, for an event loop that is busy."""

GC_THRESHOLDS = (10_000, 20, 1000)
"""Recent chunks are many objects and no garbage: with the default thresholds, walking over all of them time and again
stopped the server for up to 100 ms. Cycles are found while they are young."""

log = structlog.get_logger("context_server")


def read_settings(**options: Any) -> Settings:
    """Settings from options, then variables, then defaults; a wrong value is one line and exit code 2."""
    given = {name: value for name, value in options.items() if value not in (None, ())}
    try:
        return Settings(**given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        flags = {parameter.name: parameter.opts[0] for parameter in click.get_current_context().command.params}
        source = flags[name] if name in given else f"CONTEXT_SERVER_{name.upper()}"
        message = first["msg"].removeprefix("Value error, ")
        raise click.UsageError(f"{source}: {message} (given: {first['input']!r})" if name else message) from None
    except SettingsError as error:
        raise click.UsageError(str(error)) from None


class OneLineErrors(click.Group):
    """Shows every failure that has a name as one line on standard error."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the command line."""
        kwargs["standalone_mode"] = False
        try:
            result = super().main(*args, **kwargs)
        except click.ClickException as error:
            command = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "context-server"
            click.echo(f"{command}: {error.format_message()}", err=True)
            sys.exit(EXIT_USAGE)
        except click.Abort:
            sys.exit(130)
        except ContextServerError as error:
            click.echo(f"context-server: {_line(error)}", err=True)
            sys.exit(EXIT_USAGE)
        sys.exit(result if isinstance(result, int) else 0)


def _line(error: ContextServerError) -> str:
    """A failure as one line for the person at the terminal."""
    if isinstance(error, DatabaseUnreachable) and error.reason:
        return f"{error} ({' '.join(error.reason.split())})"
    return str(error)


@click.group(cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="context-server")
def main() -> None:
    """A signal-pull context server: replies as a durable log, metadata-only signals, text by pull.

    Every setting is also a CONTEXT_SERVER_… variable; docs/settings.md lists them all.
    """


@main.command()
@click.option("--host", help="Address to listen on.  [default: 127.0.0.1]")
@click.option("--port", type=int, help="Port to listen on; 0 takes a free one.  [default: 8000]")
@click.option("--database", help="Path of a SQLite file, or a SQLAlchemy URL.  [default: context-server.db]")
@click.option("--bus", help="A redis:// URL for wake-ups between nodes.  [default: PostgreSQL's LISTEN and NOTIFY]")
@click.option("--agent", help="demo, metronome, or module:name.  [default: demo]")
@click.option("--model", help="Model that writes replies, as provider:name, such as openai-chat:gpt-oss.")
@click.option("--model-url", help="OpenAI-compatible server that has the model, such as http://127.0.0.1:11434/v1.")
@click.option("--mcp", multiple=True, help="URL or command of an MCP server whose tools the agent gets; repeat it.")
@click.option("--log-format", help="console or json.  [default: console]")
@click.option("--allowed-host", "allowed_hosts", multiple=True, help="Host name to accept besides loopback; repeat it.")
@click.option("--cors-origin", "cors_origins", multiple=True, help="Exact origin of web pages to allow; repeat it.")
@click.option("--workers", type=int, help="Processes that serve the port; on PostgreSQL only.  [default: 1]")
def serve(**options: Any) -> int:
    """Run the server."""
    settings = read_settings(**options)
    configure_logs(settings.log_format, settings.log_level)
    return _run(settings) if settings.workers == 1 else _supervise(settings)


@main.command(hidden=True)
@click.argument("channel", type=int)
@click.argument("listener", type=int)
def worker(channel: int, listener: int) -> None:
    """Be one of several processes on one port; ``serve`` starts it, and says the rest on the channel."""
    assignment = Assignment(channel, listener)
    assignment.watch()
    settings = Settings(**assignment.settings)
    configure_logs(settings.log_format, settings.log_level, assignment.number)
    share_values(assignment.values, assignment.number)
    try:
        _run(settings, assignment)
    except ContextServerError as error:
        assignment.failed(_line(error))
        _leave(EXIT_USAGE)


def _supervise(settings: Settings) -> int:
    """Has several processes serve, until they are told to stop; the exit code."""
    if settings.database_url.startswith("sqlite"):
        raise DatabaseNotSupported(
            f"{settings.workers} workers need PostgreSQL (--database postgresql+asyncpg://…); "
            "a SQLite file is served by one process"
        )
    listeners = listen_apart(settings, settings.workers)
    port = listeners[0].getsockname()[1]
    with values_directory() as values:
        supervisor = Supervisor(
            WORKER_PROGRAM,
            listeners,
            settings=settings.model_dump(mode="json"),
            values=values,
            listen_again=lambda: listen_beside(settings, port),
            patience_seconds=settings.shutdown_grace_seconds + settings.cancel_grace_seconds + STOP_SECONDS,
            on_ready=lambda: _announce(settings, port),
        )
        return asyncio.run(supervisor.run())


def _run(settings: Settings, assignment: Assignment | None = None) -> NoReturn:
    """Serves in this process, and ends it."""
    sys.setswitchinterval(SWITCH_INTERVAL_SECONDS)
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(settings, assignment))


async def _serve(settings: Settings, assignment: Assignment | None) -> NoReturn:
    """Serves until it is told to stop, or the disk has failed, and ends the process."""
    loop = asyncio.get_running_loop()

    def broken(failure: StorageBroken) -> None:
        log.critical("storage_broken", reason=failure.reason)
        loop.call_soon_threadsafe(server.fail)

    if assignment is None:
        app = create_app(settings, on_broken=broken, server_cuts_stalled=True)
        sock = listen(settings)
        port = sock.getsockname()[1]
        server = build_server(app, settings.send_timeout_seconds, on_started=lambda: _announce(settings, port))
    else:
        metrics = Metrics(assignment.values)
        app = create_app(
            settings, on_broken=broken, server_cuts_stalled=True, metrics=metrics, worker=assignment.number
        )
        sock = assignment.listener
        server = build_server(app, settings.send_timeout_seconds, on_started=assignment.ready)
    async with app.router.lifespan_context(app):
        await server.serve([sock])
        if server.failed:
            # The writer's thread may hang on the broken disk: nothing is closed, and nothing waited for.
            _leave(EXIT_STORAGE_BROKEN)
    # All that is ours is closed. An agent may have left a task or a thread behind that never ends.
    _leave(0)


def _leave(code: int) -> NoReturn:
    """Ends the process here and now."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _announce(settings: Settings, port: int) -> None:
    """Says that the server is there, and what to try next."""
    log.info("serving", host=settings.host, port=port, database=_database_name(settings), agent=settings.writer)
    if settings.host not in LOOPBACK_HOSTS:
        log.warning("reachable_from_outside", hint="there is no authentication; put a proxy that has some before it")
    if settings.log_format != "console":
        return
    shown = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = f"http://{shown}:{port}{settings.path_prefix}"
    option = "" if port == 8000 and not settings.path_prefix else f" --url {url}"
    click.echo(
        f"""
  context-server {__version__} is ready at {url}
  Replies are written by the {settings.writer!r} agent and kept in {_database_name(settings)}.

  Try, in another terminal:
    context-server chat{option}
    curl -s -X POST {url}/contexts
    curl -N -X POST {url}/contexts/<id>/messages -H 'Accept: text/event-stream' \\
      -H 'Content-Type: application/json' \\
      -d '{{"payload": {{"type": "text", "content": "How does a client resume?"}}}}'
  or open {url}/docs in a browser.
  Ctrl-C stops the server; whatever was acknowledged is kept.
"""
    )


def _database_name(settings: Settings) -> str:
    """The database for people: no password of a URL is shown."""
    return settings.database.rpartition("@")[2]


@main.command()
@click.option("--database", help="Path of a SQLite file, or a SQLAlchemy URL.  [default: context-server.db]")
@click.option("--to", "target", help="Revision to go to.  [default: the newest; with --down the one before]")
@click.option("--down", is_flag=True, help="Go back instead of forward.")
def migrate(database: str | None, target: str | None, down: bool) -> None:  # click hands it by name
    """Bring the database's schema to a revision. The server does this by itself on SQLite."""
    settings = read_settings(database=database)
    before, after = asyncio.run(change_schema(settings.database_url, target or ("-1" if down else "head"), down=down))
    click.echo(f"{_database_name(settings)}: schema revision {before or 'none'} → {after or 'none'}")


@main.command("new-epoch")
@click.option("--database", help="Path of a SQLite file, or a SQLAlchemy URL.  [default: context-server.db]")
def new_epoch(database: str | None) -> None:
    """Tell clients that history may have been lost, as after restoring a backup: they start again at 0."""
    settings = read_settings(database=database)
    click.echo(f"{_database_name(settings)}: epoch {asyncio.run(renew_epoch(settings.database_url))}")


@main.command()
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="Where the server is.")
@click.option("--context", "context_id", help="Context to go on with.  [default: a new one]")
def chat(url: str, context_id: str | None) -> int:
    """Chat in the terminal: replies stream live and survive a restart of the server; Ctrl-C cancels one."""
    from context_server.chat import run_chat  # rich and httpx2 cost serve nothing

    return run_chat(url, context_id)


if __name__ == "__main__":
    main()
