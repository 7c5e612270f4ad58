"""What can go wrong for a client, one tree.

ClientError
├── ProblemError              the server said no: status, code, detail, extras
│   ├── NotFoundError         404
│   ├── NotAllowedError       409 command-not-allowed: state, allowed_commands
│   ├── ApprovalDecidedError  409 approval-decided: approval, which is the decision that stands
│   ├── NotEditableError      409 arguments-not-editable
│   ├── QueueFullError        409 queue-full
│   └── UnavailableError      429, 502, 503, 504, 507: retry_after_seconds
├── TransportError            the connection broke
│   ├── UnexpectedAnswer      an answer that the contract does not know, from a proxy perhaps
│   └── ServerUnreachable     nothing went through for as long as the client is told to try
├── HistoryChanged            the log is not the one that was followed: drop what is held, start again at 0
├── IncompleteReply           the message ended, and the server has not all of it: held, final_sequence
├── CommandCarriedOut         what was posted is a command of the server, which has answered it: answer
├── DigestMismatch            what was assembled is not what was written: expected, actual
└── ReplyEnded                the message ended early; all its text was yielded before: message_id, sequence
    ├── ReplyFailed           code, detail
    └── ReplyCancelled
"""

from collections.abc import Mapping
from typing import Any

from context_server.client.records import ApprovalInfo, CommandAnswer


class ClientError(Exception):
    """Something that this client names went wrong."""


class ProblemError(ClientError):
    """The server answered with a problem document (RFC 9457); ``code`` is stable, ``extras`` are its further keys."""

    def __init__(self, status: int, code: str, detail: str, extras: Mapping[str, Any]) -> None:
        super().__init__(f"{detail} ({status} {code})")
        self.status = status
        self.code = code
        self.detail = detail
        self.extras = extras


class NotFoundError(ProblemError):
    """There is no such context, message, approval or file; it may have been deleted."""


class NotAllowedError(ProblemError):
    """The context's state does not allow the command now."""

    @property
    def state(self) -> str:
        """The state that the context is in."""
        return str(self.extras.get("state", ""))

    @property
    def allowed_commands(self) -> tuple[str, ...]:
        """What that state allows."""
        return tuple(self.extras.get("allowed_commands", ()))


class ApprovalDecidedError(ProblemError):
    """Somebody has decided otherwise before, or it expired or was cancelled; ``approval`` is what stands."""

    approval: ApprovalInfo | None = None
    """None where the answer does not say."""


class NotEditableError(ProblemError):
    """The tool does not allow its arguments to be changed; nothing was decided."""


class QueueFullError(ProblemError):
    """As many messages wait in the context as may."""


class UnavailableError(ProblemError):
    """Nothing was done; the same request may succeed later. ``retry_after_seconds`` is None when nobody said when."""

    retry_after_seconds: float | None = None


class TransportError(ClientError):
    """The connection could not be made, or broke."""


class UnexpectedAnswer(TransportError):
    """The answer is not of this contract."""


class ServerUnreachable(TransportError):
    """Nothing went through for as long as the client is told to try."""


class HistoryChanged(ClientError):
    """The server's log is not the one that was followed (a backup was restored): follow again from sequence 0."""

    def __init__(self, message_id: str, held: int, reason: str) -> None:
        super().__init__(f"{reason}; drop what is held of message {message_id} and follow it again from sequence 0")
        self.message_id = message_id
        self.held = held


class IncompleteReply(ClientError):
    """The message ended at ``final_sequence``, and a pull brings no more than up to ``held``."""

    def __init__(self, message_id: str, held: int, final_sequence: int) -> None:
        super().__init__(f"message {message_id} ended at sequence {final_sequence}, but its log was given up to {held}")
        self.message_id = message_id
        self.held = held
        self.final_sequence = final_sequence


class CommandCarriedOut(ClientError):
    """The message was a command, such as ``/help``: the server has carried it out, and posted nothing."""

    def __init__(self, answer: CommandAnswer) -> None:
        super().__init__("the message was a command of the server, and is answered")
        self.answer = answer


class DigestMismatch(ClientError):
    """The SHA-256 of the text that was assembled is not that of the text that was written."""

    def __init__(self, message_id: str, expected: str, actual: str) -> None:
        super().__init__(f"message {message_id} has the digest {expected}, what was assembled has {actual}")
        self.message_id = message_id
        self.expected = expected
        self.actual = actual


class ReplyEnded(ClientError):
    """The message ended before its author had finished; it holds ``sequence`` chunks, all of them yielded."""

    def __init__(self, message_id: str, sequence: int, reason: str) -> None:
        super().__init__(f"the reply {reason}, at sequence {sequence}")
        self.message_id = message_id
        self.sequence = sequence


class ReplyFailed(ReplyEnded):
    """The run failed; ``code`` is one of those that docs/protocol.md lists, such as ``agent-error``."""

    def __init__(self, message_id: str, sequence: int, code: str, detail: str | None) -> None:
        super().__init__(message_id, sequence, f"failed with {code}" + (f" ({detail})" if detail else ""))
        self.code = code
        self.detail = detail


class ReplyCancelled(ReplyEnded):
    """Somebody cancelled the run."""

    def __init__(self, message_id: str, sequence: int) -> None:
        super().__init__(message_id, sequence, "was cancelled")
