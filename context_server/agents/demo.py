"""The default agent: answers questions about this server from its own documentation, without any model.

A message is read as a question (words to search for) and two wishes: ``give me a long answer about …`` and
``please fail``. Sections are ranked by SQLite's FTS5 with bm25 (https://sqlite.org/fts5.html#the_bm25_function).
"""

import asyncio
import re
import sqlite3
import threading
import weakref
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from context_server.agents.protocol import AgentRun
from context_server.records import ChunkKind, Delta, Turn, new_id

WORDS_PER_SECOND = 40.0
LONG_WORDS_PER_SECOND = 150.0
TOOL_SECONDS = 0.4  # Long enough that a client sees the state `calling_tool`.
LONG_ANSWER_WORDS = 3_000
MAX_QUESTION_CHARACTERS = 2_000  # Further on nothing is read, so that a pasted book delays no other reply.
MAX_TERMS = 32  # Keeps the search expression small, whatever was asked.
MAX_LISTED = 3  # Sections named in the tool's result; the first one is the answer.
MAX_TOPICS = 12

_WORD = re.compile(r"\w+")
_STREAMED_WORD = re.compile(r"\S+\s*")
_LONG_WISH = re.compile(r"\blong(?:er)?\s+(?:answer|reply|response|text)\b", re.IGNORECASE)
_LONG_WORDS = frozenset(_WORD.findall("long longer very answer reply response text write"))
_FAIL_WORDS = frozenset(_WORD.findall("fail crash half way halfway mid midway middle purpose"))
_COMMAND_BEFORE = frozenset(_WORD.findall("then just now you must should ok okay"))
_COMMAND_AFTER = frozenset(_WORD.findall("please now half halfway mid midway on"))
# After one of these, "fail" is talked about and not asked for: "What happens if you fail half-way?", "don't fail now".
_TALK = frozenset(_WORD.findall("what how why when where which who whether if does is are has did not never don doesn"))
# Words that say nothing about the subject; a message of nothing else is answered with the introduction.
_STOP_WORDS = frozenset(
    _WORD.findall("""
    about after all also am an and any are as at be been but by can could did didn do does doesn doing don done
    explain for from get give go good got had happen happens has have hello help here hey hi how if in into is
    isn it its just know let like ll make may me might more much must my need no not now of ok okay on or our
    out over please re say see shall should show so some something tell test than thank thanks that the their
    them then there these they thing things this those to too try up us use ve very want was way we were what
    when where which who why will with won would yes you your
    """)
)
_LONG_TOPIC = ("context", "message", "signal", "pull", "sequence")
_FAIL_TOPIC = ("failed", "run")

_FENCE = re.compile(r" {0,3}(`{3,}(?=[^`]*$)|~{3,})(.*)")
_HEADING = re.compile(r" {0,3}(#{1,6})(?:[ \t]+(.*?))?(?:[ \t]+#+)?[ \t]*")
_COMMENT_LINE = re.compile(r"\s*<!--.*-->\s*")

_CREATE_INDEX = "CREATE VIRTUAL TABLE section USING fts5(title, document, body, tokenize = 'porter unicode61')"
_ADD_SECTION = "INSERT INTO section (rowid, title, document, body) VALUES (?, ?, ?, ?)"
# A word in the section's title weighs six times one in its body, in the document's title twice. Less is better.
_BEST_SECTIONS = """
    SELECT rowid, bm25(section, 6.0, 2.0, 1.0) AS distance FROM section WHERE section MATCH ? ORDER BY distance, rowid
"""

_INTRODUCTION = """\
Hello, I am the demo agent of this context server. I need no model: I answer questions about the server from its \
documentation. Things to try:

- Ask me something: "How do I resume after a break?" or "What is a signal?"
- Say "give me a long answer", close the connection in the middle of it, and pull the rest by its sequence.
- Say "please fail", and see how a reply ends that fails half-way: what was written is kept.
- Watch this context, with `URL` set to the address of this server: `curl -N $URL/contexts/{context_id}/stream`
- Read this reply again: `curl "$URL/contexts/{context_id}/messages/{message_id}/content?from_sequence=0"`
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A message as this agent reads it: the ``terms`` to search for, and the two wishes."""

    terms: tuple[str, ...]
    wants_long: bool
    wants_failure: bool

    @property
    def is_small_talk(self) -> bool:
        """Whether it asks for nothing in particular: a greeting, ``help``, an empty message."""
        return not (self.terms or self.wants_long or self.wants_failure)

    @property
    def search_terms(self) -> tuple[str, ...]:
        """The terms, or something to talk about where only a wish was uttered."""
        if self.terms:
            return self.terms
        return _LONG_TOPIC if self.wants_long else _FAIL_TOPIC


