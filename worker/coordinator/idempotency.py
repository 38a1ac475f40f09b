"""
A request that an app may send again, because it never heard the answer.

The key is remembered in the transaction of what was done, so either both are there or neither. Of
two requests at once one waits for the other's transaction, and then finds its key taken.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from sqlalchemy import text

from worker.coordinator import callers
from worker.errors import UsageError

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

KEEP_HOURS = 48
"""An app that was offline for a weekend asks again on its own account."""

LONGEST_KEY = 200


class KeyReusedError(UsageError):
    """
    The key belongs to another request.
    """


class RepeatedError(Exception):
    """
    Somebody else did the same meanwhile; rolls back what was done.
    """


FIND = text("""
SELECT request_hash, answer FROM outbox.idempotency
 WHERE organization_id = :organization_id AND subject = :subject AND key = :key
""")

REMEMBER = text("""
INSERT INTO outbox.idempotency (organization_id, subject, key, request_hash, answer)
VALUES (:organization_id, :subject, :key, :request_hash, CAST(:answer AS jsonb))
    ON CONFLICT DO NOTHING
""")

FORGET = text("""
DELETE FROM outbox.idempotency
 WHERE ctid = ANY (ARRAY (SELECT ctid FROM outbox.idempotency
                           WHERE created_at < now() - make_interval(hours => :hours)
                           LIMIT :limit))
""")


async def find(connection: AsyncConnection, key: str, request: str) -> dict[str, Any] | None:
    """
    What was answered to this request of this caller; None if it is new.

    Raises:
        KeyReusedError: to another request.
    """
    row = (await connection.execute(FIND, _whose(key))).one_or_none()
    if row is None:
        return None
    if bytes(row.request_hash) != _hash(request):
        raise KeyReusedError("This Idempotency-Key was sent with another request before.")
    answer: dict[str, Any] = row.answer
    return answer


async def remember(
    connection: AsyncConnection, key: str, request: str, answer: dict[str, Any]
) -> None:
    """
    Remember an answer, in the transaction of what it tells.

    Raises:
        RepeatedError: the key was taken meanwhile.
    """
    added = await connection.execute(
        REMEMBER,
        _whose(key) | {"request_hash": _hash(request), "answer": json.dumps(answer, default=str)},
    )
    if not added.rowcount:
        raise RepeatedError


async def forget(connection: AsyncConnection, *, limit: int) -> int:
    """
    Remove what nobody asks for any more; returns how much.
    """
    return (await connection.execute(FORGET, {"hours": KEEP_HOURS, "limit": limit})).rowcount


def _whose(key: str) -> dict[str, Any]:
    caller = callers.current()
    return {
        "organization_id": caller.organization_id,
        "subject": caller.subject,
        "key": key,
    }


def _hash(request: str) -> bytes:
    return hashlib.sha256(request.encode()).digest()
