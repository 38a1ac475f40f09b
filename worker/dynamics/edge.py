"""
The way to Dynamics through the Edge Function, which has the credentials; we have a key to it.

    set_visibility ── exchange ──► the function ── token, PATCH ──► Dynamics
                      an answer ◄───────┴── its platform, if the function cannot answer

The function has a target of its own and refuses ours if it is another one: a key that leaks
sets this one field and nothing else. It is in `supabase/functions/hlf-dynamics-sync`.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime
from http import HTTPStatus
from typing import TYPE_CHECKING, Self
from uuid import UUID

import structlog
from typing_extensions import override

from outbox.errors import DeliveryError
from worker.dynamics.client import url_of
from worker.dynamics.edge_errors import (
    EDGE_IS_SILENT,
    KEY_UNUSABLE,
    error_from_platform,
    error_from_verdict,
)
from worker.dynamics.errors import OTHER_HOST, json_object
from worker.dynamics.exchange import CONNECTIONS, Exchange
from worker.dynamics.token import fits_in_a_header
from worker.http_client import HttpClient, Outgoing, checked_address

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Mapping
    from types import TracebackType

    from yarl import URL

    from worker.dynamics.client import DynamicsTarget
    from worker.http_client import Answer

log = structlog.get_logger(__name__)

ANSWERING_SHARE = 0.2
"""Of the time for a request, what is left to the function's answer to come back."""

ANSWERING_SECONDS = 1.0
"""The same, at most."""


class EdgeKey:
    """
    The key to one Edge Function, and to no other address.

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

    async def authorization(self, url: URL) -> str:
        """
        The value of the header.

        Raises:
            ConfigurationError: it is for another address, or there is no key.
        """
        if url != self._url:
            raise OTHER_HOST.error()
        self._key = self._key or self._current()
        return f"Bearer {self._key}"

    async def another(self, url: URL, refused: str) -> str | None:
        """
        The key as it is by now, if it is another one.

        Raises:
            ConfigurationError: there is none any more.
        """
        self._key = self._current()
        current = await self.authorization(url)
        return None if current == refused else current

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
        self, target: DynamicsTarget, *, organization_id: UUID, url: URL, exchange: Exchange
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

    Raises:
        ValueError: the address is not usable; one sentence.
    """
    exchange = Exchange(HttpClient(tls=tls), key, places=connections, silence=EDGE_IS_SILENT)
    address = checked_address("The Edge Function's URL", url, path=True)
    return EdgeClient(target, organization_id=organization_id, url=address, exchange=exchange)


def _failure(answer: Answer, expected: str) -> DeliveryError | None:
    """
    What the function has to say that is not what we hoped for, or its platform instead of it.
    """
    verdict = (json_object(answer.body) if answer.status == HTTPStatus.OK else None) or {}
    if verdict.get("outcome") == expected:
        return None
    error = error_from_verdict(verdict) or error_from_platform(
        answer.status, answer.headers.get("retry-after"), now=datetime.now(UTC)
    )
    log.info(
        "request.refused",
        status=answer.status,
        code=error.code,
        service_request_id=_guid(verdict.get("service_request_id")),
    )
    return error


def _guid(raw: object) -> str | None:
    try:
        return str(UUID(str(raw)))
    except ValueError:
        return None
