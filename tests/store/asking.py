"""How the tests have runs ask for approval: suspend, decide, go on."""

from dataclasses import replace

from context_server.approving import approvals_of, call_to_approve
from context_server.records import (
    Approval,
    ApprovalRequest,
    ApprovalStatus,
    Chunk,
    ChunkKind,
    Run,
    Transition,
    Usage,
)
from context_server.store import Store
from context_server.store.approvals import Decision
from tests.store.writing import OWNER, Writer, claim, start

APPROVE = Decision(status=ApprovalStatus.APPROVED)
DENY = Decision(status=ApprovalStatus.DENIED, note="not today")


def asking(number: int = 1, *, editable: bool = False) -> ApprovalRequest:
    """What an agent asks for."""
    return ApprovalRequest(call_id=f"call-{number}", tool="pay", arguments={"amount": number}, editable=editable)


def request(run: Run, number: int = 1, *, editable: bool = False, lifetime: float = 3600) -> Approval:
    """What a run asks for, not stored yet."""
    (approval,) = approvals_of(run, [asking(number, editable=editable)], lifetime)
    return approval


async def suspend(writer: Writer, *approvals: Approval, usage: Usage | None = None) -> Transition | None:
    """Has a run write its calls and be suspended."""
    calls = [Chunk(0, ChunkKind.TOOL_CALL, None, call_to_approve(approval)) for approval in approvals]
    append = replace(writer.take(*calls, usage=usage), approvals=approvals)
    (transition,) = await writer.store.append([append])
    return transition


async def suspended(store: Store, *options: dict[str, object], text: str = "before ") -> tuple[Writer, list[Approval]]:
    """A run that has written something and asks for as many approvals as there are options."""
    writer = await start(store)
    await writer.write(text)
    asked = []
    for number, each in enumerate(options or ({},), start=1):
        asked.append(request(writer.run, number, **each))  # type: ignore[arg-type]  # what request takes
    ids = sorted(approval.id for approval in asked)
    asked = [replace(approval, id=key) for key, approval in zip(ids, asked, strict=True)]
    await suspend(writer, *asked)
    return writer, asked


async def go_on(store: Store) -> Writer:
    """Claims the oldest queued run, which may have been suspended, and takes up what it has written."""
    writer = await claim(store)
    draft = await store.draft(writer.run)
    assert draft is not None
    writer.sequence, writer.size = writer.run.sequence, writer.run.content_bytes
    writer.text = draft.reply.text
    for chunk in draft.reply.chunks:
        writer.open_tools += {ChunkKind.TOOL_CALL: 1, ChunkKind.TOOL_RESULT: -1}.get(chunk.kind, 0)
    return writer


async def decide(store: Store, approval: Approval, decision: Decision = APPROVE) -> Approval:
    """A decision; the approval as it stands then."""
    return (await store.suspension.decide(OWNER, approval.context_id, approval.id, decision, if_match=None)).approval
