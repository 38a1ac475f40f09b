"""
Who is logged in: the browser holds a random token, we its hash and whose it is.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from typing import TYPE_CHECKING, Any
from uuid import UUID

from sqlalchemy import text

from worker.coordinator.callers import Caller
from worker.database import reading

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

LONGEST_SECONDS = 12 * 3600.0
"""A session ends then, whatever happens: a working day."""

IDLE_SECONDS = 3600.0
"""It ends sooner when nobody has a page open."""

NOTED_SECONDS = 60.0
"""How exactly it is known when somebody was here last."""

OPEN = text("""
INSERT INTO outbox.web_sessions (token_hash, claims, expires_at)
VALUES (:token_hash, CAST(:claims AS jsonb), now() + make_interval(secs => :seconds))
""")

FIND = text("""
SELECT claims, seen_at < now() - make_interval(secs => :noted) AS stale
  FROM outbox.web_sessions
 WHERE token_hash = :token_hash
   AND expires_at > now()
   AND seen_at > now() - make_interval(secs => :idle)
""")

SEEN = text("UPDATE outbox.web_sessions SET seen_at = now() WHERE token_hash = :token_hash")

CLOSE = text("DELETE FROM outbox.web_sessions WHERE token_hash = :token_hash")

FORGET = text("""
DELETE FROM outbox.web_sessions
 WHERE token_hash = ANY (ARRAY (SELECT token_hash FROM outbox.web_sessions
                                 WHERE expires_at < now() LIMIT :limit))
""")


class Sessions:
    """
    The sessions, in the database: a restart logs nobody out.

    Args:
        engine: the owner's; nobody else may see this table.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def open(self, caller: Caller) -> str:
        """
        Begin a session; returns the new token.
        """
        token = secrets.token_urlsafe(32)
        claims = {
            "subject": caller.subject,
            "name": caller.name,
            "organization_id": str(caller.organization_id),
            "role": caller.role,
        }
        async with self._engine.begin() as connection:
            await connection.execute(
                OPEN,
                {
                    "token_hash": _hash(token),
                    "claims": json.dumps(claims),
                    "seconds": LONGEST_SECONDS,
                },
            )
        return token

    async def caller(self, token: str) -> Caller | None:
        """
        Whose session it is, if it has not ended.
        """
        async with reading(self._engine) as connection:
            row = (
                await connection.execute(
                    FIND,
                    {"token_hash": _hash(token), "idle": IDLE_SECONDS, "noted": NOTED_SECONDS},
                )
            ).one_or_none()
            if row is None:
                return None
            if row.stale:
                await connection.execute(SEEN, {"token_hash": _hash(token)})
        claims: dict[str, Any] = row.claims
        return Caller(**claims | {"organization_id": UUID(claims["organization_id"])})

    async def close(self, token: str) -> None:
        """
        End a session.
        """
        async with self._engine.begin() as connection:
            await connection.execute(CLOSE, {"token_hash": _hash(token)})


async def forget(connection: AsyncConnection, *, limit: int) -> int:
    """
    Remove sessions that ended by themselves; returns how many.
    """
    return (await connection.execute(FORGET, {"limit": limit})).rowcount


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()
