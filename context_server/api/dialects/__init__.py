"""The languages that the inline view speaks: one table each, of the same log.

To add one, write its table in a module beside these and name it in ``DIALECTS``.
"""

from context_server.api.dialects.agent import AGENT
from context_server.api.dialects.assistant import ASSISTANT
from context_server.api.dialects.default import DEFAULT
from context_server.api.dialects.nexus import NEXUS
from context_server.api.dialects.table import Dialect

DIALECTS: dict[str, Dialect] = {dialect.name: dialect for dialect in (DEFAULT, NEXUS, ASSISTANT, AGENT)}

__all__ = ["DEFAULT", "DIALECTS", "NEXUS", "Dialect"]
