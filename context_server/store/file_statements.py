"""The SQL statements about files, named, as in ``statements``; each is scoped by owner, but for that of the sweep."""

from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy import bindparam, delete, insert, select, tuple_

from context_server.store.statements import Bound
from context_server.store.tables import files

_OF_OWNER = files.c.owner == bindparam("key_owner")

_INSERT_FILE = insert(files)
_SELECT_FILE = select(files).where(files.c.id == bindparam("key_id"), _OF_OWNER)
_SELECT_FILES = (
    select(files).where(_OF_OWNER).order_by(files.c.created_at.desc(), files.c.id.desc()).limit(bindparam("rows"))
)
_SELECT_FILES_BEFORE = _SELECT_FILES.where(
    tuple_(files.c.created_at, files.c.id) < tuple_(bindparam("before_at"), bindparam("before_id"))
)
_SELECT_NAMED_FILES = select(files).where(files.c.id.in_(bindparam("key_ids", expanding=True)), _OF_OWNER)
_SELECT_KNOWN_IDS = select(files.c.id).where(files.c.id.in_(bindparam("key_ids", expanding=True)))
_DELETE_FILE = delete(files).where(files.c.id == bindparam("key_id"), _OF_OWNER)


def insert_file(values: Mapping[str, Any]) -> Bound:
    """A new file."""
    return _INSERT_FILE, dict(values)


def select_file(owner: str, file_id: str) -> Bound:
    """One file of an owner, by primary key."""
    return _SELECT_FILE, {"key_id": file_id, "key_owner": owner}


def select_files(owner: str, before: tuple[int, str] | None, limit: int) -> Bound:
    """An owner's files, newest first, after ``before = (created_at, id)``; index owner, created_at."""
    parameters = {"key_owner": owner, "rows": limit}
    if before is None:
        return _SELECT_FILES, parameters
    return _SELECT_FILES_BEFORE, {**parameters, "before_at": before[0], "before_id": before[1]}


def select_named_files(owner: str, file_ids: Iterable[str]) -> Bound:
    """Some files of an owner, by primary keys."""
    return _SELECT_NAMED_FILES, {"key_ids": list(file_ids), "key_owner": owner}


def select_known_ids(file_ids: Iterable[str]) -> Bound:
    """Which of these ids are of files, whoever's, by primary keys."""
    return _SELECT_KNOWN_IDS, {"key_ids": list(file_ids)}


def delete_file(owner: str, file_id: str) -> Bound:
    """Deletes a file of an owner, by primary key."""
    return _DELETE_FILE, {"key_id": file_id, "key_owner": owner}
