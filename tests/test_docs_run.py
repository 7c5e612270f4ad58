"""What the documentation has people run is run: the tutorial, the README's tour, the how-tos, the frontend's modules.

The port is the only thing that differs from what a reader types: 8000 becomes a free one.
"""

import asyncio
import http.client
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from context_server.chat.commands import COMMANDS
from context_server.client import ContextClient
from tests.markdown import DOCS, ROOT, Block, blocks
from tests.model_server import ModelServer, call, say, whole
from tests.ports import free_port
from tests.server import Server

SECONDS = 60.0
IN_CI = "CI" in os.environ


def require(program: str) -> str:
    """The path of a program; without it the test is skipped, but not in CI."""
    found = shutil.which(program)
    if found is None and not IN_CI:
        pytest.skip(f"{program} is not installed")
    assert found is not None, f"{program} is not installed"
    return found


def blocks_of(page: str) -> list[Block]:
    return blocks((ROOT / page).read_text(encoding="utf-8"))


def write_files(page: str, directory: Path, port: int = 8000) -> None:
    """Writes the blocks that are files (``<!-- file: x.py -->``), as a reader would."""
    for block in blocks_of(page):
        if block.file is not None:
            (directory / block.file).write_text(block.text.replace(":8000", f":{port}"), encoding="utf-8")


def is_ready(port: int, path: str = "/readyz") -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2.0)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == http.HTTPStatus.OK
    except OSError:
        return False
    finally:
        connection.close()


def wait_until_ready(process: "subprocess.Popen[Any]", port: int, path: str = "/readyz") -> None:
    deadline = time.monotonic() + SECONDS
    while not is_ready(port, path):
        assert process.poll() is None, "the server has ended"
        assert time.monotonic() < deadline, "the server is not ready"
        time.sleep(0.02)


