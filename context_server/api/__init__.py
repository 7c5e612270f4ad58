"""The wire contract: the only rooms that know HTTP."""
