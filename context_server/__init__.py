"""A signal-pull context server: a durable log of assistant output, metadata-only signals, text by pull."""

__version__ = "0.1.0"
