"""Approvals: a suspended run is rows and nothing else, and each request gets one decision."""

import asyncio
from contextlib import nullcontext
from datetime import timedelta

import pytest

from context_server.errors import ApprovalDecided, ApprovalNotFound, ArgumentsNotEditable, VersionMismatch
from context_server.records import (
    ApprovalStatus,
    ChunkKind,
    MessageStatus,
    Outcome,
    RunStatus,
    State,
    Usage,
    arguments_digest,
)
from context_server.store import Store
from context_server.store.approvals import EXPIRED, Decision
from tests.databases import run_beside
from tests.store.asking import APPROVE, DENY, decide, go_on, request, suspend, suspended
from tests.store.writing import OWNER, STRANGER, result, sha256, start


async def state_of(store: Store, context_id: str) -> State:
    return (await store.context(OWNER, context_id)).state


async def pending(store: Store, context_id: str) -> list[str]:
    return [each.id for each in await store.suspension.approvals(OWNER, context_id, only_pending=True)]


async def data_of(store: Store, run) -> list[tuple[ChunkKind, object]]:
    page = await store.page(OWNER, run.context_id, run.message_id)
    return [(chunk.kind, chunk.data) for chunk in page.chunks if chunk.data is not None]


# Asking


@pytest.mark.scenario("approvals", "A call waits for a person")
async def test_a_run_that_asks_is_suspended_and_what_it_asks_is_stored(store, rows):
    writer = await start(store)
    await writer.write("before ")
    asked = request(writer.run, 7, editable=True)

    transition = await suspend(writer, asked, usage=Usage(input_tokens=3))

    assert transition.state is State.AWAITING_APPROVAL
    context = await store.context(OWNER, writer.run.context_id)
    assert (context.state, context.version) == (State.AWAITING_APPROVAL, transition.version)
    assert (context.active_run.id, context.active_run.status) == (writer.run.id, RunStatus.SUSPENDED)
    (found,) = await store.suspension.approvals(OWNER, context.id, only_pending=True)
    assert (found.id, found.call_id, found.tool, found.arguments) == (asked.id, "call-7", "pay", {"amount": 7})
    assert found.arguments_sha256 == arguments_digest({"amount": 7})
    assert (found.status, found.editable, found.decided_at) == (ApprovalStatus.PENDING, True, None)
    assert found.expires_at - found.created_at == timedelta(hours=1)
    ((kind, data),) = await data_of(store, writer.run)
    assert (kind, data["name"], data["arguments"]) == (ChunkKind.TOOL_CALL, "pay", {"amount": 7})
    assert data["approval"]["id"] == asked.id
    assert (await writer.message()).usage["input_tokens"] == 3
    assert rows("SELECT lease_expires_at FROM runs") == [(None,)]
    assert await store.active_runs() == {"suspended": 1}
    assert await store.claim_runs(10) == []


@pytest.mark.scenario("approvals", "A restart changes nothing")
async def test_a_suspended_run_outlives_its_process(database_url):
    async with Store.open(database_url, connections=4) as store:
        writer, (asked,) = await suspended(store)
    run_beside(database_url, "UPDATE runs SET started_at = started_at - 86400000")

    async with Store.open(database_url, connections=4) as store:
        assert await store.expired_runs() == []
        assert [run.id for run in await store.unclaimed_runs()] == [writer.run.id]
        await decide(store, asked)
        following = await go_on(store)
        await following.write(result(1), "after", outcome=Outcome.SUCCEEDED)
        message = await following.message()
    assert (message.status, message.content, message.digest) == (
        MessageStatus.COMPLETED,
        "before after",
        sha256("before after"),
    )


async def test_a_run_that_was_told_to_stop_is_not_suspended(store, rows):
    writer = await start(store)
    await store.request_cancel(OWNER, writer.run.context_id)

    transition = await suspend(writer, request(writer.run))

    assert transition.state is State.CANCELLING
    assert rows("SELECT * FROM approvals") == []
    await writer.write(outcome=Outcome.STOPPED)
    assert (await writer.message()).status is MessageStatus.CANCELLED