class Reader:
    """Somebody with two terminals in one directory: one for the server, and a shell."""

    END = "@@ the end of a block, with exit code"

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = free_port()
        self._servers: list[subprocess.Popen[bytes]] = []
        commands = directory / "bin"
        commands.mkdir()
        for name, arguments in (("context-server", "-m context_server"), ("python3", "")):
            (commands / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
            (commands / name).chmod(0o755)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("CONTEXT_SERVER_")}
        self.environment = kept | {
            "PATH": f"{commands}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "CONTEXT_SERVER_PORT": str(self.port),
        }
        self._shell = subprocess.Popen(
            ["sh"],
            cwd=directory,
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def close(self) -> None:
        for pipe in (self._shell.stdin, self._shell.stdout):
            if pipe is not None:
                pipe.close()
        for process in (self._shell, *self._servers):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def serve(self, command: str) -> None:
        """Runs a command in the server's terminal, and returns when the server is ready."""
        for earlier in self._servers:
            earlier.wait(SECONDS)
        with (self.directory / "server.log").open("ab") as log:
            process = subprocess.Popen(
                ["sh", "-c", command],
                cwd=self.directory,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._servers.append(process)
        wait_until_ready(process, self.port)

    def stop(self) -> None:
        """Ends the server, as Ctrl-C would."""
        for process in self._servers:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)
            process.wait(SECONDS)

    def type(self, commands: str) -> str:
        """Runs commands in the shell; what they print."""
        assert self._shell.stdin is not None
        commands = commands.replace(":8000", f":{self.port}")
        self._shell.stdin.write(f'{commands}\necho "{self.END} $?"\n'.encode())
        self._shell.stdin.flush()
        output = self._read()
        text, _, code = output.rpartition(self.END)
        assert code.strip() == "0", f"{commands}ended with {code.strip()}:\n{text}"
        return text

    def _read(self) -> str:
        assert self._shell.stdout is not None
        output = b""
        deadline = time.monotonic() + SECONDS
        while re.search(rb"%b \d+\n$" % self.END.encode(), output) is None:
            ready, _, _ = select.select([self._shell.stdout], [], [], max(0.0, deadline - time.monotonic()))
            part = os.read(self._shell.stdout.fileno(), 65536) if ready else b""
            assert part, f"no end after {output.decode()!r}"
            output += part
        return output.decode()


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    require("curl")
    someone = Reader(tmp_path)
    try:
        yield someone
    finally:
        someone.close()


def assert_printed(expected: str, output: str, command: str) -> None:
    """Compares line by line; ``…`` stands for anything."""
    wanted = [line.strip() for line in expected.strip().splitlines()]
    printed = [line.strip() for line in output.strip().splitlines()]
    patterns = [re.escape(line).replace("…", ".*") for line in wanted]
    fits = len(printed) == len(wanted) and all(map(re.fullmatch, patterns, printed))
    assert fits, f"{command}\nshould print\n{expected}\nand printed\n{output}"


def test_the_tutorial_does_what_it_says(reader):
    steps = blocks_of("docs/tutorial.md")
    for number, step in enumerate(steps):
        if step.note == "server":
            reader.serve(step.text)
            continue
        if step.language != "sh":
            assert steps[number - 1].language == "sh"
            continue
        output = reader.type(step.text)
        shown = steps[number + 1] if number + 1 < len(steps) and steps[number + 1].language != "sh" else None
        if shown is not None:
            assert_printed(shown.text, output, step.text)
    assert "error" not in (reader.directory / "server.log").read_text()


def test_the_tour_of_the_readme_shows_signals_and_text(reader):
    reader.serve("context-server serve")
    (tour,) = [block for block in blocks_of("README.md") if block.note == "tour"]
    output = reader.type(tour.text)
    assert '"type":"state_changed"' in output
    assert re.search(r'"sequence":[1-9]\d*,"content":', output)
    write_files("README.md", reader.directory, port=reader.port)
    assert "chunk" in reader.type("python3 tour.py").lower()


def test_the_commands_that_the_console_suggests_work_as_printed(reader):
    reader.serve("context-server serve")
    printed = (reader.directory / "server.log").read_text()
    (create,) = re.findall(r"^ +(curl -s -X POST .*/contexts)$", printed, re.MULTILINE)
    context_id = json.loads(reader.type(create))["id"]
    (post,) = re.findall(r"^ +(curl -N -X POST(?:.*\\\n)*.*)$", printed, re.MULTILINE)
    assert '"run_finished"' in reader.type(post.replace("<id>", context_id).replace("-N", "-sN"))


# How-tos


@contextmanager
def hosted(module: str, directory: Path) -> Iterator[tuple[int, "subprocess.Popen[bytes]"]]:
    """The port and the process of uvicorn with a program of the how-to."""
    port = free_port()
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "uvicorn",
                f"{module}:app",
                "--port",
                f"{port}",
                "--timeout-graceful-shutdown",
                "10",
            ],
            cwd=directory,
            env=os.environ | {"PYTHONPATH": f"{ROOT}:{directory}"},
            stdout=log,
            stderr=log,
        )
    try:
        wait_until_ready(process, port, "/chat/readyz")
        yield port, process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("module", ["starlette_host", "fastapi_host"])
@pytest.mark.scenario("operations", "Mounted application")
async def test_the_server_works_mounted_as_the_how_to_says(module, tmp_path):
    write_files("docs/how-to-mount.md", tmp_path)
    with hosted(module, tmp_path) as (port, process):
        url = f"http://127.0.0.1:{port}"
        async with httpx2.AsyncClient(base_url=url) as http, ContextClient(f"{url}/chat") as client:
            assert "This is my application." in (await http.get("/")).text
            created = await http.post("/chat/contexts")
            assert (await http.get(created.headers["location"])).json() == created.json()
            context_id = created.json()["id"]
            text = "".join([piece async for piece in client.reply(context_id, "hello")])
            assert "demo agent" in text
            assert (await client.list_messages(context_id))[1].content == text
            # An open stream gets its farewell, and does not hold the application.
            async with http.stream("GET", "/chat/stream") as stream:
                events = (line async for line in stream.aiter_lines() if line.startswith("data:"))
                assert "state_changed" in await anext(events)
                process.terminate()
                assert "goodbye" in [event async for event in events][-1]
        await asyncio.to_thread(process.wait, SECONDS)
    log = (tmp_path / "log").read_text()
    assert "Application shutdown complete" in log
    assert "Traceback" not in log


