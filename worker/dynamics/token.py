"""
The token of Entra ID: fetched, kept, renewed, and sent to one host only.

    request ──► is it for the resource's host? ──no──► ConfigurationError, nothing is sent
                     │ yes
                token fresh? ──no──► renewal, one at a time, shared by all who wait
                     │ yes
                send ──► 401 ──► renewal instead of that token ──► send once more

Also here, because everything that holds a secret needs it: an HTTP client that carries
nothing from one request or organisation to the next (`isolated_http`).
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import http.cookiejar
import ipaddress
import math
import re
import ssl
import time
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from http import HTTPStatus
from typing import TYPE_CHECKING, NoReturn, cast

import httpx
import structlog
from typing_extensions import override

from outbox.errors import DeliveryError
from worker.dynamics.errors import (
    CERTIFICATE,
    OTHER_HOST,
    SECRET_UNREADABLE,
    TOKEN_UNAVAILABLE,
    error_from_token_answer,
    json_object,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

log = structlog.get_logger(__name__)

MAX_ANSWER_BYTES = 64 * 1024
"""No answer is read beyond this: an honest one has a few hundred bytes, a token 2 KiB."""

MAX_IDLE_CONNECTIONS = 10
"""That a client keeps open for the next request."""

CONNECT_SECONDS = 2.0
"""For one connection; a whole request has its own deadline."""

KEEP_ALIVE_SECONDS = 30.0
"""Below the idle time after which gateways close, so a request seldom meets a closing one."""

TOKEN_SECONDS = 5.0
"""For one token request, whoever waits for it."""

EARLY_SECONDS = 300.0
"""How long before its end a token is renewed, or 10 % of its life if that is less."""

EARLY_SHARE = 0.1

PATIENCE_SECONDS = 1.0
"""How long a request waits for an early renewal before it goes with the token that is left."""

POSTPONED_SECONDS = 30.0
"""After an early renewal that failed, until the next one."""

LONGEST_LIFE_SECONDS = 86_400.0
"""A token is not kept for longer than a day, whatever its `expires_in` says."""

_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]{0,252}")
_BEARER = re.compile(r"[\x21-\x7e]+")
_WHOLE_SECONDS = re.compile(r"[0-9]{1,9}")


def fits_in_a_header(secret: str) -> bool:
    """
    Whether it can follow "Bearer " as it is: visible ASCII, and some of it.
    """
    return _BEARER.fullmatch(secret) is not None


def isolated_http(tls: ssl.SSLContext | None = None) -> httpx.AsyncClient:
    """
    An HTTP client that trusts, follows and remembers nothing it was not told to.

    No proxy or certificate from the environment, no redirects, no cookies (Dataverse's bind a
    client to one web server: Microsoft Learn, "Send parallel requests"), no compression (a
    small answer could grow without limit). Its timeouts are for connecting only: the caller
    sets a deadline for the whole, and limits how many requests are under way at once. The pool
    must not: measured with httpcore 1.0.9, a request that is cancelled while it waits for a
    place there can take the place with it, and ten such requests stop the client for good.

    Args:
        tls: what certificates to trust; the system's by default.
    """
    return httpx.AsyncClient(
        verify=tls or ssl.create_default_context(),
        trust_env=False,
        follow_redirects=False,
        cookies=http.cookiejar.CookieJar(http.cookiejar.DefaultCookiePolicy(allowed_domains=[])),
        headers={"Accept-Encoding": "identity", "User-Agent": "hlf-dynamics-sync"},
        timeout=httpx.Timeout(None, connect=CONNECT_SECONDS, pool=CONNECT_SECONDS),
        limits=httpx.Limits(
            max_connections=None,
            max_keepalive_connections=MAX_IDLE_CONNECTIONS,
            keepalive_expiry=KEEP_ALIVE_SECONDS,
        ),
        event_hooks={"response": [_forget_location]},
    )


def isolated_line(tls: ssl.SSLContext) -> httpx.AsyncHTTPTransport:
    """
    One connection, kept open between requests, and nothing around it: what `isolated_http`
    has to be forbidden (redirects, cookies, proxies) is not there, and a request takes a third
    less of the processor.

    Args:
        tls: what certificates to trust.
    """
    return httpx.AsyncHTTPTransport(
        verify=tls,
        trust_env=False,
        limits=httpx.Limits(
            max_connections=None, max_keepalive_connections=1, keepalive_expiry=KEEP_ALIVE_SECONDS
        ),
    )


async def _forget_location(response: httpx.Response) -> None:
    """
    Keep httpx from parsing the target of a redirect: it does so even if it may not follow,
    and fails on nonsense.
    """
    with contextlib.suppress(KeyError):
        del response.headers["location"]


async def capped_body(response: httpx.Response, *, limit: int = MAX_ANSWER_BYTES) -> bytes:
    """
    The body of a streamed answer as it was sent, at most `limit` bytes of it.

    Nothing is decoded. An answer that is longer is cut, and its connection is closed.
    """
    body = bytearray()
    try:
        async with contextlib.aclosing(_raw(response)) as pieces:
            async for piece in pieces:
                body += piece
                if len(body) > limit:
                    break
    finally:
        await response.aclose()
    return bytes(body[:limit])


def _raw(response: httpx.Response) -> AsyncGenerator[bytes, None]:
    return cast("AsyncGenerator[bytes, None]", response.aiter_raw())  # one that can be closed


def is_certificate_error(error: BaseException) -> bool:
    """
    Whether a failed connection is due to a certificate, which no new try will mend.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def checked_address(name: str, url: str, *, path: bool = False) -> httpx.URL:
    """
    A URL that a secret may be sent to.

    Args:
        name: of the setting, as the start of a sentence.
        path: it may have one.

    Raises:
        ValueError: no https (plain http is for this machine only), or more than a host, a
            port and perhaps a path in it. The URL itself is not repeated: it may hold a password.
    """
    try:
        address = httpx.URL(url)
    except (httpx.InvalidURL, TypeError):
        address = httpx.URL()
    if not address.host or address.scheme not in {"http", "https"}:
        raise ValueError(f"{name} must be an address like https://host.example.")
    if address.scheme == "http" and not is_loopback(address.host):
        raise ValueError(f"{name} must start with https://; plain http is for loopback hosts only.")
    if address.userinfo or address.query or address.fragment:
        path_too = ", and a path" if path else ""
        raise ValueError(f"{name} must be a scheme and a host (and a port{path_too}) only.")
    if address.path.strip("/") and not path:
        raise ValueError(f"{name} must be a scheme and a host (and a port) only.")
    return address


