"""What the demo agent answers, from which section of the documentation."""

import asyncio
import itertools

import pytest

from context_server.agents.demo import (
    LONG_ANSWER_WORDS,
    DemoAgent,
    documentation_folder,
    read_question,
)
from context_server.records import ChunkKind, Delta
from tests.unit.agents.asking import data_of, reply, text_of, write


async def test_a_question_is_answered_from_the_best_section(quick):
    deltas = await reply(quick, "How does the pull work?")

    kinds = [kind for kind, _ in itertools.groupby(delta.kind for delta in deltas)]
    assert kinds == [ChunkKind.REASONING, ChunkKind.TOOL_CALL, ChunkKind.TOOL_RESULT, ChunkKind.TEXT]
    assert text_of(deltas) == (
        "**The pull**\n\nAsk for everything after a sequence:\n\n"
        '```sh\n# not a heading\ncurl "$URL/content?from_sequence=10"\n```\n\nA pull is idempotent.\n\n'
        "From docs/reference/protocol.md. See also: Cancelling (docs/reference/protocol.md).\n"
    )


async def test_the_search_is_visible_as_a_tool_call_and_its_result(quick):
    deltas = await reply(quick, "How does the pull work?")

    call, result = data_of(deltas, ChunkKind.TOOL_CALL), data_of(deltas, ChunkKind.TOOL_RESULT)
    assert call == {"id": call["id"], "name": "search_docs", "arguments": {"query": "pull work"}}
    assert (result["id"], result["status"]) == (call["id"], "ok")
    assert result["seconds"] >= 0
    found = result["result"]["sections"]
    assert [section["title"] for section in found] == ["The pull", "Cancelling"]
    assert {section["path"] for section in found} == {"docs/reference/protocol.md"}
    assert found[0]["score"] > found[1]["score"] > 0


async def test_two_replies_have_two_call_ids(quick):
    first, second = await reply(quick, "pull"), await reply(quick, "pull")
    assert data_of(first, ChunkKind.TOOL_CALL)["id"] != data_of(second, ChunkKind.TOOL_CALL)["id"]


async def test_the_answer_comes_word_by_word(quick):
    words = [delta.text for delta in await reply(quick, "signals") if delta.kind is ChunkKind.TEXT]
    assert words[:4] == ["**Signals**\n\n", "A ", "signal ", "says "]
    assert all(len((word or "").split()) == 1 for word in words)


async def test_another_form_of_a_word_finds_the_section(quick):
    assert text_of(await reply(quick, "Can I cancel?")).startswith("**Cancelling**")


async def test_a_question_about_something_else_gets_a_list_of_topics(quick):
    deltas = await reply(quick, "What is the weather in Paris?")
    assert data_of(deltas, ChunkKind.TOOL_RESULT)["result"] == {"sections": []}
    assert "- Glossary (docs/glossary.md)\n- The protocol (docs/reference/protocol.md)\n" in text_of(deltas)


@pytest.mark.parametrize("text", ["", "   \n", "Hello!", "hi there", "help", "What can you do?", "?!", "x"])
async def test_small_talk_gets_an_introduction_with_things_to_try(quick, text):
    deltas = await reply(quick, text)
    assert {delta.kind for delta in deltas} == {ChunkKind.TEXT}
    for thing in (
        "$URL/contexts/context-1/stream",
        "messages/reply-1/content",
        '"give me a long answer"',
        "please fail",
    ):
        assert thing in text_of(deltas)


@pytest.mark.parametrize(
    "text",
    [
        'pull" OR "',
        "pull NEAR(signals, 2)",
        "title:pull AND NOT *",
        "___ pull",
        "pull\x00",
        "pull' --",
        "'^pull + {a b}",
    ],
)
async def test_the_search_language_cannot_be_spoken_from_outside(quick, text):
    assert "The pull" in text_of(await reply(quick, text))


async def test_an_endless_question_is_read_only_at_its_beginning(quick):
    deltas = await reply(quick, "pull " + " ".join(f"word{number}" for number in range(100_000)))
    assert len(data_of(deltas, ChunkKind.TOOL_CALL)["arguments"]["query"].split()) == 32
    assert text_of(deltas).startswith("**The pull**")


