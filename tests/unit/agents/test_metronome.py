"""The metronome's beat, its words and its answer to a beat that is wrong."""

import asyncio
import time

import pytest

from context_server.agents.metronome import metronome, read_beat
from context_server.records import ChunkKind
from tests.unit.agents.asking import JumpingLoop, ask, on_a_jumping_clock, reply, text_of


def test_the_metronome_keeps_time():
    async def scenario(loop: JumpingLoop) -> list[tuple[str, float]]:
        return [(text_of([delta]), loop.time()) async for delta in ask(metronome, "rate=50 seconds=6")]

    words = on_a_jumping_clock(scenario)
    assert [int(word.partition(":")[0]) for word, _ in words] == list(range(300))
    assert [at for _, at in words] == pytest.approx([number / 50 for number in range(300)], abs=0.002)


def test_late_words_are_written_at_once_and_none_is_skipped():
    async def scenario(loop: JumpingLoop) -> list[tuple[int, float]]:
        words = []
        async for delta in ask(metronome, "rate=50 seconds=2"):
            number = int(text_of([delta]).partition(":")[0])
            words.append((number, loop.time()))
            if number == 10:
                loop.stall(seconds=1.0)
        return words

    words = on_a_jumping_clock(scenario)
    assert [number for number, _ in words] == list(range(100))
    assert all(at == pytest.approx(1.2, abs=0.002) for number, at in words if 11 <= number <= 60)
    assert all(at == pytest.approx(number / 50, abs=0.002) for number, at in words if number > 60)


async def test_a_word_carries_its_number_and_the_moment_of_writing():
    before = time.time_ns()
    deltas = await reply(metronome, "rate=0 words=500")
    after = time.time_ns()

    assert all(delta.kind is ChunkKind.TEXT and (delta.text or "").endswith(" ") for delta in deltas)
    numbers, moments = zip(*((delta.text or "").rstrip(" ").split(":") for delta in deltas), strict=True)
    assert [int(number) for number in numbers] == list(range(500))
    moments = [int(moment) for moment in moments]
    assert moments == sorted(moments)
    assert before <= moments[0] <= moments[-1] <= after


async def test_at_full_speed_others_still_get_their_turn():
    async with asyncio.TaskGroup() as group:
        task = group.create_task(reply(metronome, "rate=0 words=1000"))
        turns = 0
        while not task.done():
            await asyncio.sleep(0)
            turns += 1
    assert len(task.result()) == 1000
    assert turns >= 10


@pytest.mark.parametrize(
    ("text", "words", "interval_seconds"),
    [
        ("", 300, 0.02),
        ("hello metronome", 300, 0.02),
        ("rate=100", 600, 0.01),
        ("please: seconds=0.5 rate=10", 5, 0.1),
        ("rate=0.5 seconds=10", 5, 2.0),
        ("rate=0.29 seconds=100", 29, 1 / 0.29),
        ("rate=1000 words=7", 7, 0.001),
        ("rate=0 words=10000000", 10_000_000, 0.0),
        ("rate=100000 seconds=86400", 8_640_000_000, 0.00001),
        ("seconds=0", 0, 0.02),
        ("words=0", 0, 0.02),
    ],
)
def test_a_beat_is_read_from_the_message(text, words, interval_seconds):
    beat = read_beat(text)
    assert (beat.words, beat.interval_seconds) == (words, pytest.approx(interval_seconds))


@pytest.mark.parametrize(
    "text",
    ["rate=100001", "rate=-1", "rate=fast", "rate=nan", "rate=1e3", "rate=", "rate=0", "rate=0 seconds=5", "rate=٣",
     "seconds=86401", "seconds=inf", "words=10000001", "words=1.5", "words=" + "9" * 1000, "tempo=3", "rate=50,"],
)  # fmt: skip
async def test_a_wrong_beat_is_answered_with_what_is_allowed(text):
    (delta,) = await reply(metronome, text)
    assert delta.kind is ChunkKind.TEXT
    assert delta.text == (
        "The metronome takes rate=0..100000 (words a second) with seconds=0..86400 or words=0..10000000; "
        "rate=0, which is as fast as possible, needs words."
    )


@pytest.mark.parametrize("text", ["rate=0.001 words=2", "rate=0 words=10000000"])
async def test_the_metronome_can_be_cancelled_between_two_words(text):
    begun = asyncio.Event()

    async def consume() -> None:
        async for _ in ask(metronome, text):
            begun.set()

    task = asyncio.create_task(consume())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
