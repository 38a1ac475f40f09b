"""
A producer: expires and renews certifications, and notes what it was told about each.

Its note is what an application would remember: an operation that began and has no answer
may or may not have happened; one that was answered has.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from dataclasses import asdict, dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self
from uuid import UUID

from sqlalchemy.exc import SQLAlchemyError

from tests.chaos.failpoints import watch_commits
from worker import database
from worker.certifications.transitions import CertificationManagementService
from worker.errors import SyncError
from worker.wakeup import notify

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.chaos.failpoints import Failpoints

FAR = date(2999, 12, 31)
AFTERWARDS = FAR + timedelta(days=1)
"""A day on which whatever was renewed has run out again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    """
    What to produce.

    Args:
        certifications: [certification, mentor] pairs, in the order of their turn.
        how: each once, expiring; or any of them, expiring and renewing, until ended.
        pause_seconds: between operations.
        notes: file of lines of JSON.
    """

    organization_id: str
    certifications: Sequence[tuple[str, str]]
    how: Literal["once", "shuffled"] = "shuffled"
    pause_seconds: float = 0.0
    seed: int = 0
    notes: str

    def to_json(self) -> str:
        """
        For another process.
        """
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, document: str) -> Self:
        """
        From another process.
        """
        return cls(**json.loads(document))


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """
    What an operation came to, as far as its caller knows.

    Args:
        number: of the operation; "began" and its answer share it.
        state: a "began" without another one of the number is an unknown outcome.
        version: that was saved; None if there was nothing to do.
    """

    number: int
    mentor: str
    state: Literal["began", "saved", "nothing", "failed"]
    version: int | None = None
    error: str = ""


def read_notes(folder: Path) -> list[tuple[str, Note]]:
    """
    The notes of all producers, with who made them; the last line of a killed one may be
    torn, and says nothing.
    """
    return [
        (path.stem, Note(**json.loads(line)))
        for path in sorted(folder.glob("*.notes"))
        for line in path.read_text().splitlines()
        if line.endswith("}")
    ]


def run(orders: Orders, points: Failpoints) -> None:
    """
    Produce, in this process, until the orders are carried out.
    """
    asyncio.run(_produce(orders, points))


async def _produce(orders: Orders, points: Failpoints) -> None:
    engine = database.connect(os.environ["DATABASE_URL"], application_name="producer")
    watch_commits(engine, points)
    service = CertificationManagementService(
        engine, organization_id=UUID(orders.organization_id), timezone="Europe/Oslo"
    )
    luck = random.Random(orders.seed)  # noqa: S311 (no secret)
    with Path(orders.notes).open("a", buffering=1) as notes:  # noqa: ASYNC230 (a line now and then)
        for number, (certification, mentor) in enumerate(_turns(orders, luck)):
            points.current.set(mentor)
            renewing = orders.how == "shuffled" and luck.random() < 0.5
            await _change(service, notes, points, number, certification, mentor, renewing=renewing)
            await notify(engine)
            await asyncio.sleep(orders.pause_seconds * luck.random())
    await engine.dispose()


def _turns(orders: Orders, luck: random.Random) -> Iterator[tuple[str, str]]:
    if orders.how == "once":
        yield from orders.certifications
        return
    while True:
        yield luck.choice(orders.certifications)


async def _change(
    service: CertificationManagementService,
    notes: object,
    points: Failpoints,
    number: int,
    certification: str,
    mentor: str,
    *,
    renewing: bool,
) -> None:
    def note(state: str, **more: object) -> None:
        line = {"number": number, "mentor": mentor, "state": state, **more}
        print(json.dumps(line), file=notes)  # type: ignore[call-overload]

    note("began")
    try:
        done = await (
            service.renew(UUID(certification), FAR)
            if renewing
            else service.expire(UUID(certification), today=AFTERWARDS)
        )
    except (SQLAlchemyError, OSError, TimeoutError, SyncError) as error:
        note("failed", error=type(error).__name__)
        return
    points.hit("after-commit")
    if done is None:
        note("nothing")
    else:
        note("saved", version=done.version)