@pytest.mark.parametrize(
    ("agent", "kinds"),
    [
        ("my_agent:reply", ["text"]),
        ("tool_agent:reply", ["reasoning", "tool_call", "tool_result", "step", "text"]),
    ],
)
async def test_the_agents_of_the_how_to_reply(agent, kinds, tmp_path):
    write_files("docs/how-to-write-an-agent.md", tmp_path)
    with Server(tmp_path, agent=agent) as server:
        async with ContextClient(server.url) as client, httpx2.AsyncClient(base_url=server.url) as http:
            context = await client.create_context()
            text = "".join([piece async for piece in client.reply(context.id, "good morning")])
            _, reply = await client.list_messages(context.id)
            path = f"/contexts/{context.id}/messages/{reply.id}/content?view=chunks"
            chunks = (await http.get(path)).json()["chunks"]
    assert text in ("You said: good morning ", "It is 4 degrees in Oslo.")
    assert list(dict.fromkeys(chunk["kind"] for chunk in chunks)) == kinds


def test_an_agent_is_tested_as_the_how_to_says(tmp_path):
    write_files("docs/how-to-write-an-agent.md", tmp_path)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "check_my_agent.py"], cwd=tmp_path, env=environment, check=True, timeout=SECONDS)


def test_the_chat_is_used_as_the_how_to_says(reader):
    write_files("docs/how-to-write-an-agent.md", reader.directory)
    write_files("docs/how-to-chat.md", reader.directory)
    steps = blocks_of("docs/how-to-chat.md")
    for number, step in enumerate(steps):
        if step.note == "server":
            reader.serve(step.text)
        elif step.language == "sh":
            output = reader.type(step.text)
            shown = steps[number + 1] if number + 1 < len(steps) else None
            if shown is not None and shown.language == "text":
                assert_printed(shown.text, output, step.text)


def test_the_commands_of_the_chat_are_those_of_the_how_to():
    text = (DOCS / "how-to-chat.md").read_text(encoding="utf-8").partition("## What you can type\n")[2]
    table = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `/")]
    documented = {name for cell in table for name in re.findall(r"`(/[a-z]+)", cell)}
    assert documented == set(COMMANDS)


LOCAL_MODEL = "127.0.0.1:11434"
"""Where the how-to has a model; the tests put their own in its place."""


def test_models_are_run_as_the_how_to_says(reader):
    letter = {"to": "ada", "text": "It rains."}
    with ModelServer() as model:
        model.play(
            whole(say("A context is ", "one conversation.")),
            whole(call("list_letters", {}), why="tool_calls"),
            whole(call("send_letter", letter), why="tool_calls"),
            whole(say("I have sent it.")),
        )
        write_files("docs/how-to-run-models.md", reader.directory)
        steps = blocks_of("docs/how-to-run-models.md")
        for number, step in enumerate(steps):
            text = step.text.replace(LOCAL_MODEL, f"127.0.0.1:{model.port}")
            if step.note == "server":
                reader.stop()
                reader.serve(text)
            elif step.language == "sh":
                output = reader.type(text)
                shown = steps[number + 1] if number + 1 < len(steps) else None
                if shown is not None and shown.language == "text":
                    assert_printed(shown.text, output, text)
                else:
                    assert int(output) > 0
        assert [tool["function"]["name"] for tool in model.asked[1]["tools"]] == ["list_letters", "send_letter"]
    assert (reader.directory / "ada.letter").read_text() == "It rains."


async def test_what_an_agent_finds_in_its_deps_is_made_as_the_how_to_says(tmp_path):
    write_files("docs/how-to-run-models.md", tmp_path)
    with ModelServer() as model:
        model.play(whole(call("who_asks", {}), why="tool_calls"), whole(say("Hello.")))
        settings = {"agent": "deps_agent:agent", "model": "openai-chat:small", "model_url": model.url}
        with Server(tmp_path, **settings) as server:
            async with ContextClient(server.url) as client:
                context = await client.create_context(metadata={"name": "Ada"})
                assert "".join([piece async for piece in client.reply(context.id, "hello")]) == "Hello."
        assert model.asked[1]["messages"][-1]["content"] == "Ada"


# The frontend's modules

