"""Every named failure of the server, one tree; no HTTP in it (statuses are given in ``api/problems.py``).

    ContextServerError
    ├── NotFound
    │   ├── ApprovalNotFound
    │   ├── ChunkNotFound
    │   ├── ContextNotFound
    │   ├── FileUnknown
    │   ├── MessageNotFound
    │   └── WaitingNotFound
    ├── Refused                       the request is understood and may not be done now
    │   ├── ApprovalDecided           approval
    │   ├── ArgumentsNotEditable
    │   ├── CommandNotAllowed         state, allowed
    │   ├── MessageOpen
    │   ├── QueueFull
    │   ├── VersionMismatch           version
    │   ├── SequenceAhead             sequence
    │   └── IdempotencyKeyReused
    ├── InvalidRequest                violations
    ├── Unavailable                   nothing was done; the same request may succeed later
    │   ├── StorageFull
    │   ├── DatabaseBusy
    │   ├── DatabaseUnreachable
    │   ├── FilesUnavailable
    │   └── ShuttingDown
    ├── OutcomeUnknown                it was done or not; the answer of the database was lost
    ├── StorageBroken                 the disk failed in a way that must not be guessed about
    ├── Fenced                        a run's owner changed; the stale one may not append
    ├── ReplyTooLarge
    └── StartupError                  the process cannot begin; one line for a person
        ├── AddressNotAvailable
        ├── AgentNotLoadable
        ├── BusNotAvailable
        ├── DatabaseInUse
        ├── DatabaseNotSupported
        ├── SchemaMismatch
        └── WorkerNotStarted

``code`` is stable, kebab-case, and part of the contract.
"""

import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar


def without_words(error: BaseException) -> dict[str, str]:
    """An error's type and stack, for the log; never its message or its variables, which may hold what was said."""
    return {
        "error": type(error).__name__,
        "exception": "".join(traceback.format_tb(error.__traceback__)).rstrip(),
    }


class ContextServerError(Exception):
    """Something that this project names went wrong."""

    code: ClassVar[str] = "internal-error"


class NotFound(ContextServerError):
    """What was asked for does not exist, or belongs to another owner; the two look the same from outside."""

    code = "not-found"


class ContextNotFound(NotFound):
    """There is no such context."""

    code = "context-not-found"

    def __init__(self, context_id: str) -> None:
        super().__init__(f"There is no context {context_id!r}.")
        self.context_id = context_id


class MessageNotFound(NotFound):
    """There is no such message in this context."""

    code = "message-not-found"

    def __init__(self, message_id: str) -> None:
        super().__init__(f"There is no message {message_id!r} in this context.")
        self.message_id = message_id


class ChunkNotFound(NotFound):
    """What names the chunk is no sequence number."""

    code = "chunk-not-found"

    def __init__(self, sequence: str) -> None:
        super().__init__(f"There is no chunk {sequence!r}; the chunks of a message are numbered 1, 2, 3, ….")
        self.sequence = sequence


class FileUnknown(NotFound):
    """There is no such file."""

    code = "file-not-found"

    def __init__(self, file_id: str) -> None:
        super().__init__(f"There is no file {file_id!r}.")
        self.file_id = file_id


class ApprovalNotFound(NotFound):
    """There is no such approval in this context."""

    code = "approval-not-found"

    def __init__(self, approval_id: str) -> None:
        super().__init__(f"There is no approval {approval_id!r} in this context.")
        self.approval_id = approval_id


class WaitingNotFound(NotFound):
    """The message does not wait for its turn."""

    code = "not-waiting"

    def __init__(self, message_id: str) -> None:
        super().__init__(f"Message {message_id!r} does not wait in this context; its turn may have come.")
        self.message_id = message_id


class Refused(ContextServerError):
    """The request is understood and may not be done now."""


class CommandNotAllowed(Refused):
    """The context's state does not allow the command."""

    code = "command-not-allowed"

    def __init__(self, command: str, state: str, allowed: Sequence[str]) -> None:
        commands = ", ".join(allowed) if allowed else "nothing"
        # As text: the representation of an enumeration's member is for programmers.
        super().__init__(f"'{command}' is not allowed while the context is '{state}'; allowed now: {commands}.")
        self.command = command
        self.state = state
        self.allowed = tuple(allowed)


class ApprovalDecided(Refused):
    """The approval is decided on already, in another way; the decision that stands is ``approval``."""

    code = "approval-decided"

    def __init__(self, status: str, approval: object) -> None:
        super().__init__(f"This call was decided on before: it is {status}.")
        self.approval = approval


class ArgumentsNotEditable(Refused):
    """The tool has to be called with the arguments that were asked for, or not at all."""

    code = "arguments-not-editable"

    def __init__(self, tool: str) -> None:
        super().__init__(f"The arguments of {tool!r} cannot be changed; approve the call as it is, or deny it.")
        self.tool = tool


class MessageOpen(Refused):
    """The message is still being written, or waits for its turn."""

    code = "message-open"

    def __init__(self, message_id: str) -> None:
        super().__init__(f"Message {message_id!r} has not ended; what it will hold is not known yet.")
        self.message_id = message_id


