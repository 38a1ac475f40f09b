"""
The way to Dynamics through the Edge Function, which has the credentials; we have a key to it.

    set_visibility ── exchange ──► the function ── token, PATCH ──► Dynamics
                                        │
         200 and its verdict ◄──────────┤   classified there, by the same tables as `errors`
         anything else ◄── platform ────┘   the function is missing, stopped, overrun, closed to us

The function has a target of its own and refuses ours if it is another one: a key that leaks
sets this one field and nothing else. It is in `supabase/functions/hlf-dynamics-sync`.
Source of the platform's answers: Supabase's documentation, "Edge Functions: Status codes".
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from datetime import UTC, datetime
from http import HTTPStatus
from typing import TYPE_CHECKING, Self
from uuid import UUID

import httpx
import structlog
from typing_extensions import override

from outbox.errors import (
    ConfigurationError,
    DeliveryError,
    PermanentError,
    ThrottledError,
    TransientError,
)
from worker.dynamics.client import url_of
from worker.dynamics.errors import (
    MAX_RETRY_AFTER_SECONDS,
    OTHER_HOST,
    REDIRECT_REFUSED,
    Meaning,
    Silence,
    json_object,
    retry_after_seconds,
)
from worker.dynamics.exchange import CONNECTIONS, Answer, Exchange, Outgoing, own_lines
from worker.dynamics.token import checked_address, drop, fits_in_a_header

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncGenerator, Callable, Mapping
    from types import TracebackType

    from worker.dynamics.client import DynamicsTarget

log = structlog.get_logger(__name__)

ANSWERING_SHARE = 0.2
"""Of the time for a request, what is left to the function's answer to come back."""

ANSWERING_SECONDS = 1.0
"""The same, at most."""

KEY_UNUSABLE = Meaning(
    kind=ConfigurationError,
    code="edge_key_unusable",
    says="The key to the Edge Function cannot be read, or is no line of plain characters",
)
KEY_REFUSED = Meaning(
    kind=ConfigurationError,
    code="edge_key_refused",
    says=(
        "The Edge Function does not let us in; check HLF_EDGE_KEY on both sides, and that the"
        " function was deployed with --no-verify-jwt"
    ),
)
MISSING = Meaning(
    kind=ConfigurationError,
    code="edge_missing",
    says="There is no Edge Function at this address; check HLF_EDGE_URL, and deploy it",
)
REFUSED = Meaning(
    kind=ConfigurationError,
    code="edge_refused",
    says="The Edge Function does not take our requests; it may be of another release",
)
RESTRICTED = Meaning(
    kind=ConfigurationError,
    code="edge_restricted",
    says="The Supabase project is restricted; its dashboard says why",
)
THROTTLED = Meaning(
    kind=ThrottledError,
    code="edge_throttled",
    says="The Edge Function's platform asks everybody to wait",
)
FAILED = Meaning(
    kind=TransientError,
    code="edge_failed",
    says="The Edge Function failed; its log says why",
    doubtful=True,
)
UNAVAILABLE = Meaning(
    kind=TransientError,
    code="edge_unavailable",
    says="The Edge Function could not be started, or did not answer its platform in time",
    doubtful=True,
)
STOPPED = Meaning(
    kind=TransientError,
    code="edge_stopped",
    says="The platform stopped the Edge Function, which had used up its memory or time",
    doubtful=True,
)
UNEXPECTED = Meaning(
    kind=TransientError,
    code="edge_unexpected_answer",
    says="The answer is none that the Edge Function gives; check HLF_EDGE_URL",
    doubtful=True,
)
NOT_SET_UP = Meaning(
    kind=ConfigurationError,
    code="edge_not_set_up",
    says="Settings of the Edge Function are missing or wrong",
)
OTHER_ORGANIZATION = Meaning(
    kind=ConfigurationError,
    code="edge_other_organization",
    says="The Edge Function serves another organisation; check HLF_ORGANIZATION_ID, HLF_EDGE_URL",
)
OTHER_TARGET = Meaning(
    kind=ConfigurationError,
    code="edge_other_target",
    says="The Edge Function has another target than we; compare HLF_DYNAMICS_* on both sides",
)
SAID_BY_THE_FUNCTION = {
    "NOT_SET_UP": NOT_SET_UP,
    "OTHER_ORGANIZATION": OTHER_ORGANIZATION,
    "OTHER_TARGET": OTHER_TARGET,
}
"""What it has to say of itself, besides what `errors` says of Dynamics."""

