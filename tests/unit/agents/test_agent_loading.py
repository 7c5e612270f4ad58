"""``--agent``: the built-in names, ``module:name``, and what cannot be loaded."""

import subprocess
import sys

import pytest

from context_server.agents import load_agent
from context_server.agents.demo import demo
from context_server.agents.metronome import metronome
from context_server.errors import AgentNotLoadable
from tests.unit.agents.asking import ask


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes ``my_agent.py`` into the working directory, and forgets it afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def write(source: str) -> None:
        (tmp_path / "my_agent.py").write_text(source, encoding="utf-8")

    yield write
    sys.modules.pop("my_agent", None)


def test_the_built_in_agents_have_names(module):
    path = [*sys.path]
    assert load_agent("demo") is demo
    assert load_agent("metronome") is metronome
    assert sys.path == path


async def test_an_agent_of_ones_own_lies_in_the_working_directory(module):
    module("async def reply(history, run):\n    yield f'You said: {history[-1].text}'\n")
    agent = load_agent("my_agent:reply")
    assert [piece async for piece in ask(agent, "hello")] == ["You said: hello"]


async def test_an_agent_may_be_an_object_or_a_function_that_returns_an_iterator(module):
    module(
        "class Echo:\n    async def __call__(self, history, run):\n        yield history[-1].text\n"
        "echo = Echo()\ndef indirect(history, run):\n    return echo(history, run)\n"
    )
    for name in ("my_agent:echo", "my_agent:indirect"):
        assert [piece async for piece in ask(load_agent(name), "hello")] == ["hello"]


@pytest.mark.parametrize("name", ["", "dmeo", "my_agent", ":reply", "my_agent:", ":"])
def test_a_name_of_no_known_form_is_refused_with_the_forms(name):
    with pytest.raises(AgentNotLoadable, match=r"neither built in \(demo, metronome\) nor written as module:name"):
        load_agent(name)


@pytest.mark.parametrize(
    ("source", "name", "complaint"),
    [
        ("", "no_such_module:reply", r"cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"),
        ("", ".relative:reply", r"cannot be imported: TypeError: "),
        ("", "my_agent:reply", r"module 'my_agent' has no 'reply'"),
        ("def broken(:", "my_agent:reply", r"cannot be imported: SyntaxError: "),
        ("raise ValueError('one\\ntwo')", "my_agent:reply", r"cannot be imported: ValueError: one two$"),
        ("import os\nos.no_such_thing", "my_agent:reply", r"cannot be imported: AttributeError: .*no_such_thing"),
        ("reply = 'hello'", "my_agent:reply", r"is not callable; it should be async def agent\(history, run\)"),
        ("async def reply(history, run): return 'x'", "my_agent:reply", r"no async generator; .*yield its text"),
        ("def reply(history, run): yield 'x'", "my_agent:reply", r"no async generator; .*yield its text"),
        (
            "class Agent:\n    async def __call__(self, history, run): return 'x'\nreply = Agent()",
            "my_agent:reply",
            r"no async generator; .*yield its text",
        ),
    ],
)
def test_what_cannot_be_loaded_is_refused_in_one_line(module, source, name, complaint):
    module(source)
    with pytest.raises(AgentNotLoadable, match=complaint) as refusal:
        load_agent(name)
    assert "\n" not in str(refusal.value)


def test_the_library_of_models_is_imported_only_when_it_is_chosen():
    program = "import sys, context_server.__main__, context_server.agents.demo; sys.exit('pydantic_ai' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
