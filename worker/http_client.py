"""
HTTP as everything here speaks it: one request and its answer, and nothing remembered between.

    send ── no cookie, proxy, redirect or compression ──► an answer, cut if it is long
              └─ none? ── which of six reasons, and in its trail whether anything was sent

The only importer of the HTTP library. aiohttp takes a quarter of the processor that httpx takes
for the same request (measured), which is most of what an event costs.
"""

from __future__ import annotations

import ipaddress
import ssl
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Self

import aiohttp
from yarl import URL

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import SimpleNamespace, TracebackType

MAX_ANSWER_BYTES = 64 * 1024
"""No answer is read beyond this: an honest one has a few hundred bytes, a token 2 KiB."""

CONNECT_SECONDS = 2.0
"""For one connection, its name included; whoever asks sets a deadline for the whole."""

KEEP_ALIVE_SECONDS = 30.0
"""Below the idle time after which gateways close, so a request seldom meets a closing one."""

ALWAYS = {"Accept-Encoding": "identity", "User-Agent": "hlf-dynamics-sync"}
"""No compression: a small answer could grow without limit."""

Reason = Literal["address", "certificate", "unreachable", "lost", "incomplete"]
"""
Why there is no answer: no address that can be asked, a certificate that no new try will mend, no
connection, one that broke, or something that is no whole answer.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outgoing:
    """
    A request as it is sent, however often.

    Args:
        answer_bytes: no more is read of the answer's body.
    """

    method: str
    url: URL
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    answer_bytes: int = MAX_ANSWER_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """
    An answer, its body as received and perhaps cut; names of headers are in any spelling.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes = field(repr=False)

    @property
    def is_success(self) -> bool:
        """
        Any status from 200 to 299.
        """
        return self.status // 100 == 2  # noqa: PLR2004 (the hundred of successes)


@dataclass(slots=True)
class Trail:
    """
    What is known of a request that is under way, or was given up.

    Args:
        sent: some of it may have reached the server, so it may yet take effect.
    """

    sent: bool = False


class NoAnswerError(Exception):
    """
    There is no whole answer.

    Args:
        name: of the library's error. Its text is not kept: it may hold an address or a header.
    """

    def __init__(self, reason: Reason, name: str) -> None:
        super().__init__(f"No answer: {reason} ({name}).")
        self.reason = reason
        self.name = name


class HttpClient:
    """
    An HTTP client that trusts, follows and remembers nothing it was not told to.

    No proxy or certificate from the environment, no redirects, no cookies (Dataverse's bind a
    client to one web server: Microsoft Learn, "Send parallel requests"). What changes something
    (PATCH, POST) is sent once; a GET whose kept connection broke, once more. For one event loop.
    It limits neither how many requests are under way nor how long: who asks does.

    Args:
        tls: what certificates to trust; the system's by default.
        keep_alive: connections are kept for the next request. Where it is minutes away, the other
            side may have closed one meanwhile, and the request would be lost.
    """

    def __init__(self, *, tls: ssl.SSLContext | None = None, keep_alive: bool = True) -> None:
        self._tls = tls
        self._keep_alive = keep_alive
        self._opened: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """
        Close the connections.
        """
        if self._opened is not None:
            await self._opened.close()

    async def send(self, outgoing: Outgoing, trail: Trail | None = None) -> Answer:
        """
        Send it, and read the answer; nothing of it is decoded.

        Args:
            trail: is written to as the request goes along, so that it can be read whatever
                becomes of it, a cancellation included.

        Raises:
            NoAnswerError: there is none. No exception of the library hangs on it.
        """
        try:
            return await self._asked(outgoing, trail)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            failure = NoAnswerError(_reason(error), type(error).__name__)
            if failure.reason == "address" and trail is not None:
                trail.sent = False  # the library had told of it before it wrote the headers
        raise failure

    async def _asked(self, outgoing: Outgoing, trail: Trail | None) -> Answer:
        async with self._session().request(
            outgoing.method,
            outgoing.url,
            data=outgoing.body or None,
            headers=outgoing.headers,
            allow_redirects=False,
            trace_request_ctx=trail,
        ) as response:
            body = await _capped(response, outgoing.answer_bytes)
        return Answer(status=response.status, headers=response.headers, body=body)

    def _session(self) -> aiohttp.ClientSession:
        """
        The connections, which only a running loop can have.
        """
        if self._opened is None:
            self._opened = aiohttp.ClientSession(
                auto_decompress=False,
                connector=self._connector(),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers=ALWAYS,
                timeout=aiohttp.ClientTimeout(total=None, connect=CONNECT_SECONDS),
                trace_configs=[_leaving_a_trail()],
            )
        return self._opened

    def _connector(self) -> aiohttp.TCPConnector:
        tls = True if self._tls is None else self._tls
        if self._keep_alive:
            return aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_SECONDS, ssl=tls)
        return aiohttp.TCPConnector(limit=0, force_close=True, ssl=tls)


