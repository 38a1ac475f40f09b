"""
What a person does, by page or by API: try again, say that it is done by hand, renew.

Each action asks as its caller, so the database decides what it can touch, and is written down in
its own transaction; a refusal is written down too.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from datetime import date
from typing import TYPE_CHECKING, Any, Literal
from uuid import UUID

import structlog
from sqlalchemy import text

from worker.certifications.confirmations import wait_for
from worker.certifications.transitions import CertificationManagementService
from worker.coordinator import audit, callers, idempotency, retry
from worker.database import reading, transaction
from worker.errors import NotAllowedError, UnknownFailureError, UsageError
from worker.wakeup import Notifier

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    from worker.certifications.transitions import Transition
    from worker.coordinator.audit import Action
    from worker.coordinator.retry import Answer, Retried

log = structlog.get_logger(__name__)

LONGEST_NOTE = 1000

Portal = Literal["confirmed", "pending", "failed"]
"""Whether the portal follows: it does, it will, or a person is needed."""


class NoteNeededError(UsageError):
    """
    What was done by hand has to be said.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Handled:
    """
    What "I have done it myself" came to.

    Args:
        done: False if the failure was in order already.
    """

    failure_id: UUID
    mentor_id: UUID
    done: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Renewed:
    """
    A renewal that is saved and stands, and whether the portal follows.

    Args:
        error_code: why the last attempt failed, if one did.
        repeated: it was an earlier request, sent again, that did it.
    """

    certification_id: UUID
    mentor_id: UUID
    expires_on: date
    visible: bool
    version: int
    portal: Portal
    error_code: str | None
    repeated: bool


HANDLE = text("""
UPDATE public.dynamics_sync_failures
   SET resolved_at = now(), resolution = 'manual', resolved_by = :name
 WHERE organization_id = :organization_id AND id = :failure_id AND resolved_at IS NULL
RETURNING mentor_id
""")

WHOSE = text("""
SELECT mentor_id FROM public.dynamics_sync_failures
 WHERE organization_id = :organization_id AND id = :failure_id
""")


