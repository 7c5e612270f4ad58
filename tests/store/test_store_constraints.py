"""The database holds the invariants by itself: every broken row is refused, whoever writes it."""

import re

import pytest
from sqlalchemy import inspect, text
from sqlalchemy.exc import IntegrityError

from context_server.store.tables import metadata
from tests.databases import beside
from tests.store.writing import exchange, post, start

NOW = 1_700_000_000_000


@pytest.fixture
async def filled(store, database_url):
    """A connection of its own to a database with an ended, a running and a queued reply, and their ids."""
    ended = (await exchange(store, "Hello", "one")).run
    running = await start(store)
    await running.write("one")
    queued = await post(store)
    engine = beside(database_url)
    connection = engine.connect()
    if engine.name == "sqlite":
        connection.exec_driver_sql("PRAGMA foreign_keys=ON")
        connection.commit()
    ids = {
        "ended_context": ended.context_id,
        "ended": ended.message_id,
        "running_context": running.run.context_id,
        "running": running.run.message_id,
        "running_run": running.run.id,
        "queued_context": queued.context_id,
        "queued": queued.reply_message_id,
        "queued_run": queued.run_id,
        "now": NOW,
    }
    yield connection, ids
    connection.close()


RUN = "INSERT INTO runs (id, context_id, message_id, status, attempt, created_at, ended_at) VALUES"
CHUNK = "INSERT INTO chunks (message_id, sequence, kind, text, data) VALUES"
SEGMENT = "INSERT INTO segments (message_id, last_sequence, first_sequence, format, body) VALUES"
WAITING = (
    "INSERT INTO waiting_runs"
    " (run_id, context_id, message_id, reply_message_id, priority, follows_head, created_at) VALUES"
)
APPROVAL = (
    "INSERT INTO approvals (id, run_id, call_id, tool, arguments, arguments_sha256, created_at, expires_at,"
    " context_id, message_id, editable, status, edited_arguments, decided_at)"
    " VALUES ('a', 'r', 'c', 'look', '[]', 'd', 1, 2,"
)
FILE = "INSERT INTO files (id, owner, name, media_type, size_bytes, sha256, created_at) VALUES"
BROKEN = {
    # A context
    "ck_contexts_state_known": "UPDATE contexts SET state = 'dreaming', active_run_id = NULL WHERE id = :ended_context",
    "ck_contexts_mode_known": "UPDATE contexts SET mode = 'yolo' WHERE id = :ended_context",
    "ck_contexts_busy_has_run": "UPDATE contexts SET state = 'thinking' WHERE id = :ended_context",
    "ck_contexts_busy_has_run, idle": "UPDATE contexts SET state = 'idle' WHERE id = :running_context",
    "ck_contexts_version_positive": "UPDATE contexts SET version = 0 WHERE id = :ended_context",
    # A message
    "ck_messages_role_known": "UPDATE messages SET role = 'system' WHERE id = :ended",
    "ck_messages_status_known": "UPDATE messages SET status = 'paused' WHERE id = :running",
    "ck_messages_ended_has_final_sequence": "UPDATE messages SET final_sequence = NULL WHERE id = :ended",
    "ck_messages_ended_has_final_sequence, open": "UPDATE messages SET final_sequence = 1 WHERE id = :running",
    "ck_messages_final_is_head": "UPDATE messages SET sequence = 2 WHERE id = :ended",
    "ck_messages_ended_has_digest": "UPDATE messages SET digest = NULL WHERE id = :ended",
    "ck_messages_ended_has_digest, open": "UPDATE messages SET digest = 'd' WHERE id = :running",
    "ck_messages_pending_is_empty": "UPDATE messages SET status = 'pending' WHERE id = :running",
    "ck_messages_sequence_positive": "UPDATE messages SET sequence = -1 WHERE id = :running",
    "ck_messages_sequence_positive, bytes": "UPDATE messages SET content_bytes = -1 WHERE id = :running",
    "messages.context_id, messages.position": "UPDATE messages SET position = 1 WHERE id = :ended",
    "FOREIGN KEY, message": "UPDATE messages SET context_id = 'nowhere' WHERE id = :ended",
    # A chunk
    "chunks.message_id, chunks.sequence": f"{CHUNK} (:running, 1, 'text', 'again', NULL)",
    "FOREIGN KEY, chunk": f"{CHUNK} ('nowhere', 1, 'text', 'x', NULL)",
    "ck_chunks_sequence_positive": f"{CHUNK} (:running, 0, 'text', 'x', NULL)",
    "ck_chunks_kind_known": f"{CHUNK} (:running, 2, 'gesture', 'x', NULL)",
    "ck_chunks_text_or_data": f"{CHUNK} (:running, 2, 'text', NULL, NULL)",
    "ck_chunks_text_or_data, both": f"{CHUNK} (:running, 2, 'text', 'x', '[]')",
    # A segment
    "ck_messages_only_ended_is_compacted": "UPDATE messages SET compacted_sequence = 1 WHERE id = :running",
    "ck_messages_only_ended_is_compacted, too far": "UPDATE messages SET compacted_sequence = 2 WHERE id = :ended",
    "ck_segments_first_before_last": f"{SEGMENT} (:ended, 2, 3, 1, '')",
    "ck_segments_first_before_last, zero": f"{SEGMENT} (:ended, 2, 0, 1, '')",
    "ck_segments_format_known": f"{SEGMENT} (:ended, 2, 1, 2, '')",
    "segments.message_id, segments.last_sequence": f"{SEGMENT} (:ended, 2, 1, 1, ''), (:ended, 2, 2, 1, '')",
    "segments.message_id, segments.first_sequence": f"{SEGMENT} (:ended, 2, 1, 1, ''), (:ended, 3, 1, 1, '')",
    "FOREIGN KEY, segment": f"{SEGMENT} ('nowhere', 2, 1, 1, '')",
    # A run
    "ck_runs_status_known": "UPDATE runs SET status = 'lost', ended_at = :now, lease_expires_at = NULL",
    "ck_runs_active_has_not_ended": "UPDATE runs SET ended_at = :now WHERE id = :running_run",
    "ck_runs_active_has_not_ended, ended": "UPDATE runs SET status = 'failed', lease_expires_at = NULL",
    "ck_runs_only_running_is_leased": "UPDATE runs SET lease_expires_at = :now WHERE id = :queued_run",
    "FOREIGN KEY, run's context": f"{RUN} ('r', 'nowhere', :ended, 'failed', 1, :now, :now)",
    "FOREIGN KEY, run's message": f"{RUN} ('r', :ended_context, 'nowhere', 'failed', 1, :now, :now)",
    # A run that waits
    "FOREIGN KEY, waiting run's context": f"{WAITING} ('w', 'nowhere', :ended, :queued, 1, true, :now)",
    "FOREIGN KEY, waiting run's message": f"{WAITING} ('w', :ended_context, 'nowhere', :queued, 1, true, :now)",
    "FOREIGN KEY, waiting run's reply": f"{WAITING} ('w', :ended_context, :ended, 'nowhere', 1, true, :now)",
    # An approval
    "ck_approvals_status_known": f"{APPROVAL} :running_context, :running, false, 'maybe', NULL, :now)",
    "ck_approvals_decided_has_time": f"{APPROVAL} :running_context, :running, false, 'approved', NULL, NULL)",
    "ck_approvals_decided_has_time, open": f"{APPROVAL} :running_context, :running, true, 'pending', NULL, :now)",
    "ck_approvals_only_editable_is_edited": (f"{APPROVAL} :running_context, :running, false, 'approved', '[]', :now)"),
    "ck_approvals_only_editable_is_edited, denied": (
        f"{APPROVAL} :running_context, :running, true, 'denied', '[]', :now)"
    ),
    "FOREIGN KEY, approval's context": f"{APPROVAL} 'nowhere', :running, true, 'denied', NULL, :now)",
    "FOREIGN KEY, approval's message": f"{APPROVAL} :running_context, 'nowhere', true, 'denied', NULL, :now)",
    # A file
    "ck_files_size_positive": f"{FILE} ('f', 'alice', 'a.txt', 'text/plain', -1, 'd', :now)",
}


