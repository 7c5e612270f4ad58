"""The documentation under test: what it lists is what the code has, neither less nor more.

What the documentation has people run is in ``test_docs_run.py``.
"""

import ast
import inspect
import re
import tomllib
import typing
from pathlib import Path
from typing import Any

import click
import pytest
from annotated_types import Ge, Gt, Le
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from context_server import serving
from context_server.__main__ import main, serve
from context_server.api import events, problems, schemas, signals
from context_server.api.dialects import DEFAULT, DIALECTS
from context_server.api.routes import ENDPOINTS
from context_server.machine import ALLOWED_COMMANDS, TRANSITIONS
from context_server.metrics import Metrics
from context_server.records import ChunkKind, State
from context_server.settings import Settings
from context_server.store.approvals import EXPIRED
from tests.markdown import DOCS, ROOT, anchor, codes, headings, links, pages, prose, rows, sections


def page(name: str) -> dict[str, str]:
    return sections((DOCS / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def protocol() -> dict[str, str]:
    return page("protocol.md")


def starting(body: dict[str, str], beginning: str) -> str:
    """The section whose title begins so."""
    (title,) = [title for title in body if title.startswith(beginning)]
    return body[title]


# Settings


def bounds_of(field: FieldInfo) -> str:
    found = []
    for bound in field.metadata:
        match bound:
            case Ge():
                found.append(f"at least `{bound.ge}`")
            case Gt():
                found.append(f"more than `{bound.gt}`")
            case Le():
                found.append(f"at most `{bound.le}`")
    if typing.get_origin(field.annotation) is typing.Literal:
        found.append("one of " + ", ".join(f"`{value}`" for value in typing.get_args(field.annotation)))
    return ", ".join(found) or "none"


def facts_of(name: str, field: FieldInfo) -> str:
    """The line below the heading of a setting."""
    options = {parameter.name: parameter.opts[0] for parameter in serve.params}
    default = "empty" if field.default in ((), "") else f"`{field.default}`"
    if isinstance(field.default, tuple) and field.default:
        default = f"`{','.join(field.default)}`"  # As it is written in the variable.
    option = f"`{options[name]}`" if name in options else "none"
    return (
        f"Default: {default}. Bounds: {bounds_of(field)}. Variable: `CONTEXT_SERVER_{name.upper()}`. Option: {option}."
    )


@pytest.mark.parametrize("name", Settings.model_fields)
def test_a_setting_has_its_heading_with_default_bounds_variable_and_option(name):
    body = starting(page("settings.md"), f"`{name}`: ")
    facts, _, why = body.partition("\n")
    assert facts == facts_of(name, Settings.model_fields[name])
    assert len(why.split()) >= 10, "it should say why one would change it"


def test_each_heading_of_the_settings_is_a_setting():
    documented = [title.split("`")[1] for title in page("settings.md") if title.startswith("`")]
    assert documented == list(Settings.model_fields)


# The protocol


def test_the_calls_are_the_routes(protocol):
    documented = [tuple(codes(row[0])[0].split(" ")) for row in rows(protocol["3. The calls"])]
    assert sorted(documented) == sorted((endpoint.method, endpoint.path) for endpoint in ENDPOINTS)


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda endpoint: f"{endpoint.method} {endpoint.path}")
def test_a_call_names_its_answers(protocol, endpoint):
    (row,) = [row for row in rows(protocol["3. The calls"]) if f"`{endpoint.method} {endpoint.path}`" in row[0]]
    documented = {int(status) for status in re.findall(r"\b\d{3}\b", row[2])}
    assert documented - {503} == set(endpoint.answers)


def refusals_of_the_connection() -> set[tuple[int, str]]:
    """``(status, code)`` of what is refused before a request is one: the calls of ``Protocol._refuse``."""
    tree = ast.parse(inspect.getsource(serving))
    found = set()
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "_refuse":
            status, _, code = (argument.value for argument in call.args[:3] if isinstance(argument, ast.Constant))
            found.add((status, code))
    return found


def test_the_problem_codes_are_those_of_the_code(protocol):
    known = {(status, kind.code) for kind, (status, _) in problems.STATUSES.items()}
    known |= refusals_of_the_connection() | {(500, "internal-error")}
    documented = [(int(row[0]), codes(row[1])[0]) for row in rows(starting(protocol, "9.1 "))]
    assert sorted(documented) == sorted(known)


def codes_of_the_engine() -> set[str]:
    """The codes with which agents of Pydantic AI end replies."""
    sources = [path.read_text() for path in (ROOT / "context_server" / "agents" / "engine").glob("*.py")]
    return set(re.findall(r'"((?:model|tools?)-[a-z-]+)"', "".join(sources)))


def test_the_codes_of_failed_replies_are_those_that_the_code_gives(protocol):
    given = {"agent-error", "interrupted", "reply-too-large"}
    documented = {codes(row[0])[0] for row in rows(starting(protocol, "9.2 "))}
    names = ("driver.py", "agents/flow.py", "agents/workflows.py")
    bounds = {
        code
        for name in names
        for code in re.findall(r'AgentFailed\(\s*"([^"]+)"', (ROOT / "context_server" / name).read_text())
    }
    assert documented == given | codes_of_the_engine() | bounds | {EXPIRED.code}
    source = "".join((ROOT / "context_server" / name).read_text() for name in ("runner.py", "store/execution.py"))
    assert set(re.findall(r'Failure\(code="([^"]+)"', source)) | {"reply-too-large"} == given


def test_the_signals_are_those_that_are_sent(protocol):
    documented = [codes(row[0])[0] for row in rows(starting(protocol, "5.1 "))]
    assert sorted(documented) == sorted([*signals.SIGNAL_TYPES.values(), "heartbeat", "goodbye"])


SIGNALS = [
    events.StateChanged,
    events.ContentDelta,
    events.MessageCompleted,
    events.ContextChanged,
    events.ContextDeleted,
    events.Heartbeat,
    events.Goodbye,
]


def test_the_fields_of_signals_are_those_that_are_sent(protocol):
    documented = {
        codes(row[0])[0]: sorted(codes(row[1].partition("`[")[0])) for row in rows(starting(protocol, "5.1 "))
    }
    sent = {
        typing.get_args(model.model_fields["type"].annotation)[0]: sorted(
            set(model.model_fields) - {"type", "timestamp"}
        )
        for model in SIGNALS
    }
    assert documented == sent


def test_the_inline_events_are_those_that_are_sent(protocol):
    table = rows(starting(protocol, "6.1 "))
    documented = [name for row in table for name in codes(row[0])]
    assert list(dict.fromkeys(documented)) == [*DEFAULT.types, "heartbeat", "goodbye"]
    fields = {(codes(row[0])[0], *(name.rstrip("?") for name in codes(row[1]))) for row in table[:-1]}
    models = [model for model in typing.get_args(INLINE) if model not in (events.Heartbeat, events.Goodbye)]
    assert fields == {(typing.get_args(kind["type"].annotation)[0], *list(kind)[1:]) for kind in map(fields_of, models)}


INLINE = events.InlineSignal.model_fields["root"].annotation


def fields_of(model: type[BaseModel]) -> dict[str, FieldInfo]:
    return model.model_fields


@pytest.mark.parametrize("dialect", [dialect for dialect in DIALECTS.values() if dialect is not DEFAULT])
def test_the_events_of_a_dialect_are_those_that_are_sent(dialect):
    table = rows(starting(page("dialects.md"), f"{dialect.name}: "))
    assert {codes(row[0])[0] for row in table} == {*dialect.types}
    assert f"`{dialect.name}`" in starting(page("protocol.md"), "6.3 ") + starting(page("protocol.md"), "6.4 ")


@pytest.mark.parametrize(
    ("section", "model"),
    [
        ("3.1 ", schemas.Context),
        ("3.2 ", schemas.Message),
        ("3.3 ", schemas.Posted),
        ("4. The pull", schemas.Content),
        ("11.1 ", schemas.File),
    ],
)
def test_the_fields_of_answers_are_those_of_the_schemas(protocol, section, model):
    text = (DOCS / "protocol.md").read_text(encoding="utf-8")
    title = next(title for title in protocol if title.startswith(section))
    body = text.partition(f" {title}\n")[2].partition("\n#")[0]
    shapes = [
        set(re.findall(r'[{,]\s*"?([a-z_0-9]+)"?(?=\s*[:,}])', shape)) for shape in re.findall(r"\{[^{}]*\}", body)
    ]
    optional = {"content", "chunks", "siblings"} if model is schemas.Message else {"chunks", "disposition"}
    assert set(model.model_fields) - optional in [
        shape - optional if model is schemas.Message else shape for shape in shapes
    ]


def test_the_kinds_of_chunks_are_documented(protocol):
    assert [codes(row[0])[0] for row in rows(starting(protocol, "4.4 "))] == [str(kind) for kind in ChunkKind]


def test_the_tables_of_states_are_the_machine(protocol):
    tables = rows(starting(protocol, "7. "))
    states = {codes(row[0])[0]: codes(row[2]) for row in tables if len(codes(row[0])) == 1 and not codes(row[1])}
    assert states == {str(state): [str(each) for each in ALLOWED_COMMANDS[state]] for state in State}
    moves = {
        (source, codes(row[1])[0]): codes(row[2])[0] for row in tables if codes(row[1]) for source in codes(row[0])
    }
    assert moves == {(str(state), str(event)): str(target) for (state, event), target in TRANSITIONS.items()}


def test_the_clients_rules_are_all_there(protocol):
    rules = protocol["10. The rules for clients"]
    for rule in ("One pull in flight", "latest\n   target wins", "after each connect", "equals `final_sequence`",
                 "Absent from `heads`", "digest"):  # fmt: skip
        assert rule in rules, rule


# Architecture


def test_the_diagram_is_the_machine():
    diagram = (
        (DOCS / "architecture.md").read_text(encoding="utf-8").partition("stateDiagram-v2\n")[2].partition("```")[0]
    )
    first, *lines = [line.strip() for line in diagram.strip().splitlines()]
    assert first == "[*] --> idle"
    drawn = [tuple(re.fullmatch(r"(\w+) --> (\w+): (\w+)", line).groups()) for line in lines]
    assert sorted(drawn) == sorted((state, target, event) for (state, event), target in TRANSITIONS.items())


def dependencies() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    demanded = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    return [re.split(r"[^A-Za-z0-9-]", each)[0] for each in demanded]


def test_each_dependency_has_its_line_and_no_other():
    body = starting(page("architecture.md"), "The dependencies")
    listed = re.findall(r"^\* `([^`]+)`: .{10,}$", body, re.MULTILINE)
    assert listed == dependencies()


def rooms() -> set[str]:
    package = ROOT / "context_server"
    here = {path.stem for path in package.glob("*.py")} | {path.parent.name for path in package.glob("*/__init__.py")}
    return here - {"__init__"}


def test_the_rooms_are_those_of_the_code():
    table = rows(page("architecture.md")["The rooms of the code"])
    assert {name.rstrip("/") for row in table for name in codes(row[0])} == rooms()


@pytest.mark.parametrize(
    ("contract", "key", "free"),
    [
        ("Rooms import downwards only", "layers", {"chat", "client", "logs", "settings"}),
        ("Only the store knows SQL", "source_modules", {"store"}),
        ("Only app, api and serving know HTTP", "source_modules", {"app", "api", "serving"}),
        (
            "Only app, serving and the command line read settings",
            "source_modules",
            {"app", "serving", "__main__", "settings"},
        ),
        ("The client and the chat know the server by HTTP alone", "forbidden_modules", {"client", "chat"}),
    ],
)
def test_no_room_escapes_the_import_contracts(contract, key, free):
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    (listed,) = [each[key] for each in contracts if each["name"] == contract]
    bound = {name.strip().split(".")[1] for names in listed for name in names.split("|")}
    assert bound == rooms() - free


# Operating


def test_each_metric_is_documented_and_no_other():
    known = set()
    for family in Metrics().registry.collect():
        known.add(f"{family.name}_total" if family.type == "counter" else family.name)
    table = rows(starting(page("how-to-operate.md"), "What to watch"))
    assert sorted(codes(row[0])[0] for row in table) == sorted(known)
    for metric in vars(Metrics()).values():
        for label in getattr(metric, "_labelnames", ()) if not getattr(metric, "_labelvalues", ()) else ():
            (row,) = [row for row in table if codes(row[0])[0].removesuffix("_total") == metric._name]
            assert f"`{label}`" in row[1], f"{metric._name} has a label {label}"


@pytest.mark.parametrize("name", ["how-to-run-many-nodes.md", "scaling.md", "settings.md"])
def test_the_metrics_and_settings_that_a_page_names_are_there(name):
    text = (DOCS / name).read_text(encoding="utf-8")
    named = {re.sub(r"_(total|bucket|sum|count)$", "", each) for each in re.findall(r"context_server_[a-z_]+", text)}
    assert named <= {family.name for family in Metrics().registry.collect()}
    assert {each.lower() for each in re.findall(r"CONTEXT_SERVER_(?!TEST_)([A-Z_]+)", text)} <= {*Settings.model_fields}


LOG_LEVELS = {"debug", "info", "warning", "error", "exception", "critical"}


def log_events() -> dict[str, str]:
    """Every event that the code logs, with its level."""
    found = {}
    for path in sorted((ROOT / "context_server").rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match call:
                case ast.Call(func=ast.Attribute(value=ast.Name(id="log"), attr=level), args=[event, *_]):
                    assert level in LOG_LEVELS, f"{path.name}:{call.lineno} logs in a way that is not known here"
                    assert isinstance(event, ast.Constant), f"{path.name}:{call.lineno} names its event by no constant"
                    found[event.value] = "error" if level == "exception" else level
    return found


def test_each_log_event_is_documented_with_its_level_and_no_other():
    table = rows(page("how-to-operate.md")["What each log event means"])
    assert {codes(row[0])[0]: row[1] for row in table} == log_events()


def test_each_command_and_option_is_documented():
    table = rows(page("how-to-operate.md")["Which commands there are"])
    documented = {codes(row[0])[0].removeprefix("context-server "): set(codes(row[1])) for row in table}
    assert isinstance(main, click.Group)
    commands = {name: command for name, command in main.commands.items() if not command.hidden}
    assert set(documented) == {*commands, "--version"}
    for name, command in commands.items():
        options = {parameter.opts[0] for parameter in command.params}
        assert documented[name] == options, name


def test_each_exit_code_is_documented():
    source = "\n".join((ROOT / "context_server" / name).read_text() for name in ("__main__.py", "workers.py"))
    used = {0, *map(int, re.findall(r"(?:^EXIT_\w+ = |sys\.exit\()(\d+)", source, re.MULTILINE))}
    documented = [int(row[0]) for row in rows(page("how-to-operate.md")["What the exit codes mean"])]
    assert documented == sorted(used)


# Words, links, files


def test_the_glossary_explains_the_words_of_the_project():
    glossary = page("glossary.md")
    explained = " ".join(glossary).lower()
    for word in ("context", "message", "chunk", "segment", "delta", "sequence", "version", "signal", "pull", "wake-up",
                 "run", "lease", "attempt", "agent", "owner", "epoch", "file"):  # fmt: skip
        assert re.search(rf"\b(a|an) {word}\b", explained), word


def instead() -> list[str]:
    """Words that the glossary turns down, where they have no other use in this documentation."""
    ordinary = {"event", "push", "fetch", "model", "chat", "token", "lock", "user", "index", "session", "poll", "chunk",
                "thread", "bot", "notification", "offset", "job", "task"}  # fmt: skip
    text = (DOCS / "glossary.md").read_text(encoding="utf-8")
    words = [word.strip(" .") for line in re.findall(r"^Not: (.*)$", text, re.MULTILINE) for word in line.split(",")]
    return [word for word in words if word not in ordinary]


def test_the_words_that_the_glossary_turns_down_are_not_used():
    turned_down = instead()
    assert turned_down == ["responder", "tenant"]
    for path in pages():
        for number, line in prose(path.read_text(encoding="utf-8")):
            used = [word for word in turned_down if re.search(rf"\b{word}s?\b", line, re.IGNORECASE)]
            assert not used or path.name == "glossary.md", f"{path.name}:{number} says {used}"


def faulty_links(path: Path) -> list[str]:
    faults = []
    for number, target in links(path.read_text(encoding="utf-8")):
        if target.startswith(("https://", "http://")):
            continue
        name, _, fragment = target.partition("#")
        to = (path.parent / name).resolve() if name else path
        if not to.is_file():
            faults.append(f"{path.name}:{number} {target}: there is no such file")
        elif fragment and fragment not in map(anchor, headings(to.read_text(encoding="utf-8"))):
            faults.append(f"{path.name}:{number} {target}: there is no such heading")
    return faults


@pytest.mark.parametrize("path", pages(), ids=lambda path: path.name)
def test_links_and_anchors_resolve(path):
    assert faulty_links(path) == []


@pytest.mark.parametrize("path", pages(), ids=lambda path: path.name)
def test_each_page_has_one_title_and_headings_of_its_own(path):
    text = path.read_text(encoding="utf-8")
    titles = [line for _, line in prose(text) if line.startswith("# ")]
    assert len(titles) == 1
    assert len(set(headings(text))) == len(headings(text))


def test_the_index_links_each_page():
    linked = {target for _, target in links((DOCS / "README.md").read_text(encoding="utf-8"))}
    assert linked == {path.name for path in DOCS.glob("*.md")} - {"README.md"}


@pytest.mark.parametrize("path", [*pages(), ROOT / ".ci" / "run", ROOT / "pyproject.toml"], ids=lambda path: path.name)
def test_no_path_of_a_machine_is_in_it(path):
    found = re.findall(r"(?:/work|/tmp|/home|/root|/Users|[A-Z]:\\)[/\\][\w./-]*", path.read_text(encoding="utf-8"))
    assert found == []


def test_the_changelog_begins_with_the_version_that_this_is():
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    first = headings((DOCS / "changelog.md").read_text(encoding="utf-8"))[1]
    assert first == project["version"]


def test_the_tests_are_laid_out_as_described_and_each_trial_can_be_run():
    text = (DOCS / "contributing.md").read_text(encoding="utf-8")
    here = {f"tests/{path.name}/" for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name[0] not in "_."}
    described = {name for row in rows(page("contributing.md")["How the tests are laid out"]) for name in codes(row[0])}
    assert {name for name in described if name.endswith("/")} == here
    assert all((ROOT / name).exists() for name in described)
    trials = re.findall(r"python -m (tests[.\w]+)", text + (DOCS / "performance.md").read_text(encoding="utf-8"))
    assert trials
    for trial in trials:
        module = ROOT / trial.replace(".", "/")
        source = (module / "__main__.py" if module.is_dir() else module.with_suffix(".py")).read_text(encoding="utf-8")
        assert '__name__ == "__main__"' in source, trial
