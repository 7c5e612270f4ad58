"""The agents of the workflow tests; what their tools do is written to files in the working directory."""

from pathlib import Path

from context_server.agents import CallFailed, Denied, Flow, Workflows
from context_server.records import Usage


async def echo(history, run):
    for word in history[-1].text.split():
        yield f"{word} "
    yield Usage(input_tokens=1, output_tokens=2, requests=1)


workflows = Workflows(echo)


def note(line: str) -> str:
    with Path("noted").open("a") as file:
        file.write(f"{line}\n")
    return line.upper()


async def tumble(run_id: str) -> None:
    note(f"tumble {run_id}")
    raise ValueError(run_id)


async def publish(version: str) -> dict[str, str]:
    note(f"publish {version}")
    return {"url": f"/releases/{version}"}


@workflows.workflow
async def release(flow: Flow, version: str, is_quiet: bool = False) -> None:
    """Writes notes, and publishes when a person agrees."""
    flow.total = 4
    notes = await flow.prompt(f"notes of {version}", is_shown=not is_quiet)
    seen = await flow.call(note, line=notes.strip())
    if "skip" in seen.lower():
        await flow.say("Skipped.")
        return
    try:
        published = await flow.call(publish, version=version, needs_approval=True, is_editable=True)
    except Denied as denied:
        await flow.say(f"Not published: {denied.note}.")
        return
    await flow.say(f"Published at {published['url']}.")


@workflows.workflow
async def strict(flow: Flow) -> None:
    await flow.call(publish, version="1", needs_approval=True)


@workflows.workflow
async def broken(flow: Flow) -> None:
    await flow.call(lambda: 1 / 0, name="divide")


@workflows.workflow
async def wait(flow: Flow) -> None:
    import asyncio

    async def nap() -> None:
        await asyncio.sleep(60)

    await flow.prompt("begun")
    await flow.call(nap)


@workflows.workflow
async def clumsy(flow: Flow) -> None:
    """Goes on after a call that was approved and failed, to wait for another approval."""
    try:
        await flow.call(tumble, run_id=flow.run.run_id, needs_approval=True)
    except CallFailed as failed:
        await flow.say(f"{failed.name} failed.")
    published = await flow.call(publish, version="c", needs_approval=True)
    await flow.say(f" Published at {published['url']}.")


@workflows.workflow
async def hasty(flow: Flow) -> None:
    import asyncio

    await asyncio.gather(flow.call(note, line="one"), flow.call(note, line="two"))
