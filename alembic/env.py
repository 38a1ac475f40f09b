"""
How Alembic reaches the database, and which tables it may think about.

Only our own tables are compared: whatever else lives in the database, and the three tables
that may have been adopted, is left out, so autogenerate never proposes to drop it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from alembic import context, util
from sqlalchemy import NullPool, create_engine, text
from sqlalchemy.exc import OperationalError

from outbox.tables import SCHEMA
from worker.bootstrap import migration_url
from worker.errors import SettingsError
from worker.tables import ADOPTABLE, MARK, OWNED, metadata

if TYPE_CHECKING:
    from sqlalchemy import Connection

LOCK_TIMEOUT = "5s"
"""A migration that waits longer for a lock would make everybody behind it wait too."""


def run() -> None:
    """
    Migrate in one transaction; with `--sql`, print the statements instead.
    """
    if context.is_offline_mode():
        raise util.CommandError(
            "The migrations look at the database to see which tables exist, so --sql is not "
            "supported. Run them against a copy instead."
        )
    try:
        url = migration_url()
    except SettingsError as error:
        raise util.CommandError(str(error)) from None
    engine = create_engine(
        url,
        poolclass=NullPool,
        # Every name here has its schema; one that is visible without would be compared twice.
        connect_args={"options": "-csearch_path=pg_catalog", "prepare_threshold": None},
    )
    try:
        connecting = engine.connect()
    except OperationalError:
        raise util.CommandError(
            f"The database at {url.host or 'localhost'} does not answer: check DATABASE_URL, and "
            "that the server runs and lets this user in."
        ) from None
    # One transaction for all of it: an upgrade that is refused leaves nothing behind.
    with connecting as connection, connection.begin():
        connection.execute(text(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'"))
        connection.execute(text(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}"))
        _migrate(connection)


def _migrate(connection: Connection) -> None:
    ours = {(table.schema, table.name) for table in OWNED} | _made_by_us(connection)

    def include_name(name: str | None, type_: str, parents: dict[str, str | None]) -> bool:
        if type_ == "schema":
            return name in {"public", SCHEMA}
        if type_ == "table":
            return (parents["schema_name"], name) in ours
        return True

    def include_object(
        thing: object, name: str | None, type_: str, _reflected: object, _compared: object
    ) -> bool:
        return type_ != "table" or (getattr(thing, "schema", None), name) in ours

    context.configure(
        connection=connection,
        target_metadata=metadata,
        include_schemas=True,
        include_name=include_name,
        include_object=include_object,
        version_table="alembic_version",
        version_table_schema=SCHEMA,
        compare_server_default=True,
        transaction_per_migration=False,
    )
    with context.begin_transaction():
        context.run_migrations()


def _made_by_us(connection: Connection) -> set[tuple[str | None, str]]:
    """
    Which of the adoptable tables are ours after all.
    """
    found = connection.execute(
        text(
            "SELECT relname FROM pg_class WHERE relnamespace = CAST('public' AS regnamespace)"
            " AND obj_description(oid, 'pg_class') = :mark"
        ),
        {"mark": MARK},
    )
    marked = set(found.scalars())
    return {(table.schema, table.name) for table in ADOPTABLE if table.name in marked}


run()