def read_question(text: str) -> Question:
    """The question in a message: ``How do I resume a pull?`` → terms ``resume``, ``pull``."""
    text = text[:MAX_QUESTION_CHARACTERS].lower()
    words = _WORD.findall(text)
    wants_long = _LONG_WISH.search(text) is not None
    wants_failure = _asks_to_fail(words)
    ignored = _STOP_WORDS
    if wants_long:
        ignored |= _LONG_WORDS
    if wants_failure:
        ignored |= _FAIL_WORDS
    terms = dict.fromkeys(word for word in words if len(word) > 1 and word not in ignored)
    return Question(terms=tuple(terms)[:MAX_TERMS], wants_long=wants_long, wants_failure=wants_failure)


def _asks_to_fail(words: list[str]) -> bool:
    """Whether ``fail`` or ``crash`` is an instruction: ``please fail``, ``fail half-way``, ``Can you crash?``."""
    for place, word in enumerate(words):
        if word not in ("fail", "crash"):
            continue
        before, after = words[:place], words[place + 1 : place + 2]
        if before[-1:] == ["please"]:
            return True
        if not _TALK.isdisjoint(before):
            continue
        alone = not before and not after
        told = before[-2:] == ["you", "to"] or not _COMMAND_BEFORE.isdisjoint(before[-1:])
        if alone or told or not _COMMAND_AFTER.isdisjoint(after):
            return True
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """What stands below one Markdown heading, up to the next: ``document`` is the title of its file."""

    title: str
    document: str
    path: str
    body: str


def split_sections(markdown: str, path: str) -> list[Section]:
    """The sections of one Markdown file, in order; those with no text of their own are left out.

    Understands ATX headings and fences (CommonMark 0.31, sections 4.2 and 4.5): ``# comment`` in fenced code is no
    heading. Outside of code, lines that are an HTML comment are dropped.
    """
    headed: list[tuple[str, list[str]]] = [("", [])]
    document = ""
    for line, is_code in _lines(markdown):
        heading = None if is_code else _HEADING.fullmatch(line)
        if heading:
            title = (heading[2] or "").replace("`", "").replace("*", "")
            document = document or title
            headed.append((title, []))
        elif is_code or not _COMMENT_LINE.fullmatch(line):
            headed[-1][1].append(line)
    document = document or Path(path).stem
    bodies = ((title, "\n".join(lines).strip()) for title, lines in headed)
    return [Section(title=title or document, document=document, path=path, body=body) for title, body in bodies if body]


def _lines(markdown: str) -> Iterator[tuple[str, bool]]:
    """Each line, and whether it belongs to fenced code, the fences included."""
    open_fence = ""
    for line in markdown.splitlines():
        fence = _FENCE.match(line)
        if not open_fence:
            open_fence = fence[1] if fence else ""
            yield line, fence is not None
        else:
            yield line, True
            if fence and fence[1].startswith(open_fence) and not fence[2].strip():
                open_fence = ""


def documentation_folder() -> Path:
    """Where the documentation is: inside an installed wheel, else beside the package in a checkout."""
    package = Path(__file__).parent.parent
    shipped = package / "_docs"
    return shipped if shipped.is_dir() else package.parent / "docs"


@dataclass(frozen=True, slots=True)
class Hit:
    """A section that a search found; the higher the ``score``, the better it fits."""

    section: Section
    score: float


class Documentation:
    """The Markdown files of one folder, searchable. Read at the first search and kept; safe between threads.

    ``sections`` holds every section, by path and then in the order of the file; it is empty before the first search.
    """

    def __init__(self, folder: Path | None) -> None:
        self.sections: tuple[Section, ...] = ()
        self._folder = folder
        self._lock = threading.Lock()
        self._index: sqlite3.Connection | None = None

    def search(self, terms: Sequence[str]) -> list[Hit]:
        """The sections that hold any of the terms or a form of it (``cancel`` finds ``cancelling``), best first.

        It blocks, for the length of reading every file at the first call.

        Raises:
            OSError: the documentation cannot be read.
        """
        expression = " OR ".join(f'"{term}"' for term in terms)  # Terms are word characters only, so quoting is enough.
        with self._lock:
            rows = self._open().execute(_BEST_SECTIONS, (expression,)).fetchall()
            return [Hit(self.sections[rowid], round(-distance, 3)) for rowid, distance in rows]

    def _open(self) -> sqlite3.Connection:
        """The index, made at the first call; the caller holds the lock."""
        if self._index is None:
            folder = documentation_folder() if self._folder is None else self._folder
            self.sections = tuple(
                section
                for file in sorted(folder.rglob("*.md"))
                for section in split_sections(
                    file.read_text(encoding="utf-8", errors="replace"), f"docs/{file.relative_to(folder).as_posix()}"
                )
            )
            # Each search comes on another thread of the pool; the lock lets one in at a time.
            index = sqlite3.connect(":memory:", check_same_thread=False)
            weakref.finalize(self, index.close)
            index.execute(_CREATE_INDEX)
            index.executemany(
                _ADD_SECTION, ((row, each.title, each.document, each.body) for row, each in enumerate(self.sections))
            )
            self._index = index
        return self._index


