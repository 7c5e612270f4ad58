"""Messages: posted, regenerated, read, and waiting for their turn."""

from collections.abc import Mapping, Sequence
from types import EllipsisType
from typing import Any

from context_server.client.caller import Caller, path_of
from context_server.client.errors import CommandCarriedOut
from context_server.client.parsing import parse, parse_items
from context_server.client.records import Chunk, CommandAnswer, MessageInfo, Posted, Waiting, WorkflowCall


class MessageCalls(Caller):
    """The messages of a context."""

    async def get_message(self, context_id: str, message_id: str) -> MessageInfo:
        """One message, with its whole text."""
        path = path_of("contexts", context_id, "messages", message_id)
        return parse(MessageInfo, await self._request("GET", path))

    async def list_messages(
        self, context_id: str, include_content: bool = True, *, tree: bool = False
    ) -> list[MessageInfo]:
        """The messages that lead to the head, oldest first; with ``tree`` those of all branches.

        A text too long for a page stops at its ``sequence``: follow it from there.
        """
        params: dict[str, Any] = {"limit": 200}
        params |= ({"include": "content"} if include_content else {}) | ({"tree": "true"} if tree else {})
        messages: list[MessageInfo] = []
        while True:
            page = await self._request("GET", path_of("contexts", context_id, "messages"), params=params)
            items = parse_items(MessageInfo, page)
            messages += items
            if not items or page.get("next_cursor") is None:
                return messages
            params["cursor"] = page["next_cursor"]

    async def chunk(self, context_id: str, message_id: str, sequence: int) -> Chunk:
        """One chunk, whole however long its data is."""
        path = path_of("contexts", context_id, "messages", message_id, "chunks", str(sequence))
        return parse(Chunk, await self._request("GET", path))

    async def post(
        self,
        context_id: str,
        text: str = "",
        *,
        idempotency_key: str | None = None,
        client_metadata: Mapping[str, Any] | None = None,
        files: Sequence[str] = (),
        workflow: WorkflowCall | None = None,
        parent_id: str | EllipsisType | None = ...,
        if_busy: str | None = None,
    ) -> Posted:
        """Posts a message of the user's, which starts a reply. However often it is tried, it is posted once.

        ``files`` are ids of uploaded ones; a single one needs no text. ``workflow`` starts one of the agent's, and
        stands in the place of a text. With ``parent_id`` it goes on from that message, and not from the head; None is a
        fresh start. ``if_busy`` is what is done while the context is busy: ``reject`` (the default), ``queue``,
        ``interrupt`` or ``steer``.

        Raises:
            NotAllowedError: the context is busy.
            QueueFullError: it is, and no more may wait.
            CommandCarriedOut: the text is a command of the server, which was carried out and not posted.
        """
        body: dict[str, Any] = {
            "payload": _payload_of(text, files, workflow),
            "client_metadata": dict(client_metadata or {}),
        }
        if parent_id is not ...:
            body["parent_id"] = parent_id
        if if_busy is not None:
            body["if_busy"] = if_busy
        path = path_of("contexts", context_id, "messages")
        answer = await self._request("POST", path, body=body, idempotency_key=idempotency_key)
        if isinstance(answer, dict) and "reply_message_id" not in answer and "message" in answer:
            raise CommandCarriedOut(parse(CommandAnswer, answer))
        return parse(Posted, answer)

    async def regenerate(self, context_id: str, message_id: str, *, idempotency_key: str | None = None) -> Posted:
        """Has another reply written beside the one of this id, whose text stays.

        Raises:
            NotAllowedError: the context is busy.
        """
        path = path_of("contexts", context_id, "messages", message_id, "regenerate")
        return parse(Posted, await self._request("POST", path, idempotency_key=idempotency_key))

    async def queue(self, context_id: str) -> list[Waiting]:
        """What waits in the context, in the order of its turns."""
        return parse_items(Waiting, await self._request("GET", path_of("contexts", context_id, "queue")))

    async def take_back(self, context_id: str, message_id: str) -> None:
        """Takes back a message that waits, with its reply.

        Raises:
            NotFoundError: it does not wait, or no longer.
        """
        await self._request("DELETE", path_of("contexts", context_id, "queue", message_id))


def _payload_of(text: str, files: Sequence[str], workflow: WorkflowCall | None) -> Mapping[str, Any]:
    if workflow is not None:
        if text or files:
            raise ValueError(
                "a message that starts a workflow has neither text nor files; its input holds what it needs"
            )
        return {"type": "workflow", "name": workflow.name, "input": dict(workflow.input)}
    if not text and len(files) == 1:
        return {"type": "file", "file_id": files[0]}
    return {"type": "text", "content": text} | ({"files": list(files)} if files else {})