class QueueFull(Refused):
    """As many messages wait in the context as may."""

    code = "queue-full"

    def __init__(self, limit: int) -> None:
        super().__init__(f"{limit} messages wait in this context already, as many as may.")
        self.limit = limit


class VersionMismatch(Refused):
    """The context moved on since the version that If-Match names."""

    code = "version-mismatch"

    def __init__(self, expected: int, version: int) -> None:
        super().__init__(f"If-Match names version {expected}; the context is at version {version}.")
        self.version = version


class SequenceAhead(Refused):
    """The client claims chunks that the log does not hold: its history is not this one."""

    code = "sequence-ahead"

    def __init__(self, claimed: int, sequence: int) -> None:
        super().__init__(f"Sequence {claimed} is ahead of the log, which reaches {sequence}; start again at 0.")
        self.sequence = sequence


class IdempotencyKeyReused(Refused):
    """The idempotency key was used before, for another request."""

    code = "idempotency-key-reused"

    def __init__(self) -> None:
        super().__init__("This Idempotency-Key was used for a different request not long ago.")


@dataclass(frozen=True, slots=True)
class Violation:
    """One thing wrong with a request: where (``body.payload.content``, ``query.limit``) and what is allowed."""

    where: str
    detail: str


class InvalidRequest(ContextServerError):
    """The request has a wrong shape or value."""

    code = "invalid-request"

    def __init__(self, *violations: Violation) -> None:
        super().__init__("; ".join(f"{violation.where}: {violation.detail}" for violation in violations))
        self.violations = violations


class Unavailable(ContextServerError):
    """Nothing was done; the same request may succeed later."""

    code = "unavailable"


class StorageFull(Unavailable):
    """The disk has no room for the write."""

    code = "storage-full"

    def __init__(self) -> None:
        super().__init__("The server's disk is full; nothing was written. What was acknowledged before is kept.")


class DatabaseBusy(Unavailable):
    """Another process holds the database for longer than the server waits."""

    code = "database-busy"

    def __init__(self) -> None:
        super().__init__("The database is locked by another process; nothing was written.")


class DatabaseUnreachable(Unavailable):
    """The database's server does not answer, or refuses connections."""

    code = "database-unreachable"

    def __init__(self, reason: str = "") -> None:
        super().__init__("The database cannot be reached; nothing was written. What was acknowledged before is kept.")
        self.reason = reason
        """What the driver said, for the person who runs the server and not for clients."""


class FilesUnavailable(Unavailable):
    """The folder of the files cannot be used, or lacks a file that is listed."""

    code = "files-unavailable"

    def __init__(self) -> None:
        super().__init__("The server's folder of files cannot be used for this now; nothing was done.")


class ShuttingDown(Unavailable):
    """The server is stopping and takes no new streams."""

    code = "shutting-down"

    def __init__(self) -> None:
        super().__init__("The server is shutting down.")


class OutcomeUnknown(ContextServerError):
    """The database was lost while it committed: the transaction has happened as a whole, or not at all."""

    code = "outcome-unknown"

    def __init__(self) -> None:
        super().__init__(
            "The database was lost while it committed: this was done, or nothing was. Look, or repeat the request with "
            "the same Idempotency-Key."
        )


PASSING = (Unavailable, OutcomeUnknown)
"""Failures after which the same may be tried later; of an unknown outcome one has to find out first whether it was."""


class StorageBroken(ContextServerError):
    """The disk failed in a way after which nothing may be acknowledged (an fsync error, a damaged file)."""

    code = "storage-broken"

    def __init__(self, reason: str) -> None:
        super().__init__(f"The storage failed: {reason}.")
        self.reason = reason


class Fenced(ContextServerError):
    """A stale attempt of a run tried to write."""

    code = "fenced"

    def __init__(self, run_id: str) -> None:
        super().__init__(f"Run {run_id} is no longer owned by this attempt.")
        self.run_id = run_id


class ReplyTooLarge(ContextServerError):
    """An agent wrote more than ``max_reply_bytes``."""

    code = "reply-too-large"

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(f"The reply exceeds {limit_bytes} bytes.")
        self.limit_bytes = limit_bytes


class StartupError(ContextServerError):
    """The process cannot begin."""

    code = "startup-error"


class AddressNotAvailable(StartupError):
    """The address to listen on is taken, or is none of this machine."""

    code = "address-not-available"


class AgentNotLoadable(StartupError):
    """``--agent`` names nothing that can be loaded."""

    code = "agent-not-loadable"


class BusNotAvailable(StartupError):
    """``--bus`` names a bus that this installation cannot use."""

    code = "bus-not-available"


class DatabaseInUse(StartupError):
    """Another server process serves the same SQLite file."""

    code = "database-in-use"


class DatabaseNotSupported(StartupError):
    """``--database`` names a database that this version cannot use."""

    code = "database-not-supported"


class SchemaMismatch(StartupError):
    """The database's schema is not the one that this program knows."""

    code = "schema-mismatch"


class WorkerNotStarted(StartupError):
    """One of several processes could not begin; it has said why, or its log has."""

    code = "worker-not-started"
