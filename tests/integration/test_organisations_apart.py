"""
Another organisation's coordinator, by page, API and stream: nothing is seen and nothing changes,
with our own conditions and with every one of them taken out.
"""

from __future__ import annotations

import asyncio
import importlib
import pkgutil
import re
from typing import TYPE_CHECKING

import httpx
import pytest
from sqlalchemy import TextClause, text

import worker.coordinator
from outbox import gate
from tests.conftest import until
from tests.factories import NEXT_YEAR, TODAY
from tests.integration.test_callers import everything, in_trouble
from tests.openid import person, site_with_login
from worker import database
from worker.certifications import transitions, visibility
from worker.coordinator import alerts

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from types import ModuleType
    from uuid import UUID

    from tests.factories import Mentor, World
    from tests.openid import Site

NAME = "Hemmelig Navn"
"""Of a mentor of HLF's; nobody else may read it anywhere."""

CONDITION = re.compile(r"(?:\w+\.)?organization_id = :organization_id")


def modules() -> Iterator[ModuleType]:
    """
    Wherever pages, stream, API and their actions have statements of their own.
    """
    for found in pkgutil.iter_modules(worker.coordinator.__path__):
        yield importlib.import_module(f"worker.coordinator.{found.name}")
    yield from (gate, transitions, visibility)


def careless(monkeypatch: pytest.MonkeyPatch) -> int:
    """
    Take each condition on the organisation out of each statement; returns how many there were.
    """
    taken = 0
    for module in modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, TextClause):
                anybody, number = CONDITION.subn(
                    "(CAST(:organization_id AS uuid) IS NOT NULL)", value.text
                )
                taken += number
                monkeypatch.setattr(module, name, text(anybody))
    return taken


@pytest.fixture(params=["as it is", "careless"])
def conditions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """
    Our own, or none.
    """
    if request.param == "careless":
        assert careless(monkeypatch) > 15
    return str(request.param)


@pytest.fixture
async def site(world: World) -> AsyncIterator[Site]:
    """
    A dashboard where people of both organisations log in.
    """
    async with site_with_login(world) as site:
        yield site


@pytest.fixture
async def trouble(world: World) -> tuple[Mentor, UUID]:
    """
    A mentor of HLF's with a failure and an event, and one more failure.
    """
    mentor, failure_id = await in_trouble(world)
    await world.execute("UPDATE public.mentors SET full_name = :name", name=NAME)
    return mentor, failure_id


def says_nothing(answer: httpx.Response, mentor: Mentor, failure_id: UUID) -> bool:
    """
    Whether an answer has nothing of HLF's in it, beyond what was asked with.
    """
    return not any(
        secret in answer.text for secret in (NAME, "record_not_found", "No row.", "Paused.")
    ) and (str(failure_id) not in answer.text or str(mentor.id) not in answer.text)


