"""Reads the project's Markdown: its headings with their anchors, its fenced blocks, its tables, its links."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"

_FENCE = re.compile(r"(?P<fence>```+)(?P<language>\S*)\s*$")
_HEADING = re.compile(r"(?P<marks>#{1,6}) (?P<title>.+?)\s*$")
_NOTE = re.compile(r"<!--\s*(?P<note>.*?)\s*-->$")
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\((?P<target>[^)\s]+)\)")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block; ``note`` is the comment on the line before it: ``<!-- file: x.py -->`` → ``file: x.py``."""

    language: str
    text: str
    note: str
    line: int

    @property
    def file(self) -> str | None:
        return self.note.removeprefix("file: ") if self.note.startswith("file: ") else None


def pages() -> list[Path]:
    """Every page that people read: the README and the documentation."""
    return [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def prose(text: str) -> Iterator[tuple[int, str]]:
    """The lines outside of fenced and indented code, with their numbers."""
    fence = ""
    for number, line in enumerate(text.splitlines(), start=1):
        found = _FENCE.match(line)
        if found and not fence:
            fence = found["fence"]
        elif found and found["fence"] == fence and not found["language"]:
            fence = ""
        elif not fence and not line.startswith("    "):
            yield number, line


def headings(text: str) -> list[str]:
    """The titles of all headings, in order."""
    return [found["title"] for _, line in prose(text) if (found := _HEADING.match(line))]


def anchor(title: str) -> str:
    """What GitHub makes of a heading: ``4.4 view=chunks: tools`` → ``44-viewchunks-tools``."""
    kept = re.sub(r"[^\w\- ]", "", title.replace("`", "").strip().lower())
    return kept.replace(" ", "-")


def blocks(text: str) -> list[Block]:
    """The fenced blocks, in order."""
    found: list[Block] = []
    lines = text.splitlines()
    opened: tuple[int, str, str] | None = None
    for number, line in enumerate(lines):
        fence = _FENCE.match(line)
        if opened is None and fence:
            opened = (number, fence["fence"], fence["language"])
        elif opened is not None and fence and fence["fence"] == opened[1] and not fence["language"]:
            start = opened[0]
            note = _NOTE.match(lines[start - 1]) if start else None
            text_of = "\n".join(lines[start + 1 : number]) + "\n"
            found.append(Block(opened[2], text_of, note["note"] if note else "", start + 1))
            opened = None
    assert opened is None, f"the fence of line {opened} is not closed"
    return found


def sections(text: str) -> dict[str, str]:
    """The prose below each heading, by title."""
    bodies: dict[str, list[str]] = {}
    title = ""
    for _, line in prose(text):
        found = _HEADING.match(line)
        if found:
            title = found["title"]
            assert title not in bodies, f"heading {title!r} stands twice"
            bodies[title] = []
        elif title:
            bodies[title].append(line)
    return {title: "\n".join(body).strip() for title, body in bodies.items()}


def rows(section: str) -> list[list[str]]:
    """The cells of each row of the tables in a section, without heads and rules."""
    found: list[list[str]] = []
    in_table = False
    for line in section.splitlines():
        if not line.startswith("|"):
            in_table = False
        elif set(line) <= set("|-: "):
            in_table = True
        elif in_table:
            found.append([cell.strip() for cell in line.strip("|").split("|")])
    return found


def codes(text: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`]+)`", text)


def links(text: str) -> list[tuple[int, str]]:
    """The targets of all links, with their lines."""
    return [(number, found["target"]) for number, line in prose(text) for found in _LINK.finditer(line)]