EDGE_IS_SILENT = Silence(
    unreachable=Meaning(
        kind=TransientError,
        code="edge_unreachable",
        says="No connection to the Edge Function could be made",
    ),
    timeout=Meaning(
        kind=TransientError,
        code="edge_timeout",
        says="The Edge Function did not answer in time",
    ),
    lost=Meaning(
        kind=TransientError,
        code="edge_connection_lost",
        says="The connection to the Edge Function broke",
    ),
    incomplete=Meaning(
        kind=TransientError,
        code="edge_incomplete_answer",
        says="The answer of the Edge Function is missing, cut short or no HTTP",
    ),
)

STATUSES: dict[int, Meaning] = {
    HTTPStatus.UNAUTHORIZED: KEY_REFUSED,
    HTTPStatus.PAYMENT_REQUIRED: RESTRICTED,
    HTTPStatus.NOT_FOUND: MISSING,
    HTTPStatus.REQUEST_TIMEOUT: UNAVAILABLE,
    HTTPStatus.TOO_MANY_REQUESTS: THROTTLED,
    HTTPStatus.BAD_GATEWAY: UNAVAILABLE,
    HTTPStatus.SERVICE_UNAVAILABLE: UNAVAILABLE,
    HTTPStatus.GATEWAY_TIMEOUT: UNAVAILABLE,
    546: STOPPED,
}

KINDS: dict[str, type[DeliveryError]] = {
    "transient": TransientError,
    "throttled": ThrottledError,
    "permanent": PermanentError,
    "configuration": ConfigurationError,
}
"""The classes in a verdict."""

_CODE = re.compile(r"[a-z0-9_]{1,64}")


class EdgeKey(httpx.Auth):
    """
    Gives requests the key to one Edge Function, and to no other address.

    Args:
        url: of the function.
        read: called at first and whenever the key was refused, so that one that was rotated
            is picked up; a DeliveryError that it raises is the outcome.

    Raises:
        ValueError: the address is not usable; one sentence.
    """

    def __init__(self, url: str, read: Callable[[], str]) -> None:
        self._url = checked_address("The Edge Function's URL", url, path=True)
        self._read = read
        self._key = ""

    @override
    def __repr__(self) -> str:
        return f"EdgeKey(url={str(self._url)!r})"

    @override
    async def async_auth_flow(
        self, request: httpx.Request
    ) -> AsyncGenerator[httpx.Request, httpx.Response]:
        """
        Send with the key; after a 401 once more, if there is another one by now.

        Raises:
            ConfigurationError: the request is for another address, or there is no key.
        """
        if request.url != self._url:
            raise OTHER_HOST.error()
        key = self._key = self._key or self._current()
        response = yield _with_key(request, key)
        if response.status_code == HTTPStatus.UNAUTHORIZED:
            self._key = self._current()
            if self._key != key:
                await drop(response)
                yield _with_key(request, self._key)

    def _current(self) -> str:
        """
        The key as it is now. The failure of whatever reads it is not what is raised from: it
        may hold the key.
        """
        try:
            key, why = self._read(), "not plain"
        except DeliveryError:
            raise
        except Exception as error:  # noqa: BLE001 - whoever reads the key may fail in any way
            key, why = "", type(error).__name__
        if not fits_in_a_header(key):
            raise KEY_UNUSABLE.error(why)
        return key


def _with_key(request: httpx.Request, key: str) -> httpx.Request:
    request.headers["Authorization"] = f"Bearer {key}"
    return request


