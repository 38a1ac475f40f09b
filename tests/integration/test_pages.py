"""
The pages and their forms over HTTP, as a browser without a script uses them.
"""

from __future__ import annotations

import re
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING
from uuid import uuid4

import httpx
import pytest

from tests.desk import Desk
from worker.coordinator.access import Local
from worker.coordinator.app import create_app
from worker.coordinator.callers import Caller

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.factories import World

PRESSED = {"Sec-Fetch-Site": "same-origin"}


@pytest.fixture
def desk(world: World) -> Desk:
    """
    A coordinator without a care.
    """
    return Desk(world)


@pytest.fixture
def caller(world: World) -> Caller:
    """
    A coordinator of HLF.
    """
    return Caller(subject="one", name="Coordinator", organization_id=world.hlf, role="coordinator")


@asynccontextmanager
async def _browser(
    world: World, caller: Caller, language: str = "nb"
) -> AsyncIterator[httpx.AsyncClient]:
    """
    Somebody's browser; it follows where a form leads.
    """
    app = create_app(world.engine, access=Local(caller), timezone="Europe/Oslo")
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(
            transport=httpx.ASGITransport(app),
            base_url="http://localhost",
            headers={"accept-language": language},
            follow_redirects=True,
        ) as client,
    ):
        yield client


def _text(answer: httpx.Response) -> str:
    """
    What is to be read on a page.
    """
    body = answer.text.partition("<body")[2].partition(">")[2]
    return " ".join(re.sub(r"<[^>]+>", " ", body).split())


async def test_a_page_is_in_the_language_that_its_reader_chose(desk: Desk, caller: Caller) -> None:
    """
    The browser's first, then the chosen one, also on other pages; links lead to the other one.
    """
    async with _browser(desk.world, caller, "en-GB") as browser:
        page = await browser.get("/")
        assert 'lang="en"' in page.text
        assert "Everything is in order" in _text(page)
        page = await browser.get("/mentors?q=%26x&lang=nb")
        assert "Søk etter «&amp;x»" in _text(page)
        assert 'href="?q=%26x&amp;lang=en"' in page.text
        assert "Alt er i orden" in _text(await browser.get("/"))


async def test_the_number_that_matters_is_in_the_title(desk: Desk, caller: Caller) -> None:
    """
    And the organisation's name is on every page.
    """
    await desk.failing()
    async with _browser(desk.world, caller) as browser:
        page = await browser.get("/")
    assert "<title>(1) Synkronisering med portalen</title>" in page.text
    assert "HLF" in _text(page)


async def test_one_failure_is_tried_again_by_one_button(desk: Desk, caller: Caller) -> None:
    """
    Then it waits, and says who started it; pressed again, it says so.
    """
    _, failure = await desk.failing()
    form = {"failure": str(failure), "from": "/"}
    async with _browser(desk.world, caller) as browser:
        page = _text(await browser.post("/retry", data=form, headers=PRESSED))
        assert "Prøver igjen for 1 mentor." in page
        assert "Ingen trenger hjelp fra deg." in page
        assert "Coordinator startet et nytt forsøk kl." in page
        page = _text(await browser.post("/retry", data=form, headers=PRESSED))
        assert "1 blir allerede prøvd på nytt." in page
        await desk.deliver()
        page = _text(await browser.post("/retry", data=form, headers=PRESSED))
        assert "1 er allerede i orden." in page
    assert len(await desk.events()) == 0


async def test_the_script_gets_the_same_answer_as_sentences(desk: Desk, caller: Caller) -> None:
    """
    Refusals too, with a status that says so.
    """
    _, failure = await desk.failing()
    asked = PRESSED | {"accept": "application/json"}
    async with _browser(desk.world, caller, "en") as browser:
        done = await browser.post("/retry", data={"failure": str(failure)}, headers=asked)
        assert (done.status_code, done.json()) == (
            200,
            {"sentences": ["Trying again for 1 mentor."]},
        )
        refused = await browser.post("/retry", data={"failure": str(uuid4())}, headers=asked)
        assert refused.status_code == 409
        assert "not there any more" in refused.json()["sentences"][0]