def _leaving_a_trail() -> aiohttp.TraceConfig:
    async def sending(
        _session: aiohttp.ClientSession,
        context: SimpleNamespace,
        _params: aiohttp.TraceRequestHeadersSentParams,
    ) -> None:
        # In spite of its name it is called before the first byte is written.
        if context.trace_request_ctx is not None:
            context.trace_request_ctx.sent = True

    config = aiohttp.TraceConfig()
    config.on_request_headers_sent.append(sending)
    return config


async def _capped(response: aiohttp.ClientResponse, limit: int) -> bytes:
    """
    The body, at most `limit` bytes of it. One that is longer is cut, and its connection closed.
    """
    body = bytearray()
    while piece := await response.content.readany():
        body += piece
        if len(body) > limit:
            response.close()
            break
    return bytes(body[:limit])


def _reason(error: Exception) -> Reason:
    match error:
        case aiohttp.InvalidURL() | aiohttp.NonHttpUrlClientError():
            return "address"
        case aiohttp.ClientConnectorCertificateError() | ssl.SSLCertVerificationError():
            return "certificate"
        case aiohttp.ClientConnectorError() | aiohttp.ConnectionTimeoutError():
            return "unreachable"
        case (
            aiohttp.ServerDisconnectedError()
            | aiohttp.ClientPayloadError()
            | aiohttp.ClientResponseError()
        ):
            return "incomplete"
        case aiohttp.ClientError() | OSError():  # also one of TLS after the handshake
            return "lost"
        case _:  # a header, or an address, that cannot be written
            return "address"


def checked_address(name: str, url: str, *, path: bool = False) -> URL:
    """
    A URL that a secret may be sent to.

    Args:
        name: of the setting, as the start of a sentence.
        path: it may have one.

    Raises:
        ValueError: no https (plain http is for this machine only), or more than a host, a
            port and perhaps a path in it. The URL itself is not repeated: it may hold a password.
    """
    address = parsed_address(url)
    if address is None:
        raise ValueError(f"{name} must be an address like https://host.example.")
    if not is_private(address):
        raise ValueError(f"{name} must start with https://; plain http is for loopback hosts only.")
    if address.raw_user or address.raw_password or address.query_string or address.raw_fragment:
        path_too = ", and a path" if path else ""
        raise ValueError(f"{name} must be a scheme and a host (and a port{path_too}) only.")
    if address.raw_path.strip("/") and not path:
        raise ValueError(f"{name} must be a scheme and a host (and a port) only.")
    return address


def parsed_address(url: str) -> URL | None:
    """
    A URL of http or https with a host; None if it is none.
    """
    try:
        address = URL(url)
    except (ValueError, TypeError):
        return None
    as_written = url.isprintable() and " " not in url  # the library leaves line ends out
    has_place = address.scheme in {"http", "https"} and address.raw_host
    return address if as_written and has_place else None


def is_private(address: URL) -> bool:
    """
    Whether what is sent there stays between us: https, or plain http on this machine.
    """
    return address.scheme == "https" or is_loopback(address.host or "")


def is_loopback(host: str) -> bool:
    """
    Whether this host is this machine, so that nobody else can listen.
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
