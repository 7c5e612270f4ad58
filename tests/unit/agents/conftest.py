"""A small documentation for the demo agent, and a demo agent that does not take its time."""

from pathlib import Path

import pytest

from context_server.agents.demo import DemoAgent

PROTOCOL = """\
# The protocol

## The pull
<!-- test: skip -->
Ask for everything after a sequence:

```sh
# not a heading
curl "$URL/content?from_sequence=10"
```

A pull is idempotent.

## Signals
A signal says how far the log reaches. A stream carries signals only.

## Cancelling
Only cancel cancels; a pull never does.
"""
GLOSSARY = """\
# Glossary

## Context
One conversation: messages, a state, a version.

## Runs that failed
A failed run keeps what was appended.
"""


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    (tmp_path / "reference").mkdir()
    (tmp_path / "reference" / "protocol.md").write_text(PROTOCOL, encoding="utf-8")
    (tmp_path / "glossary.md").write_text(GLOSSARY, encoding="utf-8")
    (tmp_path / "notes.txt").write_text("# Pull pull pull\nNo documentation.", encoding="utf-8")
    return tmp_path


@pytest.fixture
def quick(docs: Path) -> DemoAgent:
    return DemoAgent(words_per_second=1e6, long_words_per_second=1e6, tool_seconds=0, docs=docs)