async def test_approvals_are_those_of_their_owner(store):
    writer, (asked,) = await suspended(store)
    context_id = writer.run.context_id
    other = await start(store)
    with pytest.raises(Exception, match="context"):
        await store.suspension.approvals(STRANGER, context_id, only_pending=False)
    with pytest.raises(Exception, match="context"):
        await store.suspension.decide(STRANGER, context_id, asked.id, APPROVE, if_match=None)
    with pytest.raises(ApprovalNotFound):
        await store.suspension.decide(OWNER, other.run.context_id, asked.id, APPROVE, if_match=None)
    assert await pending(store, context_id) == [asked.id]


# Deciding


@pytest.mark.scenario("approvals", "An approved call is made, and the run goes on")
@pytest.mark.parametrize("decision", [APPROVE, DENY], ids=["approve", "deny"])
async def test_a_decided_run_is_queued_and_goes_on_where_it_was(store, decision):
    writer, (asked,) = await suspended(store)
    before = await store.context(OWNER, writer.run.context_id)

    decided = await store.suspension.decide(OWNER, before.id, asked.id, decision, if_match=before.version)

    assert (decided.approval.status, decided.approval.note) == (decision.status, decision.note)
    assert decided.approval.decided_at is not None
    assert decided.version == decided.transition.version == before.version + 1
    assert (decided.transition.previous_state, decided.transition.state) == (State.AWAITING_APPROVAL, State.QUEUED)
    following = await go_on(store)
    assert (following.run.id, following.run.attempt) == (writer.run.id, writer.run.attempt + 1)
    assert (following.run.sequence, following.run.content_bytes) == (writer.sequence, writer.size)
    draft = await store.draft(following.run)
    assert [each.status for each in draft.approvals] == [decision.status]
    assert draft.reply.text == "before "
    await following.write(result(1), "after", outcome=Outcome.SUCCEEDED)
    assert (await following.message()).content == "before after"


@pytest.mark.scenario("approvals", "The same decision again")
async def test_the_same_decision_again_changes_nothing(store):
    writer, (asked,) = await suspended(store)
    first = await decide(store, asked)
    version = (await store.context(OWNER, writer.run.context_id)).version

    again = await store.suspension.decide(OWNER, asked.context_id, asked.id, APPROVE, if_match=None)

    assert (again.approval, again.version, again.transition) == (first, None, None)
    assert (await store.context(OWNER, writer.run.context_id)).version == version
    assert len(await store.claim_runs(10)) == 1


@pytest.mark.scenario("approvals", "Another decision afterwards")
@pytest.mark.parametrize(
    ("first", "second"),
    [
        (APPROVE, DENY),
        (DENY, APPROVE),
        (APPROVE, Decision(status=ApprovalStatus.APPROVED, arguments={"amount": 2})),
        (Decision(status=ApprovalStatus.APPROVED, arguments={"amount": 2}), APPROVE),
    ],
)
async def test_another_decision_is_refused_with_the_one_that_stands(store, first, second):
    _, (asked,) = await suspended(store, {"editable": True})
    stands = await decide(store, asked, first)
    with pytest.raises(ApprovalDecided) as refusal:
        await decide(store, asked, second)
    assert refusal.value.approval == stands
    assert refusal.value.code == "approval-decided"


@pytest.mark.scenario("approvals", "Arguments are edited where the tool allows it")
async def test_edited_arguments_are_recorded_as_edited(store):
    _, (asked,) = await suspended(store, {"editable": True})
    edited = await decide(store, asked, Decision(status=ApprovalStatus.APPROVED, arguments={"amount": 2}))
    assert (edited.arguments, edited.edited_arguments) == ({"amount": 1}, {"amount": 2})
    assert edited.final_arguments == {"amount": 2}
    assert edited.arguments_sha256 == arguments_digest({"amount": 1})


async def test_arguments_that_are_the_same_are_not_edited(store):
    _, (asked,) = await suspended(store, {"editable": True})
    edited = await decide(store, asked, Decision(status=ApprovalStatus.APPROVED, arguments={"amount": 1}))
    assert edited.edited_arguments is None


