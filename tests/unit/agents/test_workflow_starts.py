"""Which messages start a workflow, and what is said of an input that does not fit."""

from typing import Any, Literal

import pytest
from pydantic import BaseModel, field_validator

from context_server.agents import AgentFailed, Flow, Workflows
from context_server.records import ApprovalStatus
from tests.unit.agents.playing import Play, agree, approval, echo, message, play, starting


class Trip(BaseModel):
    city: Literal["Oslo", "Rome"]

    @field_validator("city")
    @classmethod
    def known(cls, value: str) -> str:
        if value == "Rome":
            msg = f"{value} is far"
            raise ValueError(msg)
        return value


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"trips": {"my-secret": {"city": "Bonn"}}}, "; trips: literal_error."),
        ({"trips": {"my-secret": {"city": "Rome"}}}, "; trips: value_error."),
        ({"trips": {}, "my-secret": "Rome"}, "; int_parsing."),
        ({"trips": {}, "flow": "my-secret"}, ", **counts: int."),
    ],
)
async def test_a_refused_input_is_not_repeated(given: dict[str, Any], reason: str) -> None:
    async def plan(flow: Flow, trips: dict[str, Trip], **counts: int) -> None: ...

    with pytest.raises(AgentFailed) as failed:
        await play(plan, **given)
    assert failed.value.code == "workflow-input"
    assert failed.value.detail.endswith(reason)
    assert "my-secret" not in failed.value.detail
    assert "Rome" not in failed.value.detail


async def test_the_last_message_is_answered_also_one_that_once_steered() -> None:
    async def work(flow: Flow) -> None:
        await flow.say("worked")

    workflows = Workflows(echo)
    workflows.workflow(work)
    played = Play(workflows, starting("work"), [message("hurry", steers=True)])
    await played.to_the_end()
    assert played.text == "hurry"


async def test_what_steered_a_workflow_meanwhile_does_not_take_its_place() -> None:
    async def work(flow: Flow) -> None:
        await flow.call(agree, needs_approval=True)
        await flow.say("worked")

    workflows = Workflows(echo)
    workflows.workflow(work)
    played = Play(workflows, starting("work"))
    assert await played.attempt() is not None
    played.approvals["step-1"] = approval("step-1", {}, ApprovalStatus.APPROVED)
    played.later = [message("hurry", steers=True)]
    await played.to_the_end()
    assert played.text == "worked"