NAMED_OTHERWISE = {  # By PostgreSQL.
    "messages.context_id, messages.position": "uq_messages_context_id_position",
    "chunks.message_id, chunks.sequence": "pk_chunks",
    "segments.message_id, segments.last_sequence": "pk_segments",
    "segments.message_id, segments.first_sequence": "uq_segments_message_id_first_sequence",
}


@pytest.mark.scenario("runs", "Second active run")
@pytest.mark.parametrize("rule", BROKEN)
async def test_a_broken_row_is_refused(filled, rule):
    connection, ids = filled
    with pytest.raises(IntegrityError) as refusal:
        connection.execute(text(BROKEN[rule]), ids)
    named = NAMED_OTHERWISE.get(rule, rule.partition(", ")[0])
    assert rule in str(refusal.value) or re.search(named, str(refusal.value), re.IGNORECASE)


@pytest.mark.scenario("runs", "Second active run")
@pytest.mark.parametrize("first", ["queued", "running", "suspended"])
@pytest.mark.parametrize("second", ["queued", "running", "suspended"])
async def test_a_context_has_one_active_run(filled, first, second):
    connection, ids = filled
    connection.execute(text("UPDATE runs SET status = :status WHERE id = :queued_run"), {**ids, "status": first})
    with (
        pytest.raises(IntegrityError, match=r"runs\.context_id|uq_runs_one_active_per_context"),
        connection.begin_nested(),
    ):
        connection.execute(text(f"{RUN} ('r', :queued_context, :queued, '{second}', 0, :now, NULL)"), ids)
    connection.execute(text(f"{RUN} ('r', :queued_context, :queued, 'succeeded', 1, :now, :now)"), ids)


async def test_every_rule_of_the_tables_is_tried_here(store):
    named = {str(constraint.name) for table in metadata.tables.values() for constraint in table.constraints}
    checks = {name for name in named if name.startswith("ck_")}
    assert checks <= {rule.partition(",")[0] for rule in BROKEN}


async def test_the_columns_that_must_be_there_are_not_null(store, database_url):
    with beside(database_url).connect() as connection:
        for table in metadata.tables.values():
            nullable = {column["name"]: column["nullable"] for column in inspect(connection).get_columns(table.name)}
            assert nullable == {column.name: column.nullable for column in table.columns}
