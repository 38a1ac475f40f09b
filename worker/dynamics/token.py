"""
The token of Entra ID: fetched, kept, renewed, and sent to one host only.

    request ──► is it for the resource's host? ──no──► ConfigurationError, nothing is sent
                     │ yes
                token fresh? ──no──► renewal, one at a time, shared by all who wait
                     │ yes
                send ──► 401 ──► renewal instead of that token ──► send once more
"""

from __future__ import annotations

import asyncio
import contextvars
import math
import re
import time
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from http import HTTPStatus
from typing import TYPE_CHECKING
from urllib.parse import urlencode

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
from worker.http_client import NoAnswerError, Outgoing, checked_address

if TYPE_CHECKING:
    from collections.abc import Callable

    from yarl import URL

    from worker.http_client import Answer, HttpClient

log = structlog.get_logger(__name__)

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


def _origin(url: URL) -> tuple[str, str | None, int | None]:
    return url.scheme, url.raw_host, url.port  # :443 is in the last one, written out or not


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


class EntraAuth:
    """
    The token of one application, by the client credentials grant.

    Source: Microsoft Learn, "Microsoft identity platform and the OAuth 2.0 client credentials
    flow". For one event loop.

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
        http: HttpClient,
        clock: Callable[[], float] = time.monotonic,
        seconds: float = TOKEN_SECONDS,
    ) -> None:
        if not _TENANT.fullmatch(tenant_id):
            raise ValueError("The tenant must be a GUID or a domain.")
        endpoint = checked_address("The authority", authority)
        self._resource = checked_address("The Dynamics URL", resource)
        self._endpoint = endpoint.with_path(f"/{tenant_id}/oauth2/v2.0/token")
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

    async def authorization(self, url: URL) -> str:
        """
        The value of the header.

        Raises:
            ConfigurationError: it is for another host; no token was fetched.
            DeliveryError: no token could be had.
        """
        if _origin(url) != _origin(self._resource):
            raise OTHER_HOST.error()
        token = await self._fresh_token()
        return f"Bearer {token.value}"

    async def another(self, url: URL, refused: str) -> str:
        """
        The value to try once more with.

        Raises:
            DeliveryError: no token could be had.
        """
        self._forget(refused.removeprefix("Bearer "))
        return await self.authorization(url)

    def _forget(self, refused: str) -> None:
        """
        Keep a refused token no longer, unless another request has replaced it already.
        """
        if self._token is not None and self._token.value == refused:
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
                answer = await self._http.send(request)
        except TimeoutError:
            return TOKEN_UNAVAILABLE.error("no answer in time")
        except NoAnswerError as silence:
            meaning = CERTIFICATE if silence.reason == "certificate" else TOKEN_UNAVAILABLE
            return meaning.error(silence.name)
        return _outcome(answer, asked_at=asked_at)

    def _request(self) -> Outgoing:
        form = {
            "grant_type": "client_credentials",
            "client_id": self._client_id,
            "client_secret": self._secret(),
            "scope": self._scope,
        }
        return Outgoing(
            method="POST",
            url=self._endpoint,
            headers={
                "Accept": "application/json",
                "Content-Type": "application/x-www-form-urlencoded",
            },
            body=urlencode(form).encode(),
        )


def _outcome(answer: Answer, *, asked_at: float) -> AccessToken | DeliveryError:
    if answer.status == HTTPStatus.OK:
        token = token_from_answer(answer.body, asked_at=asked_at)
        if token is not None:
            return token
    return error_from_token_answer(
        answer.status, answer.headers, answer.body, now=datetime.now(UTC)
    )
