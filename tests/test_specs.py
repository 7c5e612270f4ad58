"""The specs under test: every scenario is claimed by a test, every claim names a scenario, every change says why.

``openspec validate`` checks the form of the specs; it notices neither a scenario that no test proves nor a change
without ``proposal.md``. Claims are read from the source, not by import, so that a scenario does not count as proved
because a module happened to load, and so that this file needs nothing of the others.
"""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

SCENARIO_HEADING = re.compile(r"^#### Scenario:\s*(?P<name>.*?)\s*$")
ARCHIVED_CHANGE = re.compile(r"\d{4}-\d{2}-\d{2}-[a-z0-9-]+")
# pytest does not collect these (norecursedirs in pyproject.toml), so a claim in them would prove nothing.
NOT_COLLECTED = frozenset({"benchmarks"})


@dataclass(frozen=True, slots=True, order=True)
class Scenario:
    """One scenario of a spec, or the claim of one: ``content-pull``, ``Resume after a gap``."""

    capability: str
    name: str

    def __str__(self) -> str:
        return f'@pytest.mark.scenario("{self.capability}", "{self.name}")'


@dataclass(frozen=True, slots=True)
class Claim:
    """A marker in a test file; ``scenario`` is None when its arguments are not two plain strings."""

    scenario: Scenario | None
    where: str


def scenarios_of(root: Path) -> list[tuple[Scenario, str]]:
    """Every scenario of ``openspec/specs/<capability>/spec.md``, with ``file:line``, in the order of the files."""
    found = []
    for spec in sorted((root / "openspec" / "specs").glob("*/spec.md")):
        for number, line in enumerate(spec.read_text(encoding="utf-8").splitlines(), start=1):
            if heading := SCENARIO_HEADING.match(line):
                found.append((Scenario(spec.parent.name, heading["name"]), f"{spec.relative_to(root)}:{number}"))
    return found


def claims_of(root: Path) -> list[Claim]:
    """Every ``pytest.mark.scenario(…)`` in the test files that pytest collects."""
    return [
        Claim(_named(call), f"{path.relative_to(root)}:{call.lineno}")
        for path in sorted((root / "tests").rglob("test_*.py"))
        if not NOT_COLLECTED.intersection(path.relative_to(root).parts)
        for call in _marker_calls(ast.parse(path.read_text(encoding="utf-8"), filename=str(path)))
    ]


