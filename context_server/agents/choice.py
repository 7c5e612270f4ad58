"""What the settings say about the agent, as the loader takes it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """``model`` is ``provider:name``, and ``models`` are more that a context may ask for.

    ``mcp`` are URLs or commands of servers of tools.
    """

    model: str = ""
    models: tuple[str, ...] = ()
    model_url: str = ""
    model_retries: int = 2
    mcp: tuple[str, ...] = ()

    @property
    def is_of_the_engine(self) -> bool:
        """Whether only an agent of the engine can heed it."""
        return bool(self.model or self.model_url or self.mcp)
