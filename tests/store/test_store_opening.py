"""Opening a store: the lock, the schema and its migrations, the epoch, and databases that are none of ours."""

from pathlib import Path

import pytest
from sqlalchemy import MetaData, make_url
from sqlalchemy.engine import Dialect
from sqlalchemy.schema import CreateIndex, CreateTable

from context_server.errors import DatabaseInUse, DatabaseNotSupported, SchemaMismatch, StorageBroken
from context_server.store import Store
from context_server.store.database import parse_url
from context_server.store.dialects.sqlite import FileLock, has_wal_bug
from context_server.store.maintenance import change_schema, renew_epoch
from context_server.store.migrating import newest_revision
from context_server.store.tables import metadata
from tests.databases import beside, new_database, run_beside
from tests.store.writing import OWNER, exchange


def schema_of(database_url: str) -> dict[str, set[str]]:
    """What the database holds, as the statements that would make it: constraints and indexes included."""
    engine = beside(database_url)
    found = MetaData()
    found.reflect(engine)
    return describe(found, engine.dialect)


def describe(tables: MetaData, dialect: Dialect) -> dict[str, set[str]]:
    described = {}
    for table in tables.tables.values():
        if table.name == "alembic_version":
            continue
        lines = str(CreateTable(table).compile(dialect=dialect)).splitlines()
        parts = {line.strip().rstrip(",") for line in lines if line.strip(" )\t")}
        parts |= {str(CreateIndex(index).compile(dialect=dialect)) for index in table.indexes}
        described[table.name] = parts
    return described


def content_of(database_url: str) -> object:
    """What must not have changed: every byte of a file, every row of a server's database."""
    url = make_url(database_url)
    if url.get_backend_name() == "sqlite":
        return Path(url.database or "").read_bytes()
    return [run_beside(database_url, f"SELECT * FROM {name} ORDER BY 1") for name in schema_of(database_url)]


@pytest.fixture
def other_url(database_url, tmp_path):
    """Another database of the same kind, empty."""
    (tmp_path / "other").mkdir()
    with new_database(make_url(database_url).get_backend_name(), tmp_path / "other") as url:
        yield url


pytestmark = pytest.mark.new_database

# The schema


@pytest.mark.scenario("operations", "Migrate up and down")
async def test_migrated_up_down_and_up_the_schema_is_that_of_the_tables(database_url, other_url):
    newest = newest_revision()
    assert await change_schema(database_url, "head", down=False) == (None, newest)
    first = schema_of(database_url)
    assert await change_schema(database_url, "base", down=True) == (newest, None)
    assert schema_of(database_url) == {}
    assert await change_schema(database_url, "head", down=False) == (None, newest)
    assert schema_of(database_url) == first

    metadata.create_all(beside(other_url))
    assert schema_of(other_url) == first

    async with Store.open(database_url, migrate=False) as store:
        await exchange(store, "Hello", "one")


async def test_migrating_what_is_newest_changes_nothing(database_url):
    async with Store.open(database_url) as store:
        writer = await exchange(store, "Hello", "one")
    newest = newest_revision()
    assert await change_schema(database_url, "head", down=False) == (newest, newest)
    async with Store.open(database_url) as store:
        assert (await store.message(OWNER, writer.run.context_id, writer.run.message_id)).content == "one"


@pytest.mark.parametrize(("target", "down"), [("9999", False), ("9999", True), ("-5", True)])
async def test_a_revision_that_does_not_exist_is_refused(database_url, target, down):
    async with Store.open(database_url):
        pass
    with pytest.raises(SchemaMismatch, match="cannot migrate to"):
        await change_schema(database_url, target, down=down)


@pytest.mark.scenario("operations", "Newer schema refused")
@pytest.mark.parametrize("migrate", [True, False])
async def test_a_newer_schema_is_refused_and_left_alone(database_url, backdate_schema, migrate):
    async with Store.open(database_url):
        pass
    backdate_schema("9999")
    before = content_of(database_url)

    with pytest.raises(SchemaMismatch, match="revision 9999, which this version does not know"):
        async with Store.open(database_url, migrate=migrate):
            pass
    for attempt in (change_schema(database_url, "head", down=False), renew_epoch(database_url)):
        with pytest.raises(SchemaMismatch, match="9999"):
            await attempt

    assert content_of(database_url) == before


async def test_an_older_schema_is_refused_unless_it_may_be_migrated(database_url):
    with pytest.raises(SchemaMismatch, match="at schema revision none, this version needs"):
        async with Store.open(database_url, migrate=False):
            pass
    async with Store.open(database_url):
        pass


@pytest.fixture
def backdate_schema(database_url):
    """Has the database say that it is at another revision."""

    def set_revision(revision: str) -> None:
        run_beside(database_url, f"UPDATE alembic_version SET version_num = '{revision}'")

    return set_revision


# The epoch


