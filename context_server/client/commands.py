"""What the server itself is asked: slash commands, and what replies have used."""

from context_server.client.caller import Caller
from context_server.client.parsing import parse
from context_server.client.records import CommandAnswer, UsageTotal


class CommandCalls(Caller):
    """Slash commands, answered at once by the server and by no agent."""

    async def execute(self, command: str, *arguments: str, context_id: str | None = None) -> CommandAnswer:
        """Carries out ``/name``, which may have arguments behind it; what goes wrong with it is in the answer."""
        body = {"command": command, "args": list(arguments)} | (
            {} if context_id is None else {"context_id": context_id}
        )
        return parse(CommandAnswer, await self._request("POST", "/commands/execute", body=body))

    async def usage(self, context_id: str | None = None) -> UsageTotal:
        """What the replies of a context have used, or all of the caller's."""
        params = {} if context_id is None else {"context": context_id}
        return parse(UsageTotal, await self._request("GET", "/usage", params=params))