@pytest.mark.scenario("approvals", "Arguments cannot be changed otherwise")
async def test_arguments_of_a_tool_that_allows_no_edit_are_refused(store):
    writer, (asked,) = await suspended(store)
    with pytest.raises(ArgumentsNotEditable):
        await decide(store, asked, Decision(status=ApprovalStatus.APPROVED, arguments={"amount": 2}))
    assert await pending(store, writer.run.context_id) == [asked.id]


@pytest.mark.scenario("approvals", "All of several are decided on")
async def test_a_run_goes_on_once_all_is_decided(store):
    writer, (first, second) = await suspended(store, {}, {})
    context = await store.context(OWNER, writer.run.context_id)

    half = await store.suspension.decide(OWNER, context.id, second.id, DENY, if_match=context.version)

    assert (half.version, half.transition) == (context.version + 1, None)
    assert await state_of(store, context.id) is State.AWAITING_APPROVAL
    assert await pending(store, context.id) == [first.id]
    assert await store.claim_runs(10) == []
    await decide(store, first)
    following = await go_on(store)
    draft = await store.draft(following.run)
    assert {each.call_id: each.status for each in draft.approvals} == {
        "call-1": ApprovalStatus.APPROVED,
        "call-2": ApprovalStatus.DENIED,
    }


async def test_a_run_may_ask_again(store):
    _, (asked,) = await suspended(store)
    await decide(store, asked)
    following = await go_on(store)
    await following.write(result(1))
    again = request(following.run, 2)
    await suspend(following, again, usage=Usage(input_tokens=5))
    assert await pending(store, asked.context_id) == [again.id]
    await decide(store, again, DENY)
    third = await go_on(store)
    draft = await store.draft(third.run)
    assert [each.id for each in draft.approvals] == [asked.id, again.id]
    assert draft.usage == Usage(input_tokens=5)
    assert third.run.attempt == 3


async def test_a_decision_on_another_version_is_refused(store):
    writer, (asked,) = await suspended(store)
    with pytest.raises(VersionMismatch):
        await store.suspension.decide(OWNER, asked.context_id, asked.id, APPROVE, if_match=1)
    assert await pending(store, writer.run.context_id) == [asked.id]


@pytest.mark.scenario("approvals", "Two decide at once")
async def test_of_decisions_at_once_one_stands(database_url):
    async with Store.open(database_url, connections=4) as store:
        _, (asked,) = await suspended(store)
        # A file has one process, and so one store.
        second = Store.open(database_url, connections=4) if store.shared else nullcontext(store)
        async with second as other:
            results = await asyncio.gather(
                *(decide(where, asked, what) for where in (store, other) for what in (APPROVE, DENY)),
                return_exceptions=True,
            )
        stands = {each.status for each in results if not isinstance(each, BaseException)}
        refused = [each for each in results if isinstance(each, BaseException)]
        assert len(stands) == 1
        assert len(refused) == 2
        assert all(isinstance(each, ApprovalDecided) and {each.approval.status} == stands for each in refused)
        assert len(await store.claim_runs(10)) == 1


# Ends without a decision


@pytest.mark.scenario("approvals", "Nobody decides in time")
async def test_what_nobody_decided_on_in_time_ends_with_its_run(store):
    writer, (first, second) = await suspended(store, {"lifetime": -1}, {})
    other, _ = await suspended(store)
    context_id = writer.run.context_id

    assert await store.suspension.overdue(10) == [(OWNER, context_id)]
    transition = await store.suspension.expire(OWNER, context_id)

    assert (transition.previous_state, transition.state) == (State.AWAITING_APPROVAL, State.IDLE)
    message = await writer.message()
    assert (message.status, message.error, message.digest) == (MessageStatus.CANCELLED, EXPIRED, sha256("before "))
    assert message.final_sequence == message.sequence == writer.sequence + 2
    closing = (await data_of(store, writer.run))[-2:]
    assert [(kind, data["id"], data["status"]) for kind, data in closing] == [
        (ChunkKind.TOOL_RESULT, first.call_id, "expired"),
        (ChunkKind.TOOL_RESULT, second.call_id, "expired"),
    ]
    found = await store.suspension.approvals(OWNER, context_id, only_pending=False)
    assert [each.status for each in found] == [ApprovalStatus.EXPIRED] * 2
    assert await store.suspension.overdue(10) == []
    assert await store.suspension.expire(OWNER, context_id) is None
    assert await store.suspension.expire(OWNER, other.run.context_id) is None
    with pytest.raises(ApprovalDecided, match="expired"):
        await decide(store, first)