def is_loopback(host: str) -> bool:
    """
    Whether this host is this machine, so that nobody else can listen.
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port  # httpx has lowered the first two and dropped :443


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessToken:
    """
    A bearer token and its life, in seconds of the clock that `EntraAuth` was given.

    Args:
        renew_at: from then on a new one should be fetched.
        expires_at: from then on it must not be used.
    """

    value: str = field(repr=False)
    renew_at: float
    expires_at: float


def token_from_answer(body: bytes, *, asked_at: float) -> AccessToken | None:
    """
    The token in a successful answer of the token endpoint.

    Source: Microsoft Learn, "Microsoft identity platform and the OAuth 2.0 client credentials
    flow". `expires_in` may also be a string of digits, as older endpoints send it.

    Args:
        asked_at: when the request was made; the token's life counts from there.

    Returns:
        None if there is no bearer token with a life in it.
    """
    answer = json_object(body) or {}
    value, life = answer.get("access_token"), _life(answer.get("expires_in"))
    kind = answer.get("token_type", "Bearer")
    if not isinstance(value, str) or not fits_in_a_header(value) or life is None:
        return None
    if not isinstance(kind, str) or kind.lower() != "bearer":
        return None
    early = min(EARLY_SECONDS, life * EARLY_SHARE)
    return AccessToken(value=value, renew_at=asked_at + life - early, expires_at=asked_at + life)


def _life(raw: object) -> float | None:
    """
    Seconds from `expires_in`, or None if it is no such number.
    """
    if isinstance(raw, str) and _WHOLE_SECONDS.fullmatch(raw):
        raw = int(raw)
    if isinstance(raw, bool) or not isinstance(raw, int | float) or math.isnan(raw) or raw < 0:
        return None
    return float(min(raw, LONGEST_LIFE_SECONDS))


class EntraAuth(httpx.Auth):
    """
    Gives requests a token of one application, by the client credentials grant.

    Source: Microsoft Learn, "Microsoft identity platform and the OAuth 2.0 client credentials
    flow". Only for an `httpx.AsyncClient`, and for one event loop.

    Args:
        authority: of Entra ID; https://login.microsoftonline.com in the public cloud.
        tenant_id: a GUID or a domain.
        secret: called for each token request, so that a secret that was rotated is picked up;
            a DeliveryError that it raises is the outcome, anything else is "secret_unreadable".
        resource: the URL of Dynamics; the token is for its host and goes nowhere else.
        http: for the authority alone; closed with this object.
        clock: monotonic seconds.
        seconds: deadline of one token request.

    Raises:
        ValueError: an address or the tenant is not usable; one sentence.
    """

    def __init__(
        self,
        *,
        authority: str,
        tenant_id: str,
        client_id: str,
        secret: Callable[[], str],
        resource: str,
        http: httpx.AsyncClient,
        clock: Callable[[], float] = time.monotonic,
        seconds: float = TOKEN_SECONDS,
    ) -> None:
        if not _TENANT.fullmatch(tenant_id):
            raise ValueError("The tenant must be a GUID or a domain.")
        endpoint = checked_address("The authority", authority)
        self._resource = checked_address("The Dynamics URL", resource)
        self._endpoint = endpoint.copy_with(path=f"/{tenant_id}/oauth2/v2.0/token")
        self._scope = f"{str(self._resource).rstrip('/')}/.default"
        self._client_id = client_id
        self._secret = secret
        self._http = http
        self._clock = clock
        self._seconds = seconds
        self._token: AccessToken | None = None
        self._renewal: asyncio.Task[AccessToken | DeliveryError] | None = None
        self._context = contextvars.copy_context()  # a renewal is logged as nobody's own

    @override
    def __repr__(self) -> str:
        return f"EntraAuth(resource={str(self._resource)!r}, client_id={self._client_id!r})"

    async def prove(self) -> None:
        """
        Show that a token can be had, without using it.

        Raises:
            DeliveryError: none could be had.
        """
        await self._fresh_token()

    async def aclose(self) -> None:
        """
        Close the connections to the authority; for when no request is under way any more.
        """
        if (renewal := self._renewal) is not None:
            renewal.cancel()
            await asyncio.wait({renewal})
        await self._http.aclose()

    @override
    def sync_auth_flow(self, request: httpx.Request) -> NoReturn:
        raise RuntimeError("EntraAuth is for httpx.AsyncClient only.")

    @override
    async def async_auth_flow(
        self, request: httpx.Request
    ) -> AsyncGenerator[httpx.Request, httpx.Response]:
        """
        Send with a token; after a 401, once more with another one.

        Raises:
            ConfigurationError: the request is for another host; nothing was sent.
            DeliveryError: no token could be had.
        """
        if _origin(request.url) != _origin(self._resource):
            raise OTHER_HOST.error()
        token = await self._fresh_token()
        response = yield _authorized(request, token)
        if response.status_code == HTTPStatus.UNAUTHORIZED:
            await drop(response)
            self._forget(token)
            yield _authorized(request, await self._fresh_token())

    def _forget(self, refused: AccessToken) -> None:
        """
        Keep a refused token no longer, unless another request has replaced it already.
        """
        if self._token is not None and self._token.value == refused.value:
            self._token = None

    async def _fresh_token(self) -> AccessToken:
        """
        The token that is kept, or a new one.

        Raises:
            DeliveryError: there is none, and none could be had.
        """
        token, now = self._token, self._clock()
        if token and now < token.renew_at:
            return token
        if token and now < token.expires_at:
            return await self._early_renewal() or token
        outcome = await self._renewal_of_all()
        if isinstance(outcome, DeliveryError):
            raise outcome.with_traceback(None)  # it is raised once for each who waited
        return outcome

    async def _early_renewal(self) -> AccessToken | None:
        """
        A new token, or None if it cannot be had soon; the old one is still good.
        """
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                outcome = await self._renewal_of_all()
        except TimeoutError:
            return None
        return outcome if isinstance(outcome, AccessToken) else None

    async def _renewal_of_all(self) -> AccessToken | DeliveryError:
        """
        The outcome of the renewal under way, which is begun if there is none.

        The renewal is a task of its own, so whoever stops waiting does not stop it for others.
        """
        if self._renewal is None:
            self._renewal = asyncio.create_task(self._renew(), context=self._context.copy())
        return await asyncio.shield(self._renewal)

    async def _renew(self) -> AccessToken | DeliveryError:
        try:
            outcome = await self._ask()
        finally:
            self._renewal = None
        if isinstance(outcome, AccessToken):
            self._token = outcome
        else:
            log.warning("token.refused", code=outcome.code)
            self._postpone()
        return outcome

    def _postpone(self) -> None:
        """
        Leave the authority alone for a while, if there is a token to go on with.
        """
        if self._token is not None:
            again_at = min(self._clock() + POSTPONED_SECONDS, self._token.expires_at)
            self._token = replace(self._token, renew_at=again_at)

    async def _ask(self) -> AccessToken | DeliveryError:
        """
        One token request. The failure is a value, so that no exception of the HTTP library,
        whose text may hold what was sent, hangs on the error that is raised.
        """
        asked_at = self._clock()
        try:
            request = self._request()
        except DeliveryError as error:  # the secret's reader has said itself what is wrong
            return error
        except Exception as error:  # noqa: BLE001 - whoever reads the secret may fail in any way
            return SECRET_UNREADABLE.error(type(error).__name__)
        try:
            async with asyncio.timeout(self._seconds):
                response = await self._http.send(
                    request, stream=True, auth=None, follow_redirects=False
                )
                return _outcome(response, await capped_body(response), asked_at=asked_at)
        except TimeoutError:
            return TOKEN_UNAVAILABLE.error("no answer in time")
        except (httpx.HTTPError, OSError) as error:
            meaning = CERTIFICATE if is_certificate_error(error) else TOKEN_UNAVAILABLE
            return meaning.error(type(error).__name__)

    def _request(self) -> httpx.Request:
        return self._http.build_request(
            "POST",
            self._endpoint,
            headers={"Accept": "application/json"},
            data={
                "grant_type": "client_credentials",
                "client_id": self._client_id,
                "client_secret": self._secret(),
                "scope": self._scope,
            },
        )


def _outcome(
    response: httpx.Response, body: bytes, *, asked_at: float
) -> AccessToken | DeliveryError:
    if response.status_code == HTTPStatus.OK:
        token = token_from_answer(body, asked_at=asked_at)
        if token is not None:
            return token
    return error_from_token_answer(
        response.status_code, response.headers, body, now=datetime.now(UTC)
    )


def _authorized(request: httpx.Request, token: AccessToken) -> httpx.Request:
    request.headers["Authorization"] = f"Bearer {token.value}"
    return request


async def drop(response: httpx.Response) -> None:
    """
    Close an answer unread: httpx would read all of it before sending again, however long.
    """
    unread, response.stream = response.stream, httpx.ByteStream(b"")
    if isinstance(unread, httpx.AsyncByteStream):
        await unread.aclose()
