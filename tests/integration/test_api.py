"""
The API, over HTTP, on a real database.
"""

from __future__ import annotations

import asyncio
from datetime import date, timedelta
from typing import TYPE_CHECKING
from uuid import uuid4

import httpx
import pytest
from sqlalchemy import text

from tests.desk import Desk
from tests.integration.test_callers import coordinator
from tests.served import served
from worker.certifications import transitions
from worker.coordinator.access import Local
from worker.coordinator.api import wait_preferred
from worker.coordinator.app import create_app

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from uuid import UUID

    from tests.factories import World

NEXT_YEAR = date.today() + timedelta(days=365)  # noqa: DTZ011 (a year, give or take a day)
JSON = {"Content-Type": "application/json"}


@pytest.fixture
async def app(world: World) -> AsyncIterator[httpx.AsyncClient]:
    """
    HLF's app, in English.
    """
    dashboard = create_app(
        world.engine, access=Local(coordinator(world.hlf)), timezone="Europe/Oslo"
    )
    headers = {"Authorization": "Bearer unused", "Accept-Language": "en-GB,nb;q=0.5"}
    async with served(dashboard) as url, httpx.AsyncClient(base_url=url, headers=headers) as app:
        yield app


@pytest.fixture
def desk(world: World) -> Desk:
    """
    Situations to ask about.
    """
    return Desk(world)


def problem(answer: httpx.Response) -> tuple[int, str]:
    """
    Status and kind, of what has to be problem details.
    """
    assert answer.headers["content-type"] == "application/problem+json"
    document = answer.json()
    assert document["status"] == answer.status_code
    assert set(document) == {"type", "title", "status", "detail"}
    return answer.status_code, document["type"].rpartition(":")[2]


async def renew(
    app: httpx.AsyncClient, certification_id: UUID, until: object = NEXT_YEAR, **headers: str
) -> httpx.Response:
    """
    Renew a certification.
    """
    return await app.post(
        f"/api/v1/certifications/{certification_id}/renewal",
        json={"expires_on": str(until)},
        headers=headers,
    )


async def test_a_renewal_carries_what_is_saved_and_the_warning(
    app: httpx.AsyncClient, desk: Desk
) -> None:
    """
    It stands; that the portal is behind is no error.
    """
    mentor = await desk.wanted()

    answer = await renew(app, mentor.certification_id)

    assert answer.status_code == 200
    assert answer.json() == {
        "certification_id": str(mentor.certification_id),
        "mentor_id": str(mentor.id),
        "expires_on": str(NEXT_YEAR),
        "visible": True,
        "version": 3,
        "portal": "pending",
        "warning": "Portal visibility update pending",
        "error_code": None,
        "reason": None,
        "repeated": False,
    }
    assert answer.headers["content-language"] == "en"
    assert "preference-applied" not in answer.headers
    norwegian = await renew(
        app, mentor.certification_id, **{"Accept-Language": "nb-NO", "Prefer": "wait=0"}
    )
    assert norwegian.headers["content-language"] == "nb"
    assert norwegian.headers["preference-applied"] == "wait=0"
    assert norwegian.json()["warning"] not in {None, "Portal visibility update pending"}


