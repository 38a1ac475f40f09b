"""
From "mentor M must be visible" to a record in Dynamics.

    other organisation ──► Skipped, nothing is sent
    mentor unknown, or not linked ──► PermanentError, a person has to act
    else ──► the client writes the value ──► Delivered
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol
from uuid import UUID, uuid4

import structlog

from outbox.errors import PermanentError
from outbox.outcome import Delivered, Skipped

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

log = structlog.get_logger(__name__)

REQUEST_SECONDS = 5.0
"""Deadline of one call to Dynamics, if the caller sets none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MentorLink:
    """
    What ties a mentor to a record in Dynamics.

    Args:
        dynamics_id: GUID of the record, or None if nobody has linked the two.
    """

    organization_id: UUID
    dynamics_id: UUID | None


class VisibilityWriter(Protocol):
    """
    Whatever can write the value: Dynamics itself, or something on the way to it.
    """

    @property
    def takes_mentor_id(self) -> bool:
        """
        Whether rows are addressed by the mentor's own id instead of the record's GUID.
        """

    async def set_visibility(
        self, row: UUID | str, *, visible: bool, seconds: float, correlation_id: UUID
    ) -> None:
        """
        Write the value; returns when it is confirmed.

        Raises:
            DeliveryError: it was not.
        """


class HLFDynamicsSyncService:
    """
    Shows or hides mentors of one organisation on its portal.

    Args:
        organization_id: the only one whose mentors are sent.
        find_mentor: the link of a mentor, or None if there is no such mentor.

    Attributes:
        skipped: how many calls were skipped, by reason.
    """

    def __init__(
        self,
        client: VisibilityWriter,
        *,
        organization_id: UUID,
        find_mentor: Callable[[UUID], Awaitable[MentorLink | None]],
    ) -> None:
        self._client = client
        self._organization_id = organization_id
        self._find_mentor = find_mentor
        self.skipped: Counter[str] = Counter()

    async def update_portal_visibility(
        self,
        mentor_id: UUID,
        visible: bool,  # noqa: FBT001 - the signature is a contract with callers outside
        *,
        seconds: float = REQUEST_SECONDS,
        correlation_id: UUID | None = None,
    ) -> Delivered | Skipped:
        """
        Make the portal show a mentor, or not.

        Args:
            visible: what the portal is to show.
            seconds: for the call to Dynamics, token and new tries included.
            correlation_id: of the event, the same at each attempt; a new one by default.

        Raises:
            PermanentError: the mentor is unknown, not linked, or has no record any more.
            DeliveryError: one of its other classes; the portal did not confirm.
        """
        return await self.show(
            mentor_id,
            await self._find_mentor(mentor_id),
            visible=visible,
            seconds=seconds,
            correlation_id=correlation_id or uuid4(),
        )

    async def show(
        self,
        mentor_id: UUID,
        link: MentorLink | None,
        *,
        visible: bool,
        seconds: float,
        correlation_id: UUID,
    ) -> Delivered | Skipped:
        """
        The same, for whoever has found the link already.

        Raises:
            DeliveryError: as above.
        """
        if link is None:
            raise PermanentError("mentor_unknown", "There is no mentor with this id.", unsent=True)
        if link.organization_id != self._organization_id:
            return self._skip(mentor_id, "other_organization")
        await self._client.set_visibility(
            self._row(mentor_id, link),
            visible=visible,
            seconds=seconds,
            correlation_id=correlation_id,
        )
        return Delivered()

    def _row(self, mentor_id: UUID, link: MentorLink) -> UUID:
        if self._client.takes_mentor_id:
            return mentor_id
        if link.dynamics_id is None:
            raise PermanentError(
                "mentor_not_linked",
                "The mentor is not linked to Dynamics: enter the id of the record in Dynamics"
                " at the mentor (mentors.dynamics_id), then retry.",
                unsent=True,
            )
        return link.dynamics_id

    def _skip(self, mentor_id: UUID, reason: str) -> Skipped:
        self.skipped[reason] += 1
        log.warning("visibility.skipped", mentor_id=str(mentor_id), reason=reason)
        return Skipped(reason=reason)