class Actions:
    """
    The actions, on behalf of whoever asks.

    Args:
        engine: the owner's; only its transactions as the caller are used.
        timezone: of the organisation.
    """

    def __init__(self, engine: AsyncEngine, *, timezone: str) -> None:
        self._engine = callers.bound(engine, writing=True)
        self._timezone = timezone
        self._notify = Notifier(self._engine)
        self._services: dict[UUID, CertificationManagementService] = {}

    async def aclose(self) -> None:
        """
        Wake the workers for what was done last.
        """
        await self._notify.aclose()
        for service in self._services.values():
            await service.aclose()

    async def retry(self, failure_ids: Sequence[UUID]) -> Retried:
        """
        Try these failures again.

        Raises:
            NotAllowedError, UnknownFailureError: nothing was changed.
        """
        async with self._written_down("retry", failure_ids):
            caller = callers.require_coordinator()
            done = await retry.retry(
                self._engine,
                failure_ids,
                organization_id=caller.organization_id,
                actor=caller.name,
                record=_record_retry,
            )
        self._notify()
        return done

    async def retry_all(self) -> Retried:
        """
        Try every open failure again.

        Raises:
            NotAllowedError: nothing was changed.
        """
        async with self._written_down("retry", []):
            caller = callers.require_coordinator()
            done = await retry.retry_all(
                self._engine,
                organization_id=caller.organization_id,
                actor=caller.name,
                record=_record_retry,
            )
        self._notify()
        return done

    async def handle(self, failure_id: UUID, *, note: str) -> Handled:
        """
        A person did in Dynamics by hand what did not get through.

        Args:
            note: what was done; 1 to 1,000 characters.

        Raises:
            NotAllowedError, UnknownFailureError, NoteNeededError: nothing was changed.
        """
        note = _checked(note)
        async with self._written_down("handle", [failure_id]):
            caller = callers.require_coordinator()
            which = {"organization_id": caller.organization_id, "failure_id": failure_id}
            async with transaction(self._engine) as connection:
                handled = await connection.scalar(HANDLE, which | {"name": caller.name})
                mentor_id = handled or await connection.scalar(WHOSE, which)
                if mentor_id is None:
                    raise UnknownFailureError(f"There is no such failure: {failure_id}.")
                outcome = "handled" if handled else "resolved"
                deed = audit.Deed(target=failure_id, mentor_id=mentor_id, outcome=outcome)
                await audit.add(connection, "handle", [deed], note=note)
        return Handled(failure_id=failure_id, mentor_id=mentor_id, done=bool(handled))

    async def renew(
        self,
        certification_id: UUID,
        until: date,
        *,
        wait_seconds: float = 0,
        key: str | None = None,
    ) -> Renewed:
        """
        Renew a certification; then wait, bounded, for the portal.

        Args:
            until: the new last valid day.
            wait_seconds: up to 15.
            key: of a request that may come again; the same key renews once.

        Raises:
            NotAllowedError, UsageError, HeldError: nothing was changed.
        """
        request = f"renew {certification_id} {until}"
        async with self._written_down("renew", [certification_id]):
            callers.require_coordinator()
            saved, repeated = await self._renew_once(certification_id, until, request, key)
        progress, code = await wait_for(
            self._engine,
            mentor_id=saved["mentor_id"],
            version=saved["version"],
            seconds=wait_seconds,
        )
        return Renewed(
            **saved,
            portal="confirmed" if progress == "delivered" else progress,
            error_code=code,
            repeated=repeated,
        )

    async def _renew_once(
        self, certification_id: UUID, until: date, request: str, key: str | None
    ) -> tuple[dict[str, Any], bool]:
        saved: dict[str, Any] = {}

        async def record(connection: AsyncConnection, done: Transition) -> None:
            saved.update(_saved(done, until))
            if key is not None:
                await idempotency.remember(connection, key, request, saved)
            deed = audit.Deed(
                target=certification_id, mentor_id=done.mentor_id, outcome=f"until {until}"
            )
            await audit.add(connection, "renew", [deed])

        if key is not None and (known := await self._known(key, request)):
            return known, True
        try:
            await self._service().renew(certification_id, until, record=record)
        except idempotency.RepeatedError:
            known = await self._known(key or "", request)
            if known is None:  # forgotten in the meantime: it is old
                raise UsageError("This request was answered long ago.") from None
            return known, True
        return saved, False

    async def _known(self, key: str, request: str) -> dict[str, Any] | None:
        async with reading(self._engine) as connection:
            known = await idempotency.find(connection, key, request)
        if known is None:
            return None
        return known | {
            "certification_id": UUID(known["certification_id"]),
            "mentor_id": UUID(known["mentor_id"]),
            "expires_on": date.fromisoformat(known["expires_on"]),
        }

    def _service(self) -> CertificationManagementService:
        organization_id = callers.current().organization_id
        if organization_id not in self._services:
            self._services[organization_id] = CertificationManagementService(
                self._engine, organization_id=organization_id, timezone=self._timezone
            )
        return self._services[organization_id]

    @asynccontextmanager
    async def _written_down(self, action: Action, targets: Sequence[UUID]) -> AsyncIterator[None]:
        """
        A refusal is written down, in a transaction of its own: the action's is no more.
        """
        try:
            yield
        except (NotAllowedError, UsageError) as error:
            outcome = f"refused: {type(error).__name__}"
            deeds = [
                audit.Deed(target=target, mentor_id=None, outcome=outcome)
                for target in targets or (None,)
            ]
            async with transaction(self._engine) as connection:
                await audit.add(connection, action, deeds)
            raise


async def _record_retry(connection: AsyncConnection, answers: Sequence[Answer]) -> None:
    await audit.add(
        connection,
        "retry",
        [
            audit.Deed(target=one.failure_id, mentor_id=one.mentor_id, outcome=one.outcome)
            for one in answers
        ],
    )


def _saved(done: Transition, until: date) -> dict[str, Any]:
    known = asdict(done)
    return {
        name: known[name] for name in ("certification_id", "mentor_id", "visible", "version")
    } | {"expires_on": until}


def _checked(note: str) -> str:
    note = note.strip()
    if not note:
        raise NoteNeededError("Say in a note what you did in Dynamics.")
    if len(note) > LONGEST_NOTE or not all(one.isprintable() or one.isspace() for one in note):
        raise NoteNeededError(f"A note is text of at most {LONGEST_NOTE} characters.")
    return note