async def test_many_are_tried_again_only_when_asked_twice(desk: Desk, caller: Caller) -> None:
    """
    Chosen ones or all of them: first a question, with the number; nothing is done by looking.
    """
    failures = [(await desk.failing())[1] for _ in range(3)]
    async with _browser(desk.world, caller) as browser:
        asked = await browser.get("/retry", params={"failure": list(map(str, failures[:2]))})
        assert "Vil du prøve 2 mentorer på nytt?" in _text(asked)
        assert asked.text.count('name="failure"') == 2
        assert "Velg minst én mentor først." in _text(await browser.get("/retry"))
        assert "Vil du prøve 3 mentorer på nytt?" in _text(await browser.get("/retry?all=1"))
        assert not await desk.events()

        done = await browser.post("/retry", data={"all": "1"}, headers=PRESSED)
        assert "Prøver igjen for 3 mentorer." in _text(done)
        assert len(await desk.events()) == 3
        await desk.deliver()
        nothing = _text(await browser.get("/retry?all=1"))
        assert "Det er ingenting å prøve på nytt." in nothing


async def test_what_was_done_by_hand_is_said_with_a_note(desk: Desk, caller: Caller) -> None:
    """
    Without a note nothing happens; with one the page says who, and what they wrote.
    """
    mentor, failure = await desk.failing()
    page = f"/mentors/{mentor.id}/handled"
    form = {"failure": str(failure)}
    async with _browser(desk.world, caller) as browser:
        told = _text(await browser.post(page, data=form | {"note": " "}, headers=PRESSED))
        assert "Skriv hva du gjorde, så andre kan se det." in told
        assert "Vi fikk ikke skjult mentoren." in told
        told = _text(await browser.post(page, data=form | {"note": "Slått av."}, headers=PRESSED))
        assert "Saken er merket som håndtert manuelt." in told
        assert "Håndtert manuelt av Coordinator kl." in told
        assert "«Slått av.»" in told
        told = _text(await browser.post(page, data=form | {"note": "Igjen."}, headers=PRESSED))
        assert "Saken var allerede i orden." in told
        told = _text(await browser.post(page, data={"failure": "x", "note": "y"}, headers=PRESSED))
        assert "Saken finnes ikke lenger." in told
        assert "Alt er i orden" in _text(await browser.get("/"))


async def test_a_viewer_looks_and_has_nothing_to_press(desk: Desk, caller: Caller) -> None:
    """
    No buttons; whoever makes up the request is refused, and nothing changes.
    """
    mentor, failure = await desk.failing()
    async with _browser(desk.world, replace(caller, role="viewer")) as browser:
        for path in ("/", f"/mentors/{mentor.id}"):
            page = await browser.get(path)
            assert page.status_code == 200
            assert 'method="post"' not in page.text
            assert "bare lesing" in page.text
        assert (await browser.get("/retry?all=1")).status_code == 403
        for path, form in (
            ("/retry", {"failure": str(failure)}),
            ("/retry", {"all": "1"}),
            (f"/mentors/{mentor.id}/handled", {"failure": str(failure), "note": "No."}),
        ):
            told = _text(await browser.post(path, data=form, headers=PRESSED))
            assert "Du kan se, men ikke endre noe." in told
    assert not await desk.events()
    assert len(await desk.failures()) == 1


async def test_another_organisations_mentor_is_not_found(desk: Desk, caller: Caller) -> None:
    """
    Like one who does not exist: the same page, in words.
    """
    theirs = await desk.wanted(organization_id=desk.world.other)
    await desk.failed(theirs, organization_id=desk.world.other)
    async with _browser(desk.world, caller) as browser:
        for mentor_id in (theirs.id, uuid4()):
            page = await browser.get(f"/mentors/{mentor_id}")
            assert page.status_code == 404
            assert "Vi finner ikke denne siden." in _text(page)
        assert "Fant ingen mentor med det navnet." in _text(await browser.get("/mentors?q=mentor"))
        assert (await browser.get("/nowhere")).status_code == 404


