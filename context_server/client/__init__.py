"""The Python client: post a message, follow its reply, resume anything by sequence. Needs httpx2 and nothing else.

    async with ContextClient("http://127.0.0.1:8000") as client:
        context = await client.create_context()
        async for text in client.reply(context.id, "What is a chunk?"):
            print(text, end="", flush=True)

The text never travels in the signals. A follow keeps one number, the sequence that it holds, and one pull in flight;
signals only wake it, so that lost, repeated and late ones do no harm. A message is whole when what is *held* reaches
``final_sequence``, and its SHA-256 then proves it. ``errors`` draws what can go wrong.
"""

from context_server.client.client import ContextClient
from context_server.client.connection import ConnectionListener
from context_server.client.errors import (
    ClientError,
    DigestMismatch,
    HistoryChanged,
    IncompleteReply,
    NotAllowedError,
    NotFoundError,
    ProblemError,
    ReplyCancelled,
    ReplyEnded,
    ReplyFailed,
    ServerUnreachable,
    TransportError,
    UnavailableError,
    UnexpectedAnswer,
)
from context_server.client.records import ContextInfo, MessageInfo, Page, Posted, Signal
from context_server.client.watch import SignalListener

__all__ = [
    "ClientError",
    "ConnectionListener",
    "ContextClient",
    "ContextInfo",
    "DigestMismatch",
    "HistoryChanged",
    "IncompleteReply",
    "MessageInfo",
    "NotAllowedError",
    "NotFoundError",
    "Page",
    "Posted",
    "ProblemError",
    "ReplyCancelled",
    "ReplyEnded",
    "ReplyFailed",
    "ServerUnreachable",
    "Signal",
    "SignalListener",
    "TransportError",
    "UnavailableError",
    "UnexpectedAnswer",
]
