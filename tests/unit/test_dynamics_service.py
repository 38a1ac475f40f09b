"""
Which record is written, and when none is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import pytest
from structlog.testing import capture_logs

from outbox.errors import PermanentError, TransientError
from outbox.outcome import Delivered, Skipped
from worker.dynamics.service import HLFDynamicsSyncService, MentorLink

if TYPE_CHECKING:
    from outbox.errors import DeliveryError

HLF, OTHER = uuid4(), uuid4()
MENTOR, RECORD = uuid4(), uuid4()


class Portal:
    """
    Remembers what it was told; fails if it is to.
    """

    def __init__(
        self, *, takes_mentor_id: bool = False, fails: DeliveryError | None = None
    ) -> None:
        self.takes_mentor_id = takes_mentor_id
        self.fails = fails
        self.calls: list[tuple[UUID | str, bool, float]] = []
        self.correlation_ids: list[UUID] = []

    async def set_visibility(
        self, row: UUID | str, *, visible: bool, seconds: float, correlation_id: UUID
    ) -> None:
        """
        Remember, and fail if that was ordered.
        """
        self.calls.append((row, visible, seconds))
        self.correlation_ids.append(correlation_id)
        if self.fails:
            raise self.fails


def service(portal: Portal, link: MentorLink | None) -> HLFDynamicsSyncService:
    """
    HLF's service, for which every mentor has this link.
    """

    async def find(mentor_id: UUID) -> MentorLink | None:
        assert mentor_id == MENTOR
        return link

    return HLFDynamicsSyncService(portal, organization_id=HLF, find_mentor=find)


@pytest.mark.parametrize("visible", [True, False])
async def test_a_linked_mentor_is_written_to_its_record(visible: bool) -> None:  # noqa: FBT001 - a case
    """
    By the record's GUID, with the deadline and the event's id passed on.
    """
    portal, event = Portal(), uuid4()
    update = service(portal, MentorLink(organization_id=HLF, dynamics_id=RECORD))
    outcome = await update.update_portal_visibility(
        MENTOR, visible, seconds=2.5, correlation_id=event
    )
    assert outcome == Delivered()
    assert portal.calls == [(RECORD, visible, 2.5)]
    assert portal.correlation_ids == [event]


async def test_without_an_event_each_call_has_an_id_of_its_own() -> None:
    """
    And five seconds.
    """
    portal = Portal()
    update = service(portal, MentorLink(organization_id=HLF, dynamics_id=RECORD))
    await update.update_portal_visibility(MENTOR, visible=True)
    await update.update_portal_visibility(MENTOR, visible=True)
    assert len(set(portal.correlation_ids)) == 2
    assert portal.calls == [(RECORD, True, 5.0)] * 2


@pytest.mark.parametrize("dynamics_id", [None, RECORD])
async def test_with_an_alternate_key_a_mentor_needs_no_link(dynamics_id: UUID | None) -> None:
    """
    Its own id is the value of the key, also where a link exists.
    """
    portal = Portal(takes_mentor_id=True)
    update = service(portal, MentorLink(organization_id=HLF, dynamics_id=dynamics_id))
    await update.update_portal_visibility(MENTOR, visible=False)
    assert portal.calls == [(MENTOR, False, 5.0)]


@pytest.mark.parametrize("dynamics_id", [None, RECORD])
async def test_a_mentor_of_another_organisation_is_skipped(dynamics_id: UUID | None) -> None:
    """
    Nothing is sent; it is counted and logged, by ids only.
    """
    portal = Portal()
    update = service(portal, MentorLink(organization_id=OTHER, dynamics_id=dynamics_id))
    with capture_logs() as logs:
        outcome = await update.update_portal_visibility(MENTOR, visible=True)
    assert outcome == Skipped(reason="other_organization")
    assert portal.calls == []
    assert update.skipped == {"other_organization": 1}
    assert logs == [
        {
            "event": "visibility.skipped",
            "log_level": "warning",
            "mentor_id": str(MENTOR),
            "reason": "other_organization",
        }
    ]


@pytest.mark.parametrize(
    ("link", "code"),
    [
        (None, "mentor_unknown"),
        (MentorLink(organization_id=HLF, dynamics_id=None), "mentor_not_linked"),
    ],
)
async def test_a_mentor_without_a_record_needs_a_person(link: MentorLink | None, code: str) -> None:
    """
    Nothing is sent, and trying again would not help.
    """
    portal = Portal()
    with pytest.raises(PermanentError) as raised:
        await service(portal, link).update_portal_visibility(MENTOR, visible=True)
    assert raised.value.code == code
    assert raised.value.message.endswith(".")
    assert portal.calls == []


async def test_a_failure_of_the_portal_goes_through_as_it_is() -> None:
    """
    It is the outbox that decides what becomes of the event.
    """
    failure = TransientError("timeout", "Dynamics did not answer in time.", doubtful=True)
    update = service(Portal(fails=failure), MentorLink(organization_id=HLF, dynamics_id=RECORD))
    with pytest.raises(TransientError) as raised:
        await update.update_portal_visibility(MENTOR, visible=True)
    assert raised.value is failure
