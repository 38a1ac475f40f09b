"""
One request and its answer, within a deadline; whatever is asked and whoever answers.

    answer ── deadline ── a line of our own ─┬─ try, at most 3 times while nothing was sent
                                             │     auth ── request ── answer, up to a limit
                                             └─ none? ── an error that says whether it is doubtful
"""

from __future__ import annotations

import asyncio
import ssl
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import httpx

from worker.dynamics.errors import CERTIFICATE, DYNAMICS_IS_SILENT, INVALID_ADDRESS
from worker.dynamics.token import (
    CONNECT_SECONDS,
    MAX_ANSWER_BYTES,
    capped_body,
    is_certificate_error,
    isolated_line,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from outbox.errors import DeliveryError
    from worker.dynamics.errors import Meaning, Silence

CONNECTIONS = 8
"""Requests under way at once, if the caller says nothing else."""

WAITS = (0.1, 0.2)
"""Seconds between the three tries of one attempt, as long as no connection could be made."""

ALWAYS = {"Accept-Encoding": "identity", "User-Agent": "hlf-dynamics-sync"}
"""No compression: a small answer could grow without limit."""

ONLY_CONNECTING = {"connect": CONNECT_SECONDS, "read": None, "write": None, "pool": CONNECT_SECONDS}
"""A whole request has a deadline of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outgoing:
    """
    A request as it is sent, however often.
    """

    method: str
    url: str
    headers: Mapping[str, str]
    body: bytes
    answer_bytes: int = MAX_ANSWER_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """
    An answer, its body as received and perhaps cut.
    """

    status: int
    headers: httpx.Headers
    body: bytes = field(repr=False)


class _Trail:
    """
    Whether any byte of a request may have left, as the HTTP library reports it.
    """

    def __init__(self) -> None:
        self.sent = False

    async def __call__(self, event: str, _info: Mapping[str, object]) -> None:
        if event.endswith(".send_request_headers.started"):
            self.sent = True


class Exchange:
    """
    Requests to one server.

    Args:
        lines: one request at a time goes over each, the one used last first, so that few
            connections are kept warm under a light load; closed with this object.
        auth: adds what proves who we are; it is not closed.
        silence: what it is called that no answer came.
    """

    def __init__(
        self,
        *,
        lines: Sequence[httpx.AsyncBaseTransport],
        auth: httpx.Auth,
        silence: Silence = DYNAMICS_IS_SILENT,
    ) -> None:
        self._lines = tuple(lines)
        self._auth = auth
        self._silence = silence
        self._idle: asyncio.LifoQueue[httpx.AsyncBaseTransport] = asyncio.LifoQueue()
        for line in reversed(self._lines):
            self._idle.put_nowait(line)

    async def aclose(self) -> None:
        """
        Close the connections.
        """
        for line in self._lines:
            await line.aclose()

    async def answer(self, outgoing: Outgoing, seconds: float) -> Answer | DeliveryError:
        """
        The answer, or what went wrong instead.

        A value, so that no exception of the HTTP library, whose text may hold a header, hangs
        on the error that is raised.

        Raises:
            DeliveryError: nothing proves who we are, so nothing was sent.
        """
        trail = _Trail()
        try:
            async with asyncio.timeout(seconds), self._line() as line:
                return await self._try(line, outgoing, trail)
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            return error_from_exception(error, sent=trail.sent, silence=self._silence)

    @asynccontextmanager
    async def _line(self) -> AsyncIterator[httpx.AsyncBaseTransport]:
        """
        A line that nobody else uses meanwhile.
        """
        line = await self._idle.get()
        try:
            yield line
        finally:
            self._idle.put_nowait(line)

    async def _try(
        self, line: httpx.AsyncBaseTransport, outgoing: Outgoing, trail: _Trail
    ) -> Answer:
        """
        Ask once, and again as long as it certainly did not reach the server.
        """
        for seconds in WAITS:
            try:
                return await self._ask(line, outgoing, trail)
            except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
                if is_certificate_error(error):  # which no new try will mend
                    raise
            await asyncio.sleep(seconds)
        return await self._ask(line, outgoing, trail)

    async def _ask(
        self, line: httpx.AsyncBaseTransport, outgoing: Outgoing, trail: _Trail
    ) -> Answer:
        request = httpx.Request(
            outgoing.method,
            outgoing.url,
            content=outgoing.body,
            headers={**ALWAYS, **outgoing.headers},
            extensions={"timeout": ONLY_CONNECTING, "trace": trail},
        )
        response = await self._send(line, request)
        body = await capped_body(response, limit=outgoing.answer_bytes)
        return Answer(status=response.status_code, headers=response.headers, body=body)

    async def _send(self, line: httpx.AsyncBaseTransport, request: httpx.Request) -> httpx.Response:
        """
        The answer, unread, to a request that proves who we are.
        """
        async with aclosing(self._auth.async_auth_flow(request)) as authorised:
            request = await anext(authorised)
            while True:
                response = await line.handle_async_request(request)
                try:
                    request = await authorised.asend(response)
                except StopAsyncIteration:
                    return response


def own_lines(
    count: int = CONNECTIONS, tls: ssl.SSLContext | None = None
) -> list[httpx.AsyncBaseTransport]:
    """
    Connections that each stand alone: a pool looks through all it has for every request, and
    with 50 that takes most of the time (measured).

    Args:
        count: so many requests may be under way at once.
        tls: what certificates to trust; the system's by default.
    """
    tls = tls or ssl.create_default_context()
    return [isolated_line(tls) for _ in range(count)]


def error_from_exception(
    error: Exception, *, sent: bool, silence: Silence = DYNAMICS_IS_SILENT
) -> DeliveryError:
    """
    What it means that no answer came.

    Args:
        sent: some of the request may have reached the server, so it may yet take effect.
    """
    name = type(error).__name__
    if not sent and is_certificate_error(error):
        return CERTIFICATE.error(name)
    meaning = _meaning(error, silence)
    return meaning.error(name, doubtful=sent)


def _meaning(error: Exception, silence: Silence) -> Meaning:
    match error:
        case httpx.ConnectError() | httpx.ConnectTimeout() | httpx.PoolTimeout():
            return silence.unreachable
        case httpx.TimeoutException() | TimeoutError():
            return silence.timeout
        case httpx.InvalidURL() | httpx.UnsupportedProtocol() | httpx.LocalProtocolError():
            return INVALID_ADDRESS
        case httpx.RemoteProtocolError():
            return silence.incomplete
        case _:  # also an OSError of TLS, which httpx lets through after the handshake
            return silence.lost
