"""
Who did what: a row for each action and each thing it was about, also where it was refused.

Written in the transaction of the action itself. Rows are only ever added: the role that adds them
may not change or delete any, and adds them in its own name alone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sqlalchemy import text

from worker.coordinator import callers

if TYPE_CHECKING:
    from collections.abc import Iterable
    from uuid import UUID

    from sqlalchemy.ext.asyncio import AsyncConnection

Action = Literal["retry", "handle", "renew"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Deed:
    """
    What an action came to for one thing.

    Args:
        target: the failure or the certification; None where there was none.
        outcome: one word of the action, or why it was refused.
    """

    target: UUID | None
    mentor_id: UUID | None
    outcome: str


ADD = text("""
INSERT INTO outbox.audit (organization_id, subject, name, action, target, mentor_id, outcome, note)
SELECT :organization_id, :subject, :name, :action, target, mentor_id, outcome, :note
  FROM jsonb_to_recordset(CAST(:deeds AS jsonb))
       AS deed (target uuid, mentor_id uuid, outcome text)
""")


async def add(
    connection: AsyncConnection, action: Action, deeds: Iterable[Deed], *, note: str = ""
) -> None:
    """
    Write down what whoever asks has done, in the caller's transaction.
    """
    caller = callers.current()
    await connection.execute(
        ADD,
        {
            "organization_id": caller.organization_id,
            "subject": caller.subject,
            "name": caller.name,
            "action": action,
            "note": note,
            "deeds": json.dumps(
                [
                    {
                        "target": str(one.target) if one.target else None,
                        "mentor_id": str(one.mentor_id) if one.mentor_id else None,
                        "outcome": one.outcome,
                    }
                    for one in deeds
                ]
            ),
        },
    )
