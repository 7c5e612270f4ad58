"""The durable log: tables, statements, transactions, and what differs between databases."""

from context_server.store.transactions import Store

__all__ = ["Store"]