def _marker_calls(tree: ast.AST) -> Iterator[ast.Call]:
    """The calls of ``pytest.mark.scenario`` that reach a test.

    What stands on or in a function or class that pytest does not collect is left out, so that its scenario remains
    unproved. A marker anywhere else counts: in ``pytestmark``, in ``pytest.param(…, marks=…)``, around the
    ``TestCase`` of a Hypothesis state machine.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("test"):
            continue
        if isinstance(node, ast.ClassDef) and not node.name.startswith("Test"):
            continue
        if isinstance(node, ast.Call) and _is_scenario_marker(node.func):
            yield node
        yield from _marker_calls(node)


def _is_scenario_marker(function: ast.expr) -> bool:
    """``pytest.mark.scenario`` and ``mark.scenario``."""
    match function:
        case ast.Attribute(attr="scenario", value=ast.Attribute(attr="mark") | ast.Name(id="mark")):
            return True
    return False


def _named(call: ast.Call) -> Scenario | None:
    match call:
        case ast.Call(args=[ast.Constant(value=str(capability)), ast.Constant(value=str(name))], keywords=[]):
            return Scenario(capability, name)
    return None


def repeated_scenarios(root: Path) -> list[str]:
    """Names that stand twice in one spec: a claim could not tell them apart."""
    count = Counter(scenario for scenario, _ in scenarios_of(root))
    return [f"{where}  {scenario}" for scenario, where in scenarios_of(root) if count[scenario] > 1]


def unproved_scenarios(root: Path) -> list[str]:
    """Scenarios that no test claims, as the marker that would claim each."""
    claimed = {claim.scenario for claim in claims_of(root)}
    return [f"{where}  {scenario}" for scenario, where in scenarios_of(root) if scenario not in claimed]


def empty_claims(root: Path) -> list[str]:
    """Claims of scenarios that no spec has, and markers that do not name one in plain strings."""
    known = {scenario for scenario, _ in scenarios_of(root)}
    return [
        f"{claim.where}  {claim.scenario or 'the marker wants two plain strings: capability, name'}"
        for claim in claims_of(root)
        if claim.scenario not in known
    ]


def incomplete_changes(root: Path) -> list[str]:
    """Folders of changes, open or archived, without ``proposal.md``, and archived ones without a date in the name."""
    changes = root / "openspec" / "changes"
    archived = _folders(changes / "archive")
    return [
        f"{folder.relative_to(root)}  has no proposal.md"
        for folder in (*_folders(changes), *archived)
        if folder.name != "archive" and not (folder / "proposal.md").is_file()
    ] + [
        f"{folder.relative_to(root)}  is not named YYYY-MM-DD-<id>"
        for folder in archived
        if not ARCHIVED_CHANGE.fullmatch(folder.name)
    ]


def _folders(parent: Path) -> list[Path]:
    return sorted(path for path in parent.glob("*") if path.is_dir())


def _require_none(title: str, faults: list[str]) -> None:
    if faults:
        pytest.fail("\n".join([f"{title} ({len(faults)}):", *(f"  {fault}" for fault in faults)]), pytrace=False)


# The project's own specs.


def test_each_scenario_has_a_name_of_its_own():
    assert scenarios_of(ROOT), "no scenario found below openspec/specs"
    _require_none("scenarios of one name in one spec", repeated_scenarios(ROOT))


def test_each_scenario_is_claimed_by_a_test():
    _require_none("scenarios that no test claims", unproved_scenarios(ROOT))


def test_each_claim_names_a_scenario():
    _require_none("claims of scenarios that do not exist", empty_claims(ROOT))


def test_each_change_says_why():
    _require_none("changes that are not complete", incomplete_changes(ROOT))


# Negative controls: each fault is found in a project that has it.

SPEC = "# pull Specification\n\n### Requirement: Resume\n\n#### Scenario: {}\n\n- **WHEN** …\n"


@pytest.fixture
def project(tmp_path):
    """A project of one scenario, ``pull``/``Resume after a gap``, that one test claims, and no changes."""
    _write(tmp_path / "openspec/specs/pull/spec.md", SPEC.format("Resume after a gap"))
    _write(tmp_path / "tests/unit/test_pull.py", _test_claiming('"pull", "Resume after a gap"'))
    return tmp_path


def _write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _test_claiming(arguments, *, function="async def test_resume"):
    return f"import pytest\n\n\n@pytest.mark.scenario({arguments})\n{function}():\n    assert True\n"


def test_a_whole_project_has_no_fault(project):
    checks = (repeated_scenarios, unproved_scenarios, empty_claims, incomplete_changes)
    assert [fault for check in checks for fault in check(project)] == []


def test_a_scenario_without_a_test_is_found(project):
    _write(project / "openspec/specs/push/spec.md", SPEC.format("Push at once"))
    assert unproved_scenarios(project) == [
        'openspec/specs/push/spec.md:5  @pytest.mark.scenario("push", "Push at once")'
    ]


def test_a_scenario_of_another_capability_is_not_proved_by_its_name(project):
    _write(project / "openspec/specs/push/spec.md", SPEC.format("Resume after a gap"))
    assert len(unproved_scenarios(project)) == 1


def test_a_scenario_that_stands_twice_is_found(project):
    spec = SPEC.format("Resume after a gap")
    _write(project / "openspec/specs/pull/spec.md", spec + "\n#### Scenario: Resume after a gap\n")
    assert len(repeated_scenarios(project)) == 2


def test_a_claim_of_no_scenario_is_found(project):
    _write(project / "tests/test_more.py", _test_claiming('"pull", "Resume after lunch"'))
    assert empty_claims(project) == ['tests/test_more.py:4  @pytest.mark.scenario("pull", "Resume after lunch")']


@pytest.mark.parametrize("arguments", ["", '"pull"', '"pull", NAME', 'capability="pull", name="Resume after a gap"'])
def test_a_claim_that_cannot_be_read_is_found(project, arguments):
    _write(project / "tests/test_more.py", _test_claiming(arguments))
    assert empty_claims(project) == ["tests/test_more.py:4  the marker wants two plain strings: capability, name"]


@pytest.mark.parametrize(
    ("path", "function"),
    [
        ("tests/benchmarks/test_pull.py", "def test_resume"),
        ("tests/conftest.py", "def test_resume"),
        ("tests/test_pull.py", "def resume"),
        ("tests/test_pull.py", "class Pull"),
    ],
)
def test_a_claim_that_pytest_does_not_run_proves_nothing(project, path, function):
    (project / "tests/unit/test_pull.py").unlink()
    _write(project / path, _test_claiming('"pull", "Resume after a gap"', function=function))
    assert len(unproved_scenarios(project)) == 1


@pytest.mark.parametrize(
    "source",
    [
        'from pytest import mark\n\n@mark.scenario("pull", "Resume after a gap")\nclass TestPull: ...\n',
        'import pytest\n\npytestmark = [pytest.mark.scenario("pull", "Resume after a gap")]\n',
        'import pytest\n\nTestPull = pytest.mark.scenario("pull", "Resume after a gap")(Pull.TestCase)\n',
        'class TestPull:\n    @pytest.mark.scenario("pull", "Resume after a gap")\n    def test_it(self): ...\n',
    ],
)
def test_a_claim_counts_wherever_pytest_reads_it(project, source):
    _write(project / "tests/unit/test_pull.py", source)
    assert unproved_scenarios(project) == []


def test_a_change_without_a_proposal_is_found(project):
    _write(project / "openspec/changes/add-more/tasks.md", "")
    _write(project / "openspec/changes/add-less/proposal.md", "")
    _write(project / "openspec/changes/archive/2026-01-31-add-most/design.md", "")
    _write(project / "openspec/changes/archive/undated/proposal.md", "")
    assert incomplete_changes(project) == [
        "openspec/changes/add-more  has no proposal.md",
        "openspec/changes/archive/2026-01-31-add-most  has no proposal.md",
        "openspec/changes/archive/undated  is not named YYYY-MM-DD-<id>",
    ]
