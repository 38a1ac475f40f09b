"""
Tells somebody outside that the night run began and how it ended, as healthchecks.io has it.

    {url}/start    it begins
    {url}          it ended well
    {url}/fail     it did not

Whoever hears nothing in time raises the alarm, so a machine that is off is noticed too. The
address holds a token: it is in no log and no exception. Nothing here breaks the run, or keeps
it for longer than a few seconds.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import httpx
import structlog

from worker.dynamics.token import is_loopback, isolated_http

if TYPE_CHECKING:
    from typing import Self

log = structlog.get_logger(__name__)

PING_SECONDS = 3.0
"""For one of the two, whatever the other side does."""

LONGEST_BODY = 10_000
"""Characters; healthchecks.io keeps no more."""


class Ping:
    """
    Where the night run is heard; without an address, nowhere.

    Args:
        url: secret.

    Raises:
        ValueError: no https (plain http is for this machine only); the URL is not repeated.
    """

    def __init__(self, url: str = "") -> None:
        self._url = _checked(url) if url else None
        self._http = isolated_http() if url else None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._http is not None:
            await self._http.aclose()

    async def start(self) -> None:
        """
        It begins.
        """
        await self._tell("/start", "")

    async def end(self, summary: str, *, good: bool) -> None:
        """
        It ended.
        """
        await self._tell("" if good else "/fail", summary)

    async def _tell(self, signal: str, body: str) -> None:
        if self._http is None or self._url is None:
            return
        path = self._url.path.rstrip("/") + signal
        try:
            async with asyncio.timeout(PING_SECONDS):
                answer = await self._http.post(
                    self._url.copy_with(path=path),
                    content=body[:LONGEST_BODY].encode(),
                    headers={"Content-Type": "text/plain; charset=utf-8"},
                )
        except Exception as error:  # noqa: BLE001 (whatever it is, the run goes on)
            log.warning("nightly.ping_failed", error=type(error).__name__)
        else:
            if not answer.is_success:
                log.warning("nightly.ping_refused", status=answer.status_code)


def _checked(url: str) -> httpx.URL:
    try:
        address = httpx.URL(url)
    except (httpx.InvalidURL, TypeError):
        address = httpx.URL()
    if not address.host or address.scheme not in {"http", "https"}:
        raise ValueError("it must be an address like https://hc.example/ID")
    if address.scheme == "http" and not is_loopback(address.host):
        raise ValueError("it must start with https://; plain http is for loopback hosts only")
    if address.userinfo or address.fragment:
        raise ValueError("it must have neither a user nor a fragment")
    return address