async def test_a_renewal_that_somebody_is_in_the_way_of_gives_way_and_says_so(
    app: httpx.AsyncClient, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Whoever forgot to end a transaction does not keep a person waiting; nothing was changed, and
    the same request does it as soon as the way is free.
    """
    monkeypatch.setattr(transitions, "RENEWAL_PATIENCE_SECONDS", 0.05)
    mentor = await desk.wanted()
    async with desk.world.engine.begin() as forgotten:
        await forgotten.execute(text("SELECT FROM public.portal_visibility FOR UPDATE"))
        answer = await renew(app, mentor.certification_id, **{"Idempotency-Key": "once"})

    assert problem(answer) == (503, "held")
    assert "nothing was changed. Try again" in answer.json()["detail"]
    again = await renew(app, mentor.certification_id, **{"Idempotency-Key": "once"})
    assert (again.status_code, again.json()["repeated"]) == (200, False)


async def test_whoever_waits_learns_that_the_portal_follows(
    app: httpx.AsyncClient, desk: Desk
) -> None:
    """
    As soon as it does.
    """
    mentor = await desk.wanted()

    waiting = asyncio.create_task(renew(app, mentor.certification_id, Prefer="wait=10"))
    while not waiting.done():
        await desk.deliver()
        await asyncio.sleep(0.01)
    answer = await waiting

    assert (answer.json()["portal"], answer.json()["warning"]) == ("confirmed", None)
    assert answer.headers["preference-applied"] == "wait=10"
    state = (await app.get(f"/api/v1/mentors/{mentor.id}/portal")).json()
    assert (state["portal"], state["visible"], state["warning"]) == ("confirmed", True, None)
    assert state["confirmed_at"]


async def test_a_request_sent_again_with_its_key_renews_once(
    app: httpx.AsyncClient, desk: Desk, world: World
) -> None:
    """
    Whatever became of the first answer; the key with another request is a mistake.
    """
    mentor = await desk.wanted()
    key = {"Idempotency-Key": "0d9c"}

    first = (await renew(app, mentor.certification_id, **key)).json()
    again = (await renew(app, mentor.certification_id, **key)).json()
    other = await renew(app, mentor.certification_id, NEXT_YEAR + timedelta(days=1), **key)

    assert again == first | {"repeated": True}
    assert problem(other) == (422, "key-reused")
    assert await world.value("SELECT version FROM public.portal_visibility") == 3


async def test_failures_are_listed_retried_and_handled(app: httpx.AsyncClient, desk: Desk) -> None:
    """
    One, all, and by hand.
    """
    one, two, _ = [(await desk.failing())[1] for _ in range(3)]
    listed = (await app.get("/api/v1/failures", params={"limit": 2})).json()
    assert listed["cut"]
    assert len(listed["failures"]) == 2
    assert {"error_code": "record_not_found", "visible": False}.items() <= listed["failures"][
        0
    ].items()
    assert listed["failures"][0]["reason"] == "the mentor was not found in Dynamics"

    retried = await app.post(f"/api/v1/failures/{one}/retry")
    assert retried.json() == {"started": 1, "under_way": 0, "resolved": 0, "gone": 0}
    handled = await app.post(f"/api/v1/failures/{two}/handled", json={"note": "Done."})
    assert handled.json()["done"]
    everything = await app.post("/api/v1/failures/retry")
    assert everything.json() == {"started": 1, "under_way": 1, "resolved": 0, "gone": 0}
    again = await app.post(f"/api/v1/failures/{two}/retry")
    assert again.json() == {"started": 0, "under_way": 0, "resolved": 1, "gone": 0}
    resolved = (await app.get("/api/v1/failures", params={"resolved": "true"})).json()["failures"]
    assert {row["id"]: row["resolution"] for row in resolved}[str(two)] == "manual"
    status = (await app.get("/api/v1/status")).json()
    assert (status["waiting"], status["sending"]["state"]) == (2, "open")


NOT_MEANT = [
    ({}, 422),
    ({"expires_on": "20270101"}, 422),
    ({"expires_on": "2027-02-30"}, 422),
    ({"expires_on": 5}, 422),
    ({"expires_on": None}, 422),
    ({"expires_on": "2027-01-01", "more": 1}, 422),
    ([], 422),
    ("x", 422),
]


@pytest.mark.parametrize(("body", "status"), NOT_MEANT)
async def test_what_cannot_be_meant_changes_nothing(
    app: httpx.AsyncClient, desk: Desk, world: World, body: object, status: int
) -> None:
    """
    It is said what is wrong.
    """
    mentor = await desk.wanted()
    path = f"/api/v1/certifications/{mentor.certification_id}/renewal"
    assert problem(await app.post(path, json=body)) == (status, "invalid")
    assert await world.value("SELECT version FROM public.portal_visibility") == 2


async def test_what_is_wrong_is_told_by_its_kind(app: httpx.AsyncClient, desk: Desk) -> None:
    """
    A program can tell them apart.
    """
    mentor, failure_id = await desk.failing()
    nobody = uuid4()
    path = f"/api/v1/certifications/{mentor.certification_id}/renewal"
    told = [
        problem(answer)
        for answer in (
            await renew(app, nobody),
            await renew(app, mentor.certification_id, "2020-01-01"),
            await renew(app, mentor.certification_id, **{"Idempotency-Key": ""}),
            await app.post(path, content=b"{", headers=JSON),
            await app.post(path, content=b"\xff\xfe", headers=JSON),
            await app.post(path, content=b"[" * 60_000, headers=JSON),
            await app.post(path, content=b"{}", headers={"Content-Type": "text/plain"}),
            await app.post(f"/api/v1/failures/{nobody}/retry"),
            await app.post(f"/api/v1/failures/{failure_id}/handled", json={"note": "\x00"}),
            await app.post(f"/api/v1/failures/{failure_id}/handled", json={"note": 1}),
            await app.get(f"/api/v1/mentors/{nobody}/portal"),
            await app.get("/api/v1/mentors/x/portal"),
            await app.get("/api/v1/failures", params={"limit": "0"}),
            await app.get("/api/v1/failures", params={"limit": "١"}),
            await app.get("/api/v1/failures", params={"resolved": "yes"}),
            await app.get("/api/v1/failures/retry"),
        )
    ]
    assert told == [
        (404, "unknown-certification"),
        (422, "renewal-not-in-future"),
        (400, "malformed"),
        (400, "malformed"),
        (400, "malformed"),
        (400, "malformed"),
        (415, "unsupported-media-type"),
        (404, "unknown-failure"),
        (422, "invalid"),
        (422, "invalid"),
        (404, "unknown-mentor"),
        (404, "not-found"),
        (422, "invalid"),
        (422, "invalid"),
        (422, "invalid"),
        (405, "method-not-allowed"),
    ]


async def test_a_database_that_does_not_answer_is_said(world: World) -> None:
    """
    503, and what was saved stands.
    """
    from worker import database  # noqa: PLC0415

    nowhere = database.connect("postgresql://nobody@127.0.0.1:9/x", application_name="test")
    dashboard = create_app(nowhere, access=Local(coordinator(world.hlf)), timezone="Europe/Oslo")
    async with served(dashboard) as url, httpx.AsyncClient(base_url=url) as app:
        assert problem(await app.get("/api/v1/status")) == (503, "database-lost")
    await nowhere.dispose()


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ([], None),
        (["wait=7"], 7),
        (["respond-async, Wait = 3; x"], 3),
        (["return=minimal", 'wait="2"'], 2),
        (["wait=9999"], 15),
        (["wait=-1"], None),
        (["wait=1.5"], None),
        (["wait"], None),
        (["waiting=5"], None),
        (["wait=12345678901234567890"], None),
    ],
)
def test_a_preference_for_waiting_is_heeded_up_to_a_point(
    headers: list[str], seconds: int | None
) -> None:
    """
    What is not understood is not heeded, as the standard has it.
    """
    assert wait_preferred(headers) == seconds