@pytest.mark.scenario("approvals", "A decision after its time")
@pytest.mark.parametrize("decision", [APPROVE, DENY], ids=["approve", "deny"])
async def test_a_decision_after_the_time_is_refused_before_any_sweep(store, decision):
    writer, (asked,) = await suspended(store, {"lifetime": -1})
    with pytest.raises(ApprovalDecided) as refusal:
        await decide(store, asked, decision)
    assert refusal.value.approval.status is ApprovalStatus.EXPIRED
    assert await state_of(store, writer.run.context_id) is State.AWAITING_APPROVAL


async def test_a_hundred_contexts_wait_a_day_and_each_goes_on(store, database_url):
    everything = [await suspended(store, {"lifetime": 172_800}) for _ in range(100)]
    run_beside(
        database_url, "UPDATE approvals SET created_at = created_at - 86400000, expires_at = expires_at - 86400000"
    )
    assert await store.suspension.overdue(200) == []
    for _, (asked,) in everything:
        await decide(store, asked)
    assert len(await store.claim_runs(200)) == 100


@pytest.mark.scenario("approvals", "Cancelled while it waits")
async def test_a_cancel_closes_what_waits_for_approval(store):
    writer, (asked,) = await suspended(store)
    context, transition = await store.request_cancel(OWNER, writer.run.context_id)

    assert (context.state, transition.ended.status) == (State.IDLE, MessageStatus.CANCELLED)
    message = await writer.message()
    assert (message.status, message.error) == (MessageStatus.CANCELLED, None)
    assert message.final_sequence == transition.ended.final_sequence == writer.sequence + 1
    kind, data = (await data_of(store, writer.run))[-1]
    assert (kind, data["id"], data["status"]) == (ChunkKind.TOOL_RESULT, asked.call_id, "cancelled")
    with pytest.raises(ApprovalDecided, match="cancelled"):
        await decide(store, asked)
    (found,) = await store.suspension.approvals(OWNER, context.id, only_pending=False)
    assert found.status is ApprovalStatus.CANCELLED
    page = await store.page(OWNER, context.id, message.id, max_bytes=2**30)
    assert message.sequence == page.sequence == len(page.chunks)


@pytest.mark.scenario("approvals", "A crash after the approval")
async def test_a_crash_after_the_approval_closes_the_call_as_interrupted(store, lapse):
    _, (asked,) = await suspended(store)
    await decide(store, asked)
    following = await go_on(store)
    await following.write("calling ")
    lapse()
    (orphan,) = await store.expired_runs()

    transition = await store.expire_run(orphan)

    assert transition.state is State.FAILED
    kind, data = (await data_of(store, following.run))[-1]
    assert (kind, data["id"], data["status"]) == (ChunkKind.TOOL_RESULT, asked.call_id, "interrupted")
    message = await following.message()
    assert (message.content, message.digest) == ("before calling ", sha256("before calling "))
    (found,) = await store.suspension.approvals(OWNER, asked.context_id, only_pending=False)
    assert found.status is ApprovalStatus.APPROVED


async def test_a_deleted_context_takes_its_approvals_with_it(store, rows):
    writer, (asked,) = await suspended(store)
    await store.delete_context(OWNER, writer.run.context_id)
    assert rows("SELECT * FROM approvals") == []
    with pytest.raises(Exception, match="context"):
        await decide(store, asked)


async def test_the_size_of_a_reply_counts_what_closed_its_calls(store, rows):
    writer, _ = await suspended(store)
    await store.request_cancel(OWNER, writer.run.context_id)
    page = await store.page(OWNER, writer.run.context_id, writer.run.message_id)
    ((size,),) = rows(f"SELECT content_bytes FROM messages WHERE id = '{writer.run.message_id}'")
    assert size == sum(chunk.size_bytes for chunk in page.chunks)