async def test_careless_statements_are_careless(
    world: World, trouble: tuple[Mentor, UUID], monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    As the owner, they show everybody's: what follows is no accident.
    """
    assert trouble
    careless(monkeypatch)
    async with database.reading(world.engine) as connection:
        shown = await alerts.failures(connection, organization_id=world.other)
    assert [failure.mentor_name for failure in shown] == [NAME]


async def test_by_page(
    site: Site, world: World, trouble: tuple[Mentor, UUID], conditions: str
) -> None:
    """
    The overview, a search, the mentor's own page, and every form.
    """
    mentor, failure_id = trouble
    before = await everything(world)
    site.provider.who("eve", world.other, "coordinator")
    own = {"Sec-Fetch-Site": "same-origin"}
    async with site.browser() as browser:
        await browser.get("/login")
        for path in (
            "/",
            "/?lang=en",
            "/mentors?q=Hemmelig",
            f"/mentors/{mentor.id}",
            f"/retry?failure={failure_id}",
            "/retry?all=1",
        ):
            answer = await browser.get(path)
            assert answer.status_code in {200, 404}, path
            assert NAME not in answer.text, path
            assert "record_not_found" not in answer.text
        for path, form in (
            ("/retry", {"failure": str(failure_id)}),
            ("/retry", {"all": "1"}),
            (f"/mentors/{mentor.id}/handled", {"failure": str(failure_id), "note": "Mine."}),
        ):
            answer = await browser.post(path, data=form, headers=own)
            assert answer.status_code < 500
            assert NAME not in answer.text
    assert await unchanged(world, before), conditions


async def test_by_api(
    site: Site, world: World, trouble: tuple[Mentor, UUID], conditions: str
) -> None:
    """
    Each operation, with HLF's ids.
    """
    mentor, failure_id = trouble
    before = await everything(world)
    token = site.provider.token(**person("eve", world.other, "coordinator"))
    renewal = {"expires_on": str(NEXT_YEAR)}
    async with httpx.AsyncClient(
        base_url=site.url, headers={"Authorization": f"Bearer {token}"}
    ) as app:
        status = (await app.get("/api/v1/status")).json()
        assert {status[name] for name in ("in_order", "waiting", "failed", "unaccounted")} == {0}
        assert status["sending"]["state"] == "open"
        listed = await app.get("/api/v1/failures", params={"resolved": "true"})
        assert listed.json() == {"failures": [], "cut": False}
        for answer in (
            await app.get(f"/api/v1/mentors/{mentor.id}/portal"),
            await app.post(f"/api/v1/failures/{failure_id}/retry"),
            await app.post(f"/api/v1/failures/{failure_id}/handled", json={"note": "Mine."}),
            await app.post(
                f"/api/v1/certifications/{mentor.certification_id}/renewal", json=renewal
            ),
        ):
            assert answer.status_code == 404
            assert says_nothing(answer, mentor, failure_id)
        everybodys = await app.post("/api/v1/failures/retry")
        assert set(everybodys.json().values()) == {0}
    assert await unchanged(world, before), conditions


async def test_by_stream(
    site: Site, world: World, trouble: tuple[Mentor, UUID], conditions: str
) -> None:
    """
    What is sent live, of the overview and of the mentor, while something happens at HLF's.
    """
    mentor, _ = trouble
    ours = site.provider.token()
    theirs = site.provider.token(**person("eve", world.other, "coordinator"))
    seen: dict[str, str] = {ours: "", theirs: ""}

    async def watch(token: str, path: str) -> None:
        headers = {"Authorization": f"Bearer {token}"}
        async with (
            httpx.AsyncClient(base_url=site.url, headers=headers, timeout=60) as viewer,
            viewer.stream("GET", path) as stream,
        ):
            async for piece in stream.aiter_text():
                seen[token] += piece

    watching = [
        asyncio.create_task(watch(token, path))
        for token in (ours, theirs)
        for path in ("/stream", f"/stream?mentor={mentor.id}")
    ]
    await until(lambda: all("event: state" in pieces for pieces in seen.values()))
    other = await world.mentor()
    await world.certifications.expire(other.certification_id, today=TODAY)
    await until(lambda: str(other.id) in seen[ours] and NAME in seen[ours])
    for viewer in watching:
        viewer.cancel()
    await asyncio.wait(watching)

    assert NAME not in seen[theirs], conditions
    assert str(other.id) not in seen[theirs]


async def unchanged(world: World, before: dict[str, list[str]]) -> bool:
    """
    Whether HLF's rows are as they were; what the other one did is in its own history.
    """
    after = await everything(world)
    del before["outbox.audit"], after["outbox.audit"]
    theirs = {row[0] for row in await world.rows("SELECT organization_id FROM outbox.audit")}
    assert theirs <= {world.hlf, world.other}
    return after == before


def test_a_condition_is_recognised() -> None:
    """
    However it is written.
    """
    taken = CONDITION.sub("x", "a.organization_id = :organization_id AND organization_id = :o")
    assert taken == "x AND organization_id = :o"
