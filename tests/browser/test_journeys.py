"""
What a coordinator lives through in a browser, with the real commands behind it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.browser.conftest import Dashboard, window
from tests.conftest import until
from tests.desk import Desk
from worker.dynamics.sandbox import Status

if TYPE_CHECKING:
    from playwright.async_api import Browser

    from tests.acceptance.site import Site
    from tests.browser.conftest import Window
    from tests.factories import World

IN_ORDER = {"nb": "Alt er i orden", "en": "Everything is in order"}
ONE_VISIBLE = {
    "nb": "1 mentor kan fortsatt være synlig i portalen",
    "en": "1 mentor may still be visible on the portal",
}
NEEDS_YOU = {"nb": "Trenger hjelp fra deg", "en": "Needs you"}
TRY_AGAIN = {"nb": "Prøv igjen for", "en": "Try again for"}
LOCALES = {"nb": "nb-NO", "en": "en-GB"}


@pytest.fixture
def desk(world: World) -> Desk:
    """
    A coordinator without a care.
    """
    return Desk(world)


async def _marked(window: Window) -> None:
    """
    Leave a mark that would not survive if the page were loaded again.
    """
    await window.page.evaluate("window.mark = true")


async def _is_marked(window: Window) -> bool:
    return bool(await window.page.evaluate("window.mark === true"))


async def _focused(window: Window) -> str:
    """
    What the focused element is called.
    """
    return str(
        await window.page.evaluate(
            "document.activeElement.getAttribute('aria-label')"
            " ?? document.activeElement.textContent.trim()"
        )
    )


@pytest.mark.parametrize("language", ["nb", "en"])
async def test_an_alert_comes_and_goes_without_loading_the_page_again(
    site: Site, dashboard: Dashboard, browser: Browser, language: str
) -> None:
    """
    A mentor expires while Dynamics is down; Dynamics heals; nobody touches anything.
    """
    mentor = await site.world.mentor()
    site.link([mentor])
    site.sandbox.order(Status(status=503, times=None, target="data"))
    async with window(browser, dashboard, locale=LOCALES[language]) as seen:
        await seen.open()
        await seen.reads(IN_ORDER[language], "h1")
        await _marked(seen)
        await site.start_worker()

        await site.run("expire")

        await seen.reads(ONE_VISIBLE[language], "h1")
        assert (await seen.page.title()).startswith("(1) ")
        assert await seen.page.get_attribute("html", "lang") == language
        await until(lambda: len(site.requests(mentor)) > 1)

        site.sandbox.call_off()

        await seen.reads(IN_ORDER[language], "h1")
        assert site.shows(mentor) is False
        assert await _is_marked(seen)


@pytest.mark.parametrize("language", ["nb", "en"])
async def test_what_needs_a_person_stays_until_it_is_tried_again(
    site: Site, dashboard: Dashboard, browser: Browser, language: str
) -> None:
    """
    No row in Dynamics: named, with a button. Row made, button pressed: gone.
    """
    mentor = await site.world.mentor()
    await site.start_worker()
    async with window(browser, dashboard, locale=LOCALES[language]) as seen:
        await seen.open()
        await _marked(seen)
        await site.run("expire")
        button = seen.page.get_by_role("button", name=f"{TRY_AGAIN[language]} A mentor")
        await button.wait_for()
        assert NEEDS_YOU[language] in await seen.text("#needing")

        site.link([mentor])
        await button.click()

        await seen.reads(IN_ORDER[language], "h1")
        assert site.shows(mentor) is False
        assert await _is_marked(seen)


async def test_everything_can_be_done_with_the_keyboard(
    dashboard: Dashboard, browser: Browser, desk: Desk
) -> None:
    """
    Into the content, to the mentor's page, the note written and sent; nothing takes the focus.
    """
    mentor, _ = await desk.failing()
    async with window(browser, dashboard) as seen:
        await seen.open()
        keyboard = seen.page.keyboard
        await keyboard.press("Tab")
        assert await _focused(seen) == "Hopp til innholdet"
        await keyboard.press("Enter")
        for _ in range(10):
            await keyboard.press("Tab")
            if await _focused(seen) == "Vis mer om A mentor":
                break
        # A row comes while the focus is in the table: it is announced, and nothing moves.
        await desk.failing()
        await seen.reads("1 ny endring", "#needing")
        assert await _focused(seen) == "Vis mer om A mentor"
        assert await seen.page.locator("#needing-b tr").count() == 1
        await keyboard.press("Enter")
        await seen.reads("Hva kan du gjøre?")
        for _ in range(20):
            await keyboard.press("Tab")
            if await seen.page.evaluate("document.activeElement.id") == "note":
                break
        await keyboard.type("Slått av i Dynamics.")
        await desk.world.execute("UPDATE public.dynamics_sync_failures SET attempted_at = now()")
        await keyboard.press("Tab")
        assert await _focused(seen) == "Jeg har skjult mentoren selv"
        await keyboard.press("Enter")
        await seen.reads("Takk. Saken er merket som håndtert manuelt.")
        await seen.reads("Håndtert manuelt", "#mentor-state")
        assert "«Slått av i Dynamics.»" in await seen.text("#history")
    note = await desk.world.value("SELECT note FROM outbox.audit WHERE action = 'handle'")
    assert note == "Slått av i Dynamics."
    assert await desk.world.value(
        "SELECT resolution FROM public.dynamics_sync_failures WHERE mentor_id = :id", id=mentor.id
    )


async def test_nothing_needs_the_script(dashboard: Dashboard, browser: Browser, desk: Desk) -> None:
    """
    One, chosen ones and all are tried again; a note is left; the language is another.
    """
    mentors = [(await desk.failing())[0] for _ in range(3)]
    async with window(browser, dashboard, java_script_enabled=False) as seen:
        await seen.open()
        await seen.page.get_by_role("button", name="Prøv igjen for").first.click()
        await seen.reads("Prøver igjen for 1 mentor.")
        await seen.page.get_by_role("checkbox").first.check()
        await seen.page.get_by_role("button", name="Prøv valgte igjen").click()
        await seen.reads("Vil du prøve 1 mentor på nytt?", "h1")
        await seen.page.get_by_role("button", name="Ja, prøv igjen").click()
        await seen.reads("Prøver igjen for 1 mentor.")
        await seen.page.get_by_role("button", name="Prøv igjen (1)").click()
        await seen.reads("Vil du prøve 3 mentorer på nytt?", "h1")
        await seen.page.get_by_role("button", name="Ja, prøv igjen").click()
        await seen.reads("Prøver igjen for 1 mentor.")
        await seen.reads("2 blir allerede prøvd på nytt.")
        assert len(await desk.events()) == 3

        await seen.open(f"/mentors/{mentors[0].id}")
        await seen.page.get_by_role("link", name="English").click()
        await seen.reads("What can you do?")
        await seen.open()
        await seen.reads("3 mentors may still be visible on the portal", "h1")
        assert "started a new try" in await seen.text("#waiting")


async def test_good_news_gets_old_without_the_script(
    dashboard: Dashboard, browser: Browser
) -> None:
    """
    After half a minute the page says that it does not know.
    """
    async with window(browser, dashboard, java_script_enabled=False) as seen:
        await seen.open()
        assert "Alt er i orden" in await seen.text()
        assert "Vi vet ikke" not in await seen.text()
        # Animations are sought, not waited for.
        session = await seen.page.context.new_cdp_session(seen.page)
        await session.send("Animation.enable")
        await session.send("Animation.setPlaybackRate", {"playbackRate": 1000})
        await seen.reads("Vi vet ikke hvordan det står til akkurat nå")
        assert "Alt er i orden" not in await seen.text()


async def test_a_lost_server_is_said_and_found_again(
    dashboard: Dashboard, browser: Browser, desk: Desk
) -> None:
    """
    No green without fresh news; what happened meanwhile is there when the server is.
    """
    async with window(browser, dashboard) as seen:
        await seen.page.clock.install()
        await seen.open()
        await seen.reads("Alt er i orden", "h1")
        await _marked(seen)

        assert await dashboard.stop() == 0
        await seen.page.clock.fast_forward(16_000)

        await seen.reads("Siden er ikke oppdatert siden kl.", "#lost")
        assert "Alt er i orden" not in await seen.text()
        await desk.failing()
        await dashboard.start()
        # The browser's own pause before it comes back is not the page's clock's.
        await seen.reads("1 mentor kan fortsatt være synlig i portalen", "h1")
        assert await seen.text("#lost") == ""
        assert await _is_marked(seen)


async def test_a_page_can_be_held_still(dashboard: Dashboard, browser: Browser, desk: Desk) -> None:
    """
    Paused, nothing changes and nothing is promised; afterwards it is as it should be.
    """
    async with window(browser, dashboard) as seen:
        await seen.page.clock.install()
        await seen.open()
        await seen.reads("Alt er i orden", "h1")
        await seen.page.get_by_role("button", name="Sett på pause").click()
        await seen.reads("Satt på pause.")
        await desk.failing()
        await seen.page.clock.fast_forward(31_000)
        await seen.reads("Vi vet ikke hvordan det står til akkurat nå")
        assert await seen.text("#lost") == ""
        await seen.page.get_by_role("button", name="Fortsett").click()
        await seen.reads("1 mentor kan fortsatt være synlig i portalen", "h1")


async def test_rows_stay_where_somebody_points(
    dashboard: Dashboard, browser: Browser, desk: Desk
) -> None:
    """
    What is new waits for the button, and what is gone stays, marked, until the pointer leaves.
    """
    mentor, _ = await desk.failing()
    await desk.failing()
    async with window(browser, dashboard) as seen:
        await seen.open()
        await seen.page.locator("#needing-b tr").last.hover()
        await desk.failing()
        await desk.world.execute(
            "UPDATE public.dynamics_sync_failures SET resolved_at = now(), resolution = 'manual'"
            " WHERE mentor_id = :id",
            id=mentor.id,
        )
        await seen.reads("2 nye endringer", "#needing")
        assert "Ikke lenger i denne lista." in await seen.text(f"#n-{mentor.id}")
        assert await seen.page.locator("#needing-b tr").count() == 2

        await seen.page.mouse.move(1, 1)

        await seen.reads_no_more("Ikke lenger i denne lista.")
        await until(lambda: _count(seen, f"#n-{mentor.id}", 0))
        assert await seen.page.locator("#needing-b tr").count() == 2


async def _count(window: Window, selector: str, number: int) -> bool:
    return await window.page.locator(selector).count() == number


async def test_names_and_messages_are_text_whatever_they_look_like(
    dashboard: Dashboard, browser: Browser, desk: Desk
) -> None:
    """
    Markup in a name or in Dynamics' own words does nothing but be read, also when it comes live.
    """
    markup = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    complaints: list[str] = []
    async with window(browser, dashboard) as seen:
        seen.page.on("console", lambda message: complaints.append(message.text))
        seen.page.on("pageerror", lambda error: complaints.append(str(error)))
        seen.page.on("dialog", lambda dialog: complaints.append(dialog.message))
        await seen.open()
        mentor, _ = await desk.failing()
        await desk.world.execute("UPDATE public.mentors SET full_name = :name", name=markup)
        await desk.world.execute(
            "UPDATE public.dynamics_sync_failures SET error_message = :words, attempted_at = now()",
            words=markup,
        )
        await seen.reads(markup, "#needing")
        await seen.open(f"/mentors/{mentor.id}")
        await seen.reads(markup, "h1")
        await seen.page.get_by_text("Teknisk melding").click()
        await seen.reads(markup, "pre")
        await seen.open("/mentors?q=%3Cscript")
        await seen.reads(markup, "table")
    assert not complaints


async def test_a_page_fits_the_narrowest_window(
    dashboard: Dashboard, browser: Browser, desk: Desk
) -> None:
    """
    320 pixels wide, nothing is cut off and no button is smaller than a finger.
    """
    mentor, _ = await desk.failing()
    await desk.on_its_way(await desk.wanted(visible=True))
    await desk.world.execute(
        "UPDATE public.mentors SET full_name = :name", name="Etternavn-uten-noen-ende" * 4
    )
    async with window(browser, dashboard, viewport={"width": 320, "height": 640}) as seen:
        for path in ("/", f"/mentors/{mentor.id}", "/mentors?q=e", "/help", "/retry?all=1"):
            await seen.open(path)
            assert await seen.page.evaluate("document.documentElement.scrollWidth") <= 320, path
            small = await seen.page.evaluate(
                "[...document.querySelectorAll('button, .button, .tick, header a, footer a')]"
                ".filter((one) => one.checkVisibility()).filter((one) => {"
                " const box = one.getBoundingClientRect();"
                " return box.height < 44 || box.width < 24; }).map((one) => one.outerHTML)"
            )
            assert not small, path
