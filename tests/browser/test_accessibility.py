"""
axe finds nothing to complain of: in every state, both languages and both themes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest

from outbox import gate
from tests.browser.conftest import Dashboard, window
from tests.desk import Desk

axe = pytest.importorskip(
    "axe_playwright_python.async_playwright",
    reason="there is no axe: install the development dependencies",
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from playwright.async_api import Browser

    from outbox.outcome import AutomaticReason
    from tests.browser.conftest import Window
    from tests.factories import World

RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]

LOCALES = {"nb": "nb-NO", "en": "en-GB"}


@pytest.fixture
def desk(world: World) -> Desk:
    """
    A coordinator without a care.
    """
    return Desk(world)


async def _complaints(window: Window) -> list[str]:
    """
    What axe has to say about a page as it is now.
    """
    results = await axe.Axe().run(
        window.page,
        options={
            "runOnly": {"type": "tag", "values": RULES},
            "resultTypes": ["violations"],
        },
    )
    return [
        f"{violation['id']}: {node['html']}"
        for violation in results.response["violations"]
        for node in violation["nodes"]
    ]


async def _everything(desk: Desk) -> list[str]:
    """
    Mentors in every state; returns the paths of all pages there are about them.
    """
    mentors = [await desk.world.mentor()]
    for visible in (False, True):
        confirmed = await desk.wanted(visible=visible)
        await desk.confirmed(confirmed)
        waiting = await desk.wanted(visible=visible)
        await desk.on_its_way(waiting, minutes=12)
        failing = await desk.wanted(visible=visible)
        await desk.failed(failing, visible=visible)
        mentors += [confirmed, waiting, failing, await desk.wanted(visible=visible)]
    handled, _ = await desk.failing()
    await desk.world.execute(
        "UPDATE public.dynamics_sync_failures SET resolved_at = now(), resolution = 'manual',"
        " resolved_by = 'Coordinator' WHERE mentor_id = :id",
        id=handled.id,
    )
    delivered = await desk.world.mentor()
    await desk.world.certifications.expire(delivered.certification_id)
    await desk.world.execute(
        "INSERT INTO outbox.settled (event_id, destination, key, organization_id, version,"
        " payload, outcome, attempts, error_code, created_at)"
        " SELECT 1, destination, key, organization_id, version, payload, outcome, 2, 'timeout',"
        " now() FROM outbox.events, unnest(ARRAY['delivered', 'dead', 'superseded', 'skipped'])"
        " AS outcome WHERE key = :key",
        key=str(delivered.id),
    )
    return [
        "/",
        "/?said=started:2,under_way:1,handled",
        "/?shown=1",
        *(f"/mentors/{mentor.id}" for mentor in [*mentors, handled, delivered]),
        f"/mentors/{uuid4()}",
        "/mentors",
        "/mentors?q=mentor",
        "/mentors?q=nobody",
        "/help",
        "/retry?all=1",
    ]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("language", ["nb", "en"])
async def test_every_page_is_for_everybody(
    dashboard: Dashboard,
    browser: Browser,
    desk: Desk,
    language: str,
    theme: Any,  # noqa: ANN401 (of Playwright)
) -> None:
    """
    No violation of WCAG 2.2 AA that a program can find, nor of good practice.
    """
    async with window(browser, dashboard, locale=LOCALES[language], color_scheme=theme) as seen:
        found: dict[str, list[str]] = {}

        async def look(situation: str) -> None:
            found[situation] = await _complaints(seen)

        async def at(path: str, situation: str = "") -> None:
            await seen.open(path)
            await look(f"{path} {situation}")

        await at("/", "in order")
        await seen.page.evaluate("document.documentElement.classList.add('old')")
        await look("in order, but old")
        for path in await _everything(desk):
            await at(path)
        await seen.open()
        await seen.page.locator("summary").click()
        await look("with all open")
        await seen.page.set_viewport_size({"width": 320, "height": 640})
        await look("at 320 pixels")
        await seen.page.evaluate("document.getElementById('lost').textContent = 'Lost'")
        await look("lost")
        await seen.page.set_viewport_size({"width": 1200, "height": 800})
        for number, close in enumerate(_closings(desk)):
            await close()
            await at("/", f"nothing is sent, {number}")
        assert found == {situation: [] for situation in found}


def _closings(desk: Desk) -> list[Callable[[], Awaitable[None]]]:
    """
    Every way in which nothing is sent.
    """

    def automatic(reason: AutomaticReason) -> Callable[[], Awaitable[None]]:
        async def close() -> None:
            await desk.world.execute("DELETE FROM outbox.gates")
            async with desk.engine.begin() as connection:
                await gate.close(
                    connection,
                    destination="dynamics",
                    organization_id=desk.world.hlf,
                    reason=reason,
                    message="",
                    closed_by="worker",
                    backoff=gate.CONFIGURATION,
                )

        return close

    async def by_hand() -> None:
        async with desk.engine.begin() as connection:
            await gate.close_by_hand(
                connection,
                destination="dynamics",
                organization_id=desk.world.hlf,
                message="Maintenance.",
                closed_by="Coordinator",
            )

    async def half_open() -> None:
        await automatic("outage")()
        await desk.world.execute("UPDATE outbox.gates SET closed_until = now()")

    return [
        automatic("throttled"),
        automatic("outage"),
        automatic("configuration"),
        by_hand,
        half_open,
    ]
