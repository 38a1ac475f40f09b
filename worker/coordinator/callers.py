"""
Whoever asks, and what the database shows them.

Each transaction of a bound engine runs as the role `authenticated` with the caller's claims, so
that row-level security keeps organisations apart, whatever our own statements say:

    SET LOCAL ROLE authenticated        set_config('role', …, true)
    the caller's claims                 set_config('request.jwt.claims', …, true)
    may it write?                       transaction_read_only, and the mark `hlf.transition`

The same role and the same claims as in a request through Supabase's own API. That one cannot set
the mark, so the tables stay closed to writes which go past the transitions.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sqlalchemy import event, text
from structlog.contextvars import bound_contextvars

from worker.database import WHOLE_TRANSACTIONS, reading
from worker.errors import NotAllowedError, SchemaError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from uuid import UUID

    from sqlalchemy import Connection
    from sqlalchemy.ext.asyncio import AsyncEngine

Role = Literal["viewer", "coordinator"]

DATABASE_ROLE = "authenticated"


class NoCallerError(RuntimeError):
    """
    A bound engine was used where nobody is known to ask.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """
    A person or an app on behalf of one, as they were authenticated.

    Args:
        subject: the identity provider's name for them; never changes.
        name: for people.
        organization_id: whose mentors they see.
        role: a viewer looks, a coordinator also acts.
    """

    subject: str
    name: str
    organization_id: UUID
    role: Role

    def claims(self) -> str:
        """
        What the database is told, in the shape of Supabase's tokens.
        """
        return json.dumps(
            {
                "sub": self.subject,
                "role": DATABASE_ROLE,
                "app_metadata": {
                    "organization_id": str(self.organization_id),
                    "hlf_role": self.role,
                },
            }
        )


_caller: ContextVar[Caller | None] = ContextVar("caller", default=None)


@contextmanager
def asking(caller: Caller) -> Iterator[None]:
    """
    Whatever asks the database in here asks on this caller's behalf.
    """
    token = _caller.set(caller)
    try:
        with bound_contextvars(organization_id=str(caller.organization_id)):
            yield
    finally:
        _caller.reset(token)


def current() -> Caller:
    """
    Whoever asks.

    Raises:
        NoCallerError: nobody does.
    """
    caller = _caller.get()
    if caller is None:
        raise NoCallerError("Nobody is known to ask.")
    return caller


def require_coordinator() -> Caller:
    """
    Whoever asks, if they may act.

    Raises:
        NotAllowedError: they may only look.
    """
    caller = current()
    if caller.role != "coordinator":
        raise NotAllowedError("You may look, but not change anything. Ask a coordinator.")
    return caller


BIND = text("""
SELECT set_config('role', :role, true),
       set_config('request.jwt.claims', :claims, true),
       set_config('transaction_read_only', :read_only, true),
       set_config('hlf.transition', :transition, true)
""")


def bound(engine: AsyncEngine, *, writing: bool = False) -> AsyncEngine:
    """
    The same connections, but each transaction is the caller's own.

    Args:
        writing: for the actions of a coordinator; otherwise nothing can be changed.
    """
    own = engine.execution_options(**{WHOLE_TRANSACTIONS: True})
    event.listen(own.sync_engine, "begin", _begin_writing if writing else _begin_reading)
    return own


def _begin_reading(connection: Connection) -> None:
    _begin(connection, writing=False)


def _begin_writing(connection: Connection) -> None:
    _begin(connection, writing=True)


def _begin(connection: Connection, *, writing: bool) -> None:
    caller = current()
    if connection.get_execution_options().get("isolation_level") == "AUTOCOMMIT":
        raise NoCallerError("Without a transaction nobody's claims would hold.")
    connection.execute(
        BIND,
        {
            "role": DATABASE_ROLE,
            "claims": caller.claims(),
            "read_only": "off" if writing else "on",
            "transition": "on" if writing else "off",
        },
    )


LEFT_OPEN = text("""
SELECT relname
  FROM pg_class
 WHERE oid IN (CAST('public.organizations' AS regclass), CAST('public.mentors' AS regclass),
               CAST('public.certifications' AS regclass))
   AND NOT (relrowsecurity AND has_table_privilege(:role, oid, 'SELECT'))
 ORDER BY relname
""")


async def require_rows_kept_apart(engine: AsyncEngine) -> None:
    """
    Check that the database does what pages rely on, also with tables that we adopted.

    Raises:
        SchemaError: naming what is missing.
    """
    async with reading(engine) as connection:
        tables = (await connection.scalars(LEFT_OPEN, {"role": DATABASE_ROLE})).all()
    if tables:
        raise SchemaError(
            f"The dashboard needs row-level security on {', '.join(tables)}, with policies that "
            f"let `{DATABASE_ROLE}` read its own organisation: see the README."
        )
