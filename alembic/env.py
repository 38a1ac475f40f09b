"""
How Alembic reaches the database, and which tables it may think about.

Only our own tables are compared: whatever else lives in the database, and the three tables
that may have been adopted, is left out, so autogenerate never proposes to drop it.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from alembic import context, util
from sqlalchemy import NullPool, create_engine, text
from sqlalchemy.exc import DBAPIError, OperationalError

from outbox.tables import SCHEMA
from worker.bootstrap import migration_url
from worker.database import NO_ANSWER, no_entry
from worker.errors import SettingsError
from worker.tables import ADOPTABLE, MARK, OWNED, metadata

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Connection

DAY_SECONDS = 86_400

LOCK_SECONDS = 5.0
"""A migration that waits longer for a lock would make everybody behind it wait too."""

STATEMENT_SECONDS = 60.0
"""One that runs longer holds its locks for as long; `-x statement_seconds=N` allows it more."""

DEADLOCK = "40P01"
ATTEMPTS = 3
"""A worker's transaction takes tables in an order of its own; whoever is refused begins again."""


def run() -> None:
    """
    Migrate in one transaction; with `--sql`, print the statements instead.
    """
    if context.is_offline_mode():
        raise util.CommandError(
            "The migrations look at the database to see which tables exist, so --sql is not "
            "supported. Run them against a copy instead."
        )
    timeouts = _timeouts()
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
    except OperationalError as error:
        why = no_entry(error) or NO_ANSWER
        raise util.CommandError(f"The database at {url.host or 'localhost'} {why}.") from None
    # One transaction for all of it: an upgrade that is refused leaves nothing behind.
    with connecting as connection, _said_plainly():
        for last in (*[False] * (ATTEMPTS - 1), True):
            try:
                with connection.begin():
                    for name, seconds in timeouts.items():
                        connection.execute(text(f"SET LOCAL {name} = '{seconds:.0f}s'"))
                    connection.execute(text(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}"))
                    _migrate(connection)
                break
            except OperationalError as error:
                if last or _sqlstate(error) != DEADLOCK:
                    raise


def _timeouts() -> dict[str, float]:
    """
    Seconds, by the setting of the transaction.
    """
    given = context.get_x_argument(as_dictionary=True)
    wanted = given.get("statement_seconds", STATEMENT_SECONDS)
    try:
        seconds = float(wanted)
    except (TypeError, ValueError):
        seconds = 0.0
    if not 1 <= seconds <= DAY_SECONDS:
        raise util.CommandError(
            f"-x statement_seconds={wanted}: write a number of seconds from 1 to {DAY_SECONDS}."
        )
    return {"lock_timeout": LOCK_SECONDS, "statement_timeout": seconds}


@contextmanager
def _said_plainly() -> Iterator[None]:
    """
    A migration that was in the way, or took too long, is a sentence and not a trace.
    """
    try:
        yield
    except DBAPIError as error:
        match _sqlstate(error):
            case "55P03" | "40P01":
                raise util.CommandError(
                    "Somebody held a table that has to be changed, so nothing was "
                    "migrated. Try again, when no long transaction is running."
                ) from None
            case "57014":
                raise util.CommandError(
                    "A statement took longer than it may, so nothing was migrated. Give it more "
                    "at a quiet time: alembic -x statement_seconds=600 upgrade head"
                ) from None
            case "42501":
                raise util.CommandError(
                    f"This user may not do all that a migration does ({_reason(error)}), so "
                    "nothing was migrated. Migrate as the owner of the tables."
                ) from None
        raise


def _sqlstate(error: DBAPIError) -> str | None:
    return getattr(error.orig, "sqlstate", None)


def _reason(error: DBAPIError) -> str:
    return str(error.orig.diag.message_primary)


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
