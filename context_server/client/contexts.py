"""Contexts: made, read, changed, forked, cancelled, deleted."""

from collections.abc import Mapping
from typing import Any

from context_server.client.caller import Caller, path_of
from context_server.client.parsing import parse
from context_server.client.records import ContextInfo


class ContextCalls(Caller):
    """What is done with a context as a whole."""

    async def create_context(
        self, title: str | None = None, mode: str | None = None, metadata: Mapping[str, Any] | None = None
    ) -> ContextInfo:
        """A new context."""
        given = {"title": title, "mode": mode, "metadata": metadata}
        body = {name: value for name, value in given.items() if value is not None}
        return parse(ContextInfo, await self._request("POST", "/contexts", body=body))

    async def get_context(self, context_id: str) -> ContextInfo:
        """The context as it is now."""
        return parse(ContextInfo, await self._request("GET", path_of("contexts", context_id)))

    async def set_mode(self, context_id: str, mode: str) -> ContextInfo:
        """Sets the mode, ``plan`` or ``act``; a reply that is being written has it from its next step on."""
        return await self._change(context_id, {"mode": mode})

    async def set_model(self, context_id: str, model: str | None) -> ContextInfo:
        """Sets the model of the replies to come, one of those that the server allows; None: the agent's own."""
        return await self._change(context_id, {"model": model})

    async def move_head(self, context_id: str, message_id: str | None) -> ContextInfo:
        """Goes on from another message, at the end of another branch perhaps; None: from none, a fresh start.

        Raises:
            NotAllowedError: the context is busy.
        """
        return await self._change(context_id, {"head_message_id": message_id})

    async def fork(self, context_id: str, message_id: str, title: str | None = None) -> ContextInfo:
        """A new context that shares the history up to ``message_id``, which has ended."""
        body = {"message_id": message_id} | ({} if title is None else {"title": title})
        return parse(ContextInfo, await self._request("POST", path_of("contexts", context_id, "fork"), body=body))

    async def cancel(self, context_id: str) -> ContextInfo:
        """Cancels what runs or waits in the context, if anything does."""
        return parse(ContextInfo, await self._request("POST", path_of("contexts", context_id, "cancel")))

    async def delete_context(self, context_id: str) -> None:
        """Deletes the context.

        Raises:
            NotFoundError: there is none; after a broken connection perhaps because the first attempt did it.
        """
        await self._request("DELETE", path_of("contexts", context_id))

    async def _change(self, context_id: str, change: Mapping[str, Any]) -> ContextInfo:
        return parse(ContextInfo, await self._request("PATCH", path_of("contexts", context_id), body=change))
