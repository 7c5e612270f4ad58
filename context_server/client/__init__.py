"""The Python client: post a message, follow its reply, resume anything by sequence. Needs httpx2 and nothing else.

    async with ContextClient("http://127.0.0.1:8000") as client:
        context = await client.create_context()
        async for text in client.reply(context.id, "What is a chunk?"):
            print(text, end="", flush=True)

``follow_chunks`` tells tools, steps and reasoning too; ``approvals``, ``approve`` and ``deny`` are for the calls that
wait for a person.

The text never travels in the signals. A follow keeps one number, the sequence that it holds, and one pull in flight;
signals only wake it, so that lost, repeated and late ones do no harm. A message is whole when what is *held* reaches
``final_sequence``, and its SHA-256 then proves it. ``errors`` draws what can go wrong.
"""

from context_server.client.client import ContextClient
from context_server.client.connection import ConnectionListener
from context_server.client.errors import (
    ApprovalDecidedError,
    ClientError,
    CommandCarriedOut,
    DigestMismatch,
    HistoryChanged,
    IncompleteReply,
    NotAllowedError,
    NotEditableError,
    NotFoundError,
    ProblemError,
    QueueFullError,
    ReplyCancelled,
    ReplyEnded,
    ReplyFailed,
    ServerUnreachable,
    TransportError,
    UnavailableError,
    UnexpectedAnswer,
)
from context_server.client.records import (
    ApprovalInfo,
    Chunk,
    CommandAnswer,
    ContextInfo,
    FileInfo,
    MessageInfo,
    Page,
    Posted,
    Signal,
    UsageTotal,
    Waiting,
    WorkflowCall,
)
from context_server.client.watch import SignalListener

__all__ = [
    "ApprovalDecidedError",
    "ApprovalInfo",
    "Chunk",
    "ClientError",
    "CommandAnswer",
    "CommandCarriedOut",
    "ConnectionListener",
    "ContextClient",
    "ContextInfo",
    "DigestMismatch",
    "FileInfo",
    "HistoryChanged",
    "IncompleteReply",
    "MessageInfo",
    "NotAllowedError",
    "NotEditableError",
    "NotFoundError",
    "Page",
    "Posted",
    "ProblemError",
    "QueueFullError",
    "ReplyCancelled",
    "ReplyEnded",
    "ReplyFailed",
    "ServerUnreachable",
    "Signal",
    "SignalListener",
    "TransportError",
    "UnavailableError",
    "UnexpectedAnswer",
    "UsageTotal",
    "Waiting",
    "WorkflowCall",
]
