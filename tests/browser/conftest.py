"""
A real browser on the real command, with a worker and the sandbox behind it.

Debian's Chromium does, or any other on the path; without one these tests say so and are skipped.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import socket
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from tests.acceptance.site import Site, open_site
from tests.conftest import until
from tests.forked import Forked

playwright = pytest.importorskip(
    "playwright.async_api", reason="there is no Playwright: install the development dependencies"
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from playwright.async_api import Browser, BrowserContext, Page

    from tests.factories import World

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")

ARGUMENTS = [
    "--no-sandbox",  # as root there is none; the pages are ours
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--no-proxy-server",
]


@dataclass(slots=True, kw_only=True)
class Dashboard:
    """
    `hlf-sync dashboard` as a process of its own, at an address that stays.
    """

    site: Site
    port: int
    processes: list[Forked] = field(default_factory=list)

    @property
    def url(self) -> str:
        """
        Where it is, without the last slash.
        """
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """
        Start it, and return when it says that it listens.
        """
        process = await self.site.start("dashboard", "--json", HLF_DASHBOARD_PORT=str(self.port))
        assert isinstance(process, Forked)
        self.processes.append(process)
        await until(lambda: process.printed().endswith(b"\n"))
        assert json.loads(process.printed())["url"] == f"{self.url}/"

    async def stop(self) -> int:
        """
        End it kindly; returns its exit code.
        """
        process = self.processes.pop()
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(30):
            await process.communicate()
        assert process.returncode is not None
        return process.returncode


@dataclass(slots=True, kw_only=True)
class Window:
    """
    A coordinator's browser window.
    """

    page: Page
    dashboard: Dashboard

    async def open(self, path: str = "/") -> None:
        """
        Go to a page.
        """
        await self.page.goto(self.dashboard.url + path)

    async def text(self, selector: str = "main") -> str:
        """
        What stands there.
        """
        return " ".join((await self.page.inner_text(selector)).split())

    async def reads(self, words: str, selector: str = "main", *, seconds: float = 20) -> None:
        """
        Wait until something is to be read there.
        """

        async def there() -> bool:
            return words in await self.text(selector)

        await until(there, seconds=seconds)

    async def reads_no_more(self, words: str, selector: str = "main") -> None:
        """
        Wait until something is to be read there no more.
        """

        async def gone() -> bool:
            return words not in await self.text(selector)

        await until(gone)


@pytest.fixture(scope="session")
def chromium() -> str:
    """
    Where the browser is.
    """
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("there is no Chromium on the path, so no page was opened in a browser")
    return found


@pytest.fixture
async def browser(chromium: str) -> AsyncIterator[Browser]:
    """
    A browser without windows.
    """
    async with playwright.async_playwright() as driver:
        browser = await driver.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield browser
        await browser.close()


@pytest.fixture
async def site(world: World, database_url: str, direct_url: str) -> AsyncIterator[Site]:
    """
    A database, the sandbox in Dynamics' place, and an environment for real processes.
    """
    async with open_site(world, database_url, direct_url=direct_url) as site:
        yield site


@pytest.fixture
async def dashboard(site: Site, chromium: str) -> AsyncIterator[Dashboard]:
    """
    The dashboard of HLF, open to this machine.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    dashboard = Dashboard(site=site, port=port)
    await dashboard.start()
    yield dashboard
    if dashboard.processes:
        await dashboard.stop()


@asynccontextmanager
async def window(
    browser: Browser,
    dashboard: Dashboard,
    **options: Any,  # noqa: ANN401 (of Playwright)
) -> AsyncIterator[Window]:
    """
    A new window, in bokmål unless said otherwise, of a browser that remembers nothing.
    """
    context: BrowserContext = await browser.new_context(**{"locale": "nb-NO"} | options)
    context.set_default_timeout(20_000)
    try:
        yield Window(page=await context.new_page(), dashboard=dashboard)
    finally:
        await context.close()