async def test_a_page_says_only_what_it_knows_how_to_say(desk: Desk, caller: Caller) -> None:
    """
    Whoever writes a link puts no words of theirs on it, and leads nobody astray.
    """
    await desk.failing()
    async with _browser(desk.world, caller) as browser:
        page = await browser.get(
            "/?said=<b>x</b>,started:-1,started:x,outcome,none_chosen:3,handled"
        )
        told = re.findall(r'class="said">([^<]*)<', page.text)
        assert told == [
            "Velg minst én mentor først.",
            "Takk. Saken er merket som håndtert manuelt.",
        ]
        browser.follow_redirects = False
        for origin in ("//elsewhere.example/", "https://elsewhere.example", "/mentors/../x", "\\x"):
            done = await browser.post("/retry", data={"all": "1", "from": origin}, headers=PRESSED)
            assert done.headers["location"].startswith("/?said=")


async def test_tables_end_and_lead_on(desk: Desk, caller: Caller) -> None:
    """
    The rest is a link away, up to a number that a page can bear.
    """
    for _ in range(3):
        await desk.failing()
    async with _browser(desk.world, caller) as browser:
        page = await browser.get("/?shown=2")
        assert "Viser 2 av 3." in _text(page)
        assert 'href="/?shown=8"' in page.text
        assert "stream?shown=2&amp;lang=nb" in page.text
        for odd in ("0", "-5", "x", "999999999"):
            assert (await browser.get(f"/?shown={odd}")).status_code == 200


async def test_the_last_night_run_is_told_of(desk: Desk, caller: Caller) -> None:
    """
    Well ended, still running, or failed; and not at all where there was none.
    """
    async with _browser(desk.world, caller) as browser:
        assert "Nattkjøringen" not in _text(await browser.get("/"))
        for started, finished, ok, words in (
            ("3 hours", "2 hours", True, "alt gikk bra"),
            ("1 hour", None, None, "er ikke ferdig ennå"),
            ("1 second", "0 seconds", False, "ikke ferdig som den skulle"),
        ):
            await desk.world.execute(
                "INSERT INTO outbox.nightly_runs"
                " (organization_id, started_at, finished_at, ok, summary)"
                " VALUES (:hlf, now() - CAST(:started AS interval),"
                " now() - CAST(:finished AS interval), :ok,"
                " CASE WHEN CAST(:ok AS boolean) IS NULL THEN NULL ELSE jsonb '{}' END)",
                hlf=desk.world.hlf,
                started=started,
                finished=finished,
                ok=ok,
            )
            assert words in _text(await browser.get("/"))


async def test_files_are_kept_by_browsers_until_they_change(desk: Desk, caller: Caller) -> None:
    """
    Their address holds their content's hash; a page itself is never kept.
    """
    async with _browser(desk.world, caller) as browser:
        page = await browser.get("/")
        assert page.headers["cache-control"] == "no-store"
        files = re.findall(r'(?:href|src)="(/static/[^"]+)"', page.text)
        assert len(files) == 3
        for file in files:
            answer = await browser.get(file)
            assert answer.status_code == 200
            assert "immutable" in answer.headers["cache-control"]
            assert answer.headers["x-content-type-options"] == "nosniff"


async def test_nothing_on_a_page_is_inline(desk: Desk, caller: Caller) -> None:
    """
    The content security policy would not let it run.
    """
    mentor, _ = await desk.failing()
    async with _browser(desk.world, caller) as browser:
        for path in ("/", f"/mentors/{mentor.id}", "/help", "/retry?all=1", "/mentors?q=a"):
            page = (await browser.get(path)).text
            assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:|<script>", page)