class EdgeClient:
    """
    Sets the visibility of records in one Dynamics environment, through the Edge Function.

    Args:
        target: what the function has to have for its own.
        organization_id: whose function it has to be.
        url: of the function.
        exchange: closed with this object.
    """

    def __init__(
        self, target: DynamicsTarget, *, organization_id: UUID, url: str, exchange: Exchange
    ) -> None:
        self.target = target
        self._organization_id = organization_id
        self._url = url
        self._exchange = exchange

    @property
    def takes_mentor_id(self) -> bool:
        """
        Whether rows are addressed by an alternate key, whose value is the mentor's own id.
        """
        return bool(self.target.key)

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
        Close the connections to the function.
        """
        await self._exchange.aclose()

    async def set_visibility(
        self, row: UUID | str, *, visible: bool, seconds: float, correlation_id: UUID
    ) -> None:
        """
        Write the value; returns when Dynamics has confirmed it to the function.

        Args:
            row: GUID of the record, or the value of the alternate key if there is one.
            seconds: for everything; the function has somewhat less, so that it can say what
                it knows when Dynamics is late.
            correlation_id: of the event; the same at each attempt.

        Raises:
            DeliveryError: one of its four classes; doubtful if the value may yet be written.
            ValueError: rows are addressed by GUID, and `row` is none.
        """
        url_of(self.target, row)  # for the ValueError: the function makes the address itself
        change = {"row": str(row), "visible": visible, "correlation_id": str(correlation_id)}
        await self._ask(change, expected="delivered", seconds=seconds)

    async def prove(self, *, seconds: float) -> None:
        """
        Show that the function takes our key, has our target and can get a token.

        Raises:
            DeliveryError: it does not, or cannot.
        """
        await self._ask(None, expected="ready", seconds=seconds)

    async def _ask(
        self, change: Mapping[str, object] | None, *, expected: str, seconds: float
    ) -> None:
        question = {
            "organization_id": str(self._organization_id),
            "target": asdict(self.target),
            "seconds": seconds - min(seconds * ANSWERING_SHARE, ANSWERING_SECONDS),
            "change": change,
        }
        outgoing = Outgoing(
            method="POST",
            url=self._url,
            headers={"Accept": "application/json", "Content-Type": "application/json"},
            body=json.dumps(question, separators=(",", ":")).encode(),
        )
        answer = await self._exchange.answer(outgoing, seconds)
        failure = answer if isinstance(answer, DeliveryError) else _failure(answer, expected)
        if failure is not None:
            raise failure


def edge_client(
    target: DynamicsTarget,
    *,
    organization_id: UUID,
    url: str,
    key: EdgeKey,
    tls: ssl.SSLContext | None = None,
    connections: int = CONNECTIONS,
) -> EdgeClient:
    """
    A client with connections of its own.

    Args:
        tls: what certificates to trust; the system's by default.
        connections: so many requests may be under way at once.
    """
    exchange = Exchange(lines=own_lines(connections, tls), auth=key, silence=EDGE_IS_SILENT)
    return EdgeClient(target, organization_id=organization_id, url=url, exchange=exchange)


def _failure(answer: Answer, expected: str) -> DeliveryError | None:
    """
    What the function has to say that is not what we hoped for, or its platform instead of it.
    """
    verdict = (json_object(answer.body) if answer.status == HTTPStatus.OK else None) or {}
    if verdict.get("outcome") == expected:
        return None
    error = error_from_verdict(verdict) or error_from_platform(
        answer.status, answer.headers, now=datetime.now(UTC)
    )
    log.info(
        "request.refused",
        status=answer.status,
        code=error.code,
        service_request_id=_guid(verdict.get("service_request_id")),
    )
    return error


def error_from_verdict(verdict: dict[str, object]) -> DeliveryError | None:
    """
    What the function says went wrong, or None if this is nothing that it says.
    """
    match verdict:
        case {
            "outcome": "failed",
            "class": str(kind),
            "code": str(code),
            "message": str(message),
            "doubtful": bool(doubtful),
        } if kind in KINDS and _CODE.fullmatch(code):
            if kind == "throttled":
                wait = _seconds(verdict.get("retry_after"))
                return ThrottledError(code, message, retry_after=wait, doubtful=doubtful)
            return KINDS[kind](code, message, doubtful=doubtful)
        case _:
            return None


def error_from_platform(status: int, headers: httpx.Headers, *, now: datetime) -> DeliveryError:
    """
    What it means that something else than the function's verdict came.

    No refusal (4xx) is about a mentor: the function says with 200 what Dynamics has against one.

    Args:
        now: with a time zone; what a date in Retry-After is compared to.
    """
    wait = retry_after_seconds(headers.get("retry-after"), now=now)
    return _platform_meaning(status).error(f"HTTP {status}", retry_after=wait)


def _platform_meaning(status: int) -> Meaning:
    if status < HTTPStatus.MULTIPLE_CHOICES:
        return UNEXPECTED
    if status < HTTPStatus.BAD_REQUEST:
        return REDIRECT_REFUSED
    other = REFUSED if status < HTTPStatus.INTERNAL_SERVER_ERROR else FAILED
    return STATUSES.get(status, other)


def _seconds(raw: object) -> float | None:
    if isinstance(raw, bool) or not isinstance(raw, int | float):
        return None
    return float(min(raw, MAX_RETRY_AFTER_SECONDS)) if raw >= 0 else None


def _guid(raw: object) -> str | None:
    try:
        return str(UUID(str(raw)))
    except ValueError:
        return None