@pytest.mark.scenario("resume", "Epoch over a restart")
async def test_the_epoch_is_that_of_the_databases_life(database_url, other_url):
    async with Store.open(database_url) as store:
        first = store.epoch
        context = await store.create_context(OWNER)
        assert context.epoch == first
    async with Store.open(database_url) as store:
        assert store.epoch == first
    renewed = await renew_epoch(database_url)
    async with Store.open(database_url) as store:
        assert store.epoch == renewed != first
        assert (await store.context(OWNER, context.id)).epoch == renewed
    async with Store.open(other_url) as store:
        assert store.epoch not in (first, renewed)


# The lock


@pytest.mark.only("sqlite")
@pytest.mark.scenario("operations", "Second server refused")
async def test_a_database_has_one_server(database_url):
    async with Store.open(database_url) as store:
        with pytest.raises(DatabaseInUse, match=r"served by another process \(pid \d+\)"):
            async with Store.open(database_url):
                pass
        for attempt in (change_schema(database_url, "base", down=True), renew_epoch(database_url)):
            with pytest.raises(DatabaseInUse):
                await attempt
        await exchange(store, "Hello", "one")
    async with Store.open(database_url):
        pass


async def test_a_lock_whose_holder_wrote_no_number(tmp_path):
    url = parse_url(f"sqlite:///{tmp_path / 'x.db'}")
    with FileLock(url):
        (tmp_path / "x.db.lock").write_text("")
        with pytest.raises(DatabaseInUse, match="pid unknown"):
            FileLock(url).__enter__()


def test_a_lock_that_was_not_taken_can_be_left(tmp_path):
    FileLock(parse_url(f"sqlite:///{tmp_path / 'x.db'}")).__exit__()
    assert list(tmp_path.iterdir()) == []


async def test_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(DatabaseNotSupported, match="cannot be opened: No such file or directory"):
        async with Store.open(f"sqlite:///{tmp_path / 'nowhere' / 'x.db'}"):
            pass


async def test_a_file_that_is_no_database(tmp_path):
    (tmp_path / "x.db").write_bytes(b"This is not a database at all, and it is long enough. " * 50)
    with pytest.raises(StorageBroken, match="SQLITE_NOTADB"):
        async with Store.open(f"sqlite:///{tmp_path / 'x.db'}"):
            pass


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("", "neither a path nor a SQLAlchemy URL"),
        ("not a url", "neither a path nor a SQLAlchemy URL"),
        ("mysql://localhost/x", "'mysql' is not supported; use the path of a SQLite file, or postgresql"),
        ("postgresql+psycopg://localhost/x", r"'postgresql\+psycopg' is not supported; use postgresql\+asyncpg"),
        ("sqlite://", "in-memory"),
        ("sqlite:///:memory:", "in-memory"),
    ],
)
def test_a_database_that_cannot_be_used(url, complaint):
    with pytest.raises(DatabaseNotSupported, match=complaint):
        parse_url(url)


# What it says of itself


@pytest.mark.scenario("operations", "Health and readiness")
async def test_readiness_names_the_database(store):
    ready = await store.readiness()
    assert (ready.revision, ready.failure) == (newest_revision(), None)
    assert ready.version.count(".") >= 1
    assert (ready.database, ready.sqlite_has_wal_bug) in (("sqlite", has_wal_bug()), ("postgresql", None))


@pytest.mark.parametrize(
    ("version", "has_it"),
    [
        ((3, 6, 23), False),
        ((3, 7, 0), True),
        ((3, 40, 1), True),
        ((3, 44, 5), True),
        ((3, 44, 6), False),
        ((3, 45, 0), True),
        ((3, 50, 6), True),
        ((3, 50, 7), False),
        ((3, 51, 0), True),
        ((3, 51, 2), True),
        ((3, 51, 3), False),
        ((4, 0, 0), False),
    ],
)
def test_versions_with_the_wal_bug(version, has_it):
    assert has_wal_bug(version) is has_it


@pytest.mark.only("sqlite")
@pytest.mark.scenario("content-log", "Signalled content is committed")
async def test_the_writer_syncs_fully_in_wal_mode_and_readers_cannot_write(store, rows, pragmas):
    assert pragmas == {
        "writer": {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "query_only": 0, "trusted_schema": 0},
        "reader": {"journal_mode": "wal", "query_only": 1, "trusted_schema": 0, "wal_autocheckpoint": 0},
    }


@pytest.fixture
async def pragmas(store):
    """The settings of the store's own connections."""
    names = {
        "writer": ("journal_mode", "synchronous", "foreign_keys", "query_only", "trusted_schema"),
        "reader": ("journal_mode", "query_only", "trusted_schema", "wal_autocheckpoint"),
    }
    run = {"writer": store._write, "reader": store._read}
    return {
        role: {
            name: await run[role](lambda connection, name=name: connection.exec_driver_sql(f"PRAGMA {name}").scalar())
            for name in names[role]
        }
        for role in names
    }
