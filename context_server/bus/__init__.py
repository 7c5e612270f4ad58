"""Wake-ups between the rooms, and between the nodes of an installation: lossy hints to read again, never data.

Nothing breaks when every wake-up is lost: whoever is woken by them also looks by itself now and then.
"""

from context_server.bus.contract import Bus, BusState, Listener
from context_server.bus.in_process import InProcessBus
from context_server.bus.opening import open_bus
from context_server.bus.wakeups import CancelRequested, Moved, RunDeleted, RunQueued, WakeUp, owner_tag

__all__ = [
    "Bus",
    "BusState",
    "CancelRequested",
    "InProcessBus",
    "Listener",
    "Moved",
    "RunDeleted",
    "RunQueued",
    "WakeUp",
    "open_bus",
    "owner_tag",
]
