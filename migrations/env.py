"""Alembic's environment: runs on the connection that migrations.upgrade hands over, against every package's tables."""

import importlib
from importlib.util import find_spec

from alembic import context

from routing.tables import metadata

if find_spec("flywheel.tables") is not None:
    importlib.import_module("flywheel.tables")  # registers the flywheel's tables on the same metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,  # SQLite alters a table by copying it
    compare_type=True,
)
with context.begin_transaction():
    context.run_migrations()