FOLLOW = """
import { followReply } from "./follow.js";
const [url, contextId, messageId] = process.argv.slice(2);
let text = "";
followReply({
  url, contextId, messageId,
  onText: (more) => { if (!text) console.log("begun"); text += more; },
  onReset: () => { text = ""; },
  onEnd: (end) => console.log(JSON.stringify({ ...end, text })),
});
"""
CHAT = """
import { createActor, waitFor } from "xstate";
import { chatMachine } from "./chat-machine.js";
const url = process.argv[2];
const soon = { timeout: 30000 };
const first = createActor(chatMachine, { input: { url } }).start();
await waitFor(first, (now) => now.matches("idle"), soon);
first.send({ type: "SEND", text: "rate=100 seconds=0.5" });
await waitFor(first, (now) => now.matches("idle") && now.context.messages.length === 2, soon);
first.send({ type: "SEND", text: "rate=100 seconds=1.5" });
await waitFor(first, (now) => now.matches("replying") && now.context.messages[3].content !== "", soon);
const { contextId } = first.getSnapshot().context;
const second = createActor(chatMachine, { input: { url, contextId } }).start(); // The page was loaded again.
const ends = await Promise.all([first, second].map((each) =>
  waitFor(each, (now) => now.matches("idle") && now.context.messages.length === 4, soon)));
second.send({ type: "SEND", text: "rate=10 seconds=60" });
await waitFor(second, (now) => now.matches("replying") && now.context.messages[5].content !== "", soon);
second.send({ type: "CANCEL" });
const last = await waitFor(second, (now) => now.matches("idle"), soon);
const texts = ends.map((end) => end.context.messages.map((each) => each.content));
console.log(JSON.stringify({ contextId, texts, status: last.context.messages[5].status }));
process.exit(0);
"""


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """A directory with the modules of the page about frontends."""
    write_files("docs/frontends.md", tmp_path)
    (tmp_path / "package.json").write_text('{"type": "module"}')
    return tmp_path


def test_the_follower_of_the_frontend_survives_a_killed_server(page):
    node = require("node")
    (page / "main.js").write_text(FOLLOW)
    with Server(page, agent="metronome") as server, httpx2.Client(base_url=server.url) as http:
        context = http.post("/contexts").json()
        body = {"payload": {"type": "text", "content": "rate=100 seconds=30"}}
        posted = http.post(f"/contexts/{context['id']}/messages", json=body).json()
        with subprocess.Popen(
            [node, "main.js", server.url, context["id"], posted["reply_message_id"]],
            cwd=page,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == "begun\n"
                server.kill()
                server.start()
                output, errors = process.communicate(timeout=SECONDS)
            finally:
                process.kill()
        end = json.loads(output) if output else pytest.fail(errors)
        whole = http.get(f"/contexts/{context['id']}/messages/{posted['reply_message_id']}").json()
    assert end["status"] == "failed"
    assert end["text"] == whole["content"] != ""
    assert end["digest"] == whole["digest"]


@pytest.mark.skipif(not IN_CI, reason="downloads xstate from the npm registry; set CI to run it")
def test_the_machine_of_the_frontend_chats_resumes_and_cancels(page):
    node, npm = require("node"), require("npm")
    subprocess.run([npm, "install", "--silent", "--no-audit", "xstate@5"], cwd=page, check=True, timeout=2 * SECONDS)
    (page / "main.js").write_text(CHAT)
    with Server(page, agent="metronome") as server:
        done = subprocess.run(
            [node, "main.js", server.url], cwd=page, capture_output=True, text=True, timeout=2 * SECONDS, check=False
        )
        assert done.returncode == 0, done.stderr
        seen = json.loads(done.stdout)
        with httpx2.Client(base_url=server.url) as http:
            items = http.get(f"/contexts/{seen['contextId']}/messages?include=content").json()["items"]
    assert seen["texts"] == [[item["content"] for item in items[:4]]] * 2
    assert seen["status"] == items[5]["status"] == "cancelled"


# The README's commands


def test_the_readme_has_the_two_commands_and_ci_runs_the_tests_by_the_same_one():
    commands = [
        block.text.strip() for block in blocks_of("README.md") if block.note != "tour" and block.language == "sh"
    ]
    run, test = commands
    assert "\n" not in run + test
    assert run.endswith("/context-server serve")
    assert test.endswith("/pytest")
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert [line.strip() for line in ci].count(test) == 1
    assert test in (DOCS / "contributing.md").read_text(encoding="utf-8")
