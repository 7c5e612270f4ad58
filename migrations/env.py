"""Alembic's entry: runs on the connection that ``store/migrating.py`` hands over, in its transaction."""

from alembic import context

from context_server.store.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,
    transactional_ddl=True,
)
# No begin_transaction() here: the caller's transaction holds the whole migration, so that it is all or nothing.
context.run_migrations()