class DemoAgent:
    """An agent that looks things up in the documentation. Does no I/O before its first question.

    ``docs`` is the folder of Markdown files; None stands for the documentation of this server.
    """

    def __init__(
        self,
        *,
        words_per_second: float = WORDS_PER_SECOND,
        long_words_per_second: float = LONG_WORDS_PER_SECOND,
        tool_seconds: float = TOOL_SECONDS,
        docs: Path | None = None,
    ) -> None:
        self._words_per_second = words_per_second
        self._long_words_per_second = long_words_per_second
        self._tool_seconds = tool_seconds
        self._documentation = Documentation(docs)

    async def __call__(self, history: Sequence[Turn], run: AgentRun) -> AsyncIterator[Delta]:
        """Write one reply: reasoning, a call of ``search_docs``, its result, then the answer word by word.

        Raises:
            RuntimeError: it was asked to fail, and half of the answer is written.
            OSError: the documentation cannot be read.
        """
        clock = asyncio.get_running_loop().time
        question = read_question(history[-1].text)
        words_per_second = self._words_per_second
        if question.is_small_talk:
            answer = _INTRODUCTION.format(context_id=run.context_id, message_id=run.message_id)
        else:
            query = " ".join(question.search_terms)
            yield Delta(ChunkKind.REASONING, f"I look in the documentation for: {query}.\n")
            call_id = new_id()
            arguments = {"query": query}
            yield Delta(ChunkKind.TOOL_CALL, data={"id": call_id, "name": "search_docs", "arguments": arguments})
            begun = clock()
            await asyncio.sleep(self._tool_seconds)
            hits = await asyncio.to_thread(self._documentation.search, question.search_terms)
            yield Delta(ChunkKind.TOOL_RESULT, data=_tool_result(call_id, hits, seconds=clock() - begun))
            sections = self._documentation.sections
            answer = _long_answer(hits, sections) if question.wants_long else _answer(hits, sections)
            if question.wants_long:
                words_per_second = self._long_words_per_second

        words = _STREAMED_WORD.findall(answer)
        if question.wants_failure:
            words = words[: len(words) // 2]
        begun = clock()
        for number, word in enumerate(words):
            await asyncio.sleep(max(0.0, begun + number / words_per_second - clock()))
            yield Delta(ChunkKind.TEXT, word)
        if question.wants_failure:
            raise RuntimeError("the demo agent was asked to fail")


def _tool_result(call_id: str, hits: list[Hit], *, seconds: float) -> dict[str, Any]:
    """The data of the ``tool_result`` chunk: which sections were found, never their text."""
    found = [{"title": hit.section.title, "path": hit.section.path, "score": hit.score} for hit in hits[:MAX_LISTED]]
    return {"id": call_id, "status": "ok", "result": {"sections": found}, "seconds": round(seconds, 3)}


def _answer(hits: list[Hit], sections: tuple[Section, ...]) -> str:
    """The best section, then a line that says where it stands and what else fits."""
    if not hits:
        return _nothing_found(sections)
    best, *further = (hit.section for hit in hits[:MAX_LISTED])
    source = f"From {best.path}."
    if further:
        source += f" See also: {'; '.join(f'{section.title} ({section.path})' for section in further)}."
    return f"**{best.title}**\n\n{best.body}\n\n{source}\n"


def _long_answer(hits: list[Hit], sections: tuple[Section, ...]) -> str:
    """Whole sections, those that were found first, as many as fit into ``LONG_ANSWER_WORDS`` words."""
    if not sections:
        return _nothing_found(sections)
    parts: list[str] = []
    paths: dict[str, None] = {}
    room_words = LONG_ANSWER_WORDS
    for section in dict.fromkeys([*(hit.section for hit in hits), *sections]):
        part = f"**{section.title}**\n\n{section.body}\n\n"
        words = len(part.split())
        if words <= room_words:
            room_words -= words
            parts.append(part)
            paths[section.path] = None
    return f"{''.join(parts)}From {', '.join(paths)}.\n"


def _nothing_found(sections: tuple[Section, ...]) -> str:
    """What can be asked about, where nothing fits."""
    topics = {section.path: section.document for section in sections}
    if not topics:
        return "The documentation of this server is not installed beside it, so I cannot answer from it.\n"
    listed = "\n".join(f"- {title} ({path})" for path, title in list(topics.items())[:MAX_TOPICS])
    return (
        f"The documentation says nothing about that. I can answer questions about this server, such as:\n\n{listed}\n"
    )


demo = DemoAgent()
"""What ``--agent demo`` loads."""