async def test_without_documentation_it_says_so(tmp_path):
    quick = DemoAgent(words_per_second=1e6, long_words_per_second=1e6, tool_seconds=0, docs=tmp_path / "nowhere")
    for text in ("How does the pull work?", "a long answer about pulls"):
        assert "not installed" in text_of(await reply(quick, text))


async def test_documentation_that_is_no_utf8_is_still_read(quick, docs):
    (docs / "latin.md").write_bytes(b"# Caf\xe9\nA place for espresso.\n")
    assert "espresso" in text_of(await reply(quick, "espresso"))


async def test_it_reads_nothing_before_the_first_question_and_then_only_once(quick, docs):
    await reply(quick, "hello")
    (docs / "lease.md").write_text("# Lease\nTime-limited ownership.", encoding="utf-8")
    assert "Time-limited" in text_of(await reply(quick, "lease"))
    (docs / "lease.md").unlink()
    assert "Time-limited" in text_of(await reply(quick, "lease"))


async def test_many_first_questions_at_once_share_one_index(quick):
    async with asyncio.TaskGroup() as group:
        replies = [group.create_task(reply(quick, "signals")) for _ in range(20)]
    assert len({text_of(each.result()) for each in replies}) == 1


def test_the_default_documentation_lies_in_the_wheel_or_beside_the_package():
    folder = documentation_folder()
    assert folder.is_dir()
    assert folder.name in {"_docs", "docs"}


# The demo agent grants two wishes


async def test_asked_to_fail_it_fails_half_way(quick):
    whole = text_of(await reply(quick, "signals"))
    written: list[Delta] = []
    with pytest.raises(RuntimeError, match="asked to fail"):
        await write(quick, "Tell me about signals and please fail half-way", written)
    assert whole.startswith(text_of(written))
    assert len(text_of(written).split()) == len(whole.split()) // 2


@pytest.mark.parametrize(
    "text",
    ["please fail", "Fail", "crash!", "Please crash.", "fail half-way", "Can you fail?", "could you crash please",
     "I want you to fail", "Tell me about signals, then fail", "How do signals work? Please fail.", "just crash",
     "Fail on purpose", "crash now", "OK, fail"],
)  # fmt: skip
def test_an_instruction_to_fail_is_understood(text):
    assert read_question(text).wants_failure


@pytest.mark.parametrize(
    "text",
    ["What happens if a run fails?", "Does it survive a crash?", "Why did my run fail?", "crash recovery",
     "What happens if you fail half-way?", "please don't fail", "do not fail now", "Tell me about failed runs",
     "How do I resume after a crash", "when does a reply fail", "failure"],
)  # fmt: skip
def test_a_question_about_failing_is_no_instruction(text):
    assert not read_question(text).wants_failure


async def test_a_bare_please_fail_finds_something_to_talk_about(quick):
    written: list[Delta] = []
    with pytest.raises(RuntimeError):
        await write(quick, "please fail", written)
    assert data_of(written, ChunkKind.TOOL_RESULT)["result"]["sections"][0]["title"] == "Runs that failed"
    assert text_of(written).startswith("**Runs ")


async def test_a_long_answer_begins_with_what_was_asked_for_and_goes_on_with_the_rest(quick):
    text = text_of(await reply(quick, "Please give me a long answer about signals"))
    titles = [line for line in text.splitlines() if line.startswith("**")]
    assert titles == ["**Signals**", "**Context**", "**Runs that failed**", "**The pull**", "**Cancelling**"]
    assert text.endswith("From docs/reference/protocol.md, docs/glossary.md.\n")


async def test_a_long_answer_is_thousands_of_words_and_bounded(quick, docs):
    for number in range(50):
        (docs / f"part-{number}.md").write_text(f"# Part {number}\n" + "signal word " * 100, encoding="utf-8")
    (docs / "too-long.md").write_text("# Signal\n" + "signal " * 5_000, encoding="utf-8")
    words = len(text_of(await reply(quick, "a long answer")).rpartition("From docs/")[0].split())
    assert LONG_ANSWER_WORDS - 210 < words <= LONG_ANSWER_WORDS


def test_both_wishes_at_once():
    question = read_question("please fail half-way in a very long answer about signals")
    assert (question.terms, question.wants_long, question.wants_failure) == (("signals",), True, True)
