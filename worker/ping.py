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

import structlog

from worker.http_client import HttpClient, NoAnswerError, Outgoing, is_private, parsed_address

if TYPE_CHECKING:
    from typing import Self

    from yarl import URL

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
        self._http = HttpClient(keep_alive=False) if url else None

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
        path = self._url.raw_path.rstrip("/") + signal
        outgoing = Outgoing(
            method="POST",
            url=self._url.with_path(path, encoded=True, keep_query=True),
            headers={"Content-Type": "text/plain; charset=utf-8"},
            body=body[:LONGEST_BODY].encode(),
        )
        try:
            async with asyncio.timeout(PING_SECONDS):
                answer = await self._http.send(outgoing)
        except NoAnswerError as silence:
            log.warning("nightly.ping_failed", error=silence.name)
        except Exception as error:  # noqa: BLE001 (whatever it is, the run goes on)
            log.warning("nightly.ping_failed", error=type(error).__name__)
        else:
            if not answer.is_success:
                log.warning("nightly.ping_refused", status=answer.status)


def _checked(url: str) -> URL:
    address = parsed_address(url)
    if address is None:
        raise ValueError("it must be an address like https://hc.example/ID")
    if not is_private(address):
        raise ValueError("it must start with https://; plain http is for loopback hosts only")
    if address.raw_user or address.raw_password or address.raw_fragment:
        raise ValueError("it must have neither a user nor a fragment")
    return address
