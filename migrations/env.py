"""Alembic's entry: runs the migrations on the connection that loractl.common.store.database hands over."""

from alembic import context

from loractl.common.store.tables import conditioned

connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=conditioned(connection.dialect.name),
    render_as_batch=connection.dialect.name == "sqlite",
)
context.run_migrations()
