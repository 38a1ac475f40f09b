"""
One request that sets one column of one record, and nothing else; or a batch of such requests.

    set_visibility   ─┬─ exchange: within a deadline, with a token ──► an answer
    set_visibilities ─┘             └─ not the expected one? ──► an error that says what it means

The permission is "write this field": nothing is ever read, and no answer with data is asked
for. Source of the request's form: Microsoft Learn, "Update and delete table rows using the
Web API"; of its headers: Microsoft Learn, "Compose HTTP requests and handle errors".
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from http import HTTPStatus
from typing import TYPE_CHECKING, Literal, Self
from urllib.parse import quote
from uuid import UUID, uuid4

import structlog
from yarl import URL

from outbox.errors import DeliveryError, PermanentError
from worker.dynamics import multipart
from worker.dynamics.errors import INCOMPLETE_ANSWER, error_from_answer, json_object
from worker.dynamics.exchange import CONNECTIONS, Exchange
from worker.http_client import Answer, HttpClient, Outgoing, checked_address

if TYPE_CHECKING:
    import ssl
    from collections.abc import Mapping, Sequence
    from types import TracebackType

    from worker.dynamics.exchange import Proof

log = structlog.get_logger(__name__)

API_PATH = "/api/data/v9.2"

PART_BYTES = 4 * 1024
"""Of the answer to a batch, no more is read for each operation in it."""

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_REQUEST_IDS = ("x-ms-service-request-id", "req_id", "x-ms-request-id")


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicsTarget:
    """
    Where in Dynamics the visibility is written.

    Args:
        url: of the environment: scheme and host.
        entity_set: of the table, so a plural; for "patch".
        key: column of an alternate key, or "" to address rows by their GUID; for "patch".
        column: the yes/no column; for "patch".
        operation: "patch" a row, or call a Custom API ("action").
        action: unique name of the Custom API; for "action".

    Raises:
        ValueError: one sentence about the first thing that is wrong.
    """

    url: str
    entity_set: str = "contacts"
    key: str = ""
    column: str = "hlf_portalvisible"
    operation: Literal["patch", "action"] = "patch"
    action: str = ""

    def __post_init__(self) -> None:
        checked_address("The Dynamics URL", self.url)
        if self.operation not in {"patch", "action"}:
            raise ValueError('The operation must be "patch" or "action".')
        _require_identifier("The entity set", self.entity_set)
        _require_identifier("The column", self.column)
        if self.key:
            _require_identifier("The alternate key", self.key)
        if self.action or self.operation == "action":
            _require_identifier("The action", self.action)

    @property
    def base_url(self) -> str:
        """
        Of the Web API, without a slash at the end; its host as it is sent.
        """
        return _web_api(self.url)


@cache
def _web_api(url: str) -> str:
    return str(checked_address("The Dynamics URL", url)).rstrip("/") + API_PATH


def _require_identifier(name: str, value: str) -> None:
    if not _IDENTIFIER.fullmatch(value):
        raise ValueError(f"{name} must be a name of letters, digits and underscores.")


def url_of(target: DynamicsTarget, row: UUID | str) -> str:
    """
    The address that a request for this row goes to.

    Raises:
        ValueError: rows are addressed by GUID, and `row` is none.
    """
    if target.operation == "action":
        return f"{target.base_url}/{target.action}"
    if target.key:
        return f"{target.base_url}/{target.entity_set}({target.key}={string_literal(str(row))})"
    return f"{target.base_url}/{target.entity_set}({UUID(str(row))})"


def string_literal(value: str) -> str:
    """
    A string as a key in a URL: in single quotes, those inside doubled, percent-encoded.

    Source: OData Version 4.01, Part 2: URL Conventions, section 2 (the encoding) and its ABNF
    (rule SQUOTE-in-string).
    """
    return f"'{quote(value.replace(chr(39), chr(39) * 2), safe='')}'"


def body_of(target: DynamicsTarget, row: UUID | str, *, visible: bool) -> bytes:
    """
    The JSON that a request for this row carries: the one value, or a Custom API's arguments.
    """
    fields: dict[str, str | bool] = {target.column: visible}
    if target.operation == "action":
        fields = {"MentorId": str(row), "Visible": visible}
    return json.dumps(fields, separators=(",", ":")).encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """
    A value to write.

    Args:
        row: GUID of the record, or the value of the alternate key if there is one.
        correlation_id: of the event; the same at each attempt.
    """

    row: UUID | str
    visible: bool
    correlation_id: UUID


class BatchRefusedError(Exception):
    """
    A batch was refused as such: nothing was written, and smaller ones may be taken.
    """

    def __init__(self, code: str) -> None:
        super().__init__(f"The batch was refused ({code}).")
        self.code = code


class DynamicsClient:
    """
    Sets the visibility of records in one Dynamics environment.

    Args:
        exchange: closed with this object.
    """

    def __init__(self, target: DynamicsTarget, exchange: Exchange) -> None:
        self.target = target
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
        Close the connections to Dynamics.
        """
        await self._exchange.aclose()

    async def set_visibility(
        self, row: UUID | str, *, visible: bool, seconds: float, correlation_id: UUID
    ) -> None:
        """
        Write the value; returns when Dynamics has confirmed it.

        Args:
            row: GUID of the record, or the value of the alternate key if there is one.
            seconds: for everything: token, connection, new tries, the answer's last byte.
            correlation_id: of the event; the same at each attempt.

        Raises:
            DeliveryError: one of its four classes; doubtful if the value may yet be written.
            ValueError: rows are addressed by GUID, and `row` is none.
        """
        change = Change(row=row, visible=visible, correlation_id=correlation_id)
        answer = await self._exchange.answer(_outgoing(self._part(change)), seconds)
        failure = answer if isinstance(answer, DeliveryError) else self._failure(answer)
        if failure is not None:
            raise failure

    async def set_visibilities(
        self, changes: Sequence[Change], *, seconds: float
    ) -> list[DeliveryError | None]:
        """
        Write several values in one request.

        Args:
            changes: at most 1,000.
            seconds: as above, for all of them.

        Returns:
            For each, in their order, what went wrong, or None.

        Raises:
            BatchRefusedError: Dynamics takes no such batch; nothing was written.
            DeliveryError: no token could be had; nothing was sent.
            ValueError: rows are addressed by GUID, and one is none.
        """
        parts = [self._part(change) for change in changes]
        answer = await self._exchange.answer(_batch(self.target, parts), seconds)
        if isinstance(answer, DeliveryError):
            return [answer] * len(changes)
        if answer.status != HTTPStatus.OK:
            refusal = _refusal(answer)
            if isinstance(refusal, PermanentError):
                raise BatchRefusedError(refusal.code)
            return [refusal] * len(changes)
        answers = multipart.decode(answer.headers.get("content-type", ""), answer.body)
        failures = [self._failure(_answer(one)) for one in answers[: len(changes)]]
        unknown = INCOMPLETE_ANSWER.error("of a batch", doubtful=True)
        return failures + [unknown] * (len(changes) - len(failures))

    def _part(self, change: Change) -> multipart.Part:
        headers = {
            "Accept": "application/json",
            "Content-Type": "application/json",
            "OData-MaxVersion": "4.0",
            "OData-Version": "4.0",
            "x-ms-client-request-id": str(uuid4()),
            "x-ms-correlation-id": str(change.correlation_id),
        }
        method = "POST" if self.target.operation == "action" else "PATCH"
        if method == "PATCH":
            # Without it a PATCH creates the record that it does not find.
            # Source: Microsoft Learn, "Perform conditional operations using the Web API".
            headers["If-Match"] = "*"
        return multipart.Part(
            method=method,
            target=url_of(self.target, change.row),
            headers=headers,
            body=body_of(self.target, change.row, visible=change.visible),
        )

    def _failure(self, answer: Answer) -> DeliveryError | None:
        return None if self._is_expected(answer) else _refusal(answer)

    def _is_expected(self, answer: Answer) -> bool:
        """
        204; a Custom API with results answers 200 and JSON, which a login page does not.
        """
        if self.target.operation == "action" and answer.status == HTTPStatus.OK:
            return json_object(answer.body) is not None
        return answer.status == HTTPStatus.NO_CONTENT


def dynamics_client(
    target: DynamicsTarget,
    *,
    auth: Proof,
    tls: ssl.SSLContext | None = None,
    connections: int = CONNECTIONS,
) -> DynamicsClient:
    """
    A client with connections of its own.

    Args:
        auth: gives the token; it is not closed.
        tls: what certificates to trust; the system's by default.
        connections: so many requests may be under way at once.
    """
    return DynamicsClient(target, Exchange(HttpClient(tls=tls), auth, places=connections))


def _outgoing(part: multipart.Part) -> Outgoing:
    """
    One value alone.
    """
    return Outgoing(
        method=part.method,
        url=URL(part.target, encoded=True),
        headers=part.headers,
        body=part.body,
    )


def _batch(target: DynamicsTarget, parts: Sequence[multipart.Part]) -> Outgoing:
    """
    Several values together; one that fails does not stop those after it.
    """
    boundary = f"batch_{uuid4()}"
    host = target.base_url.removesuffix(API_PATH)
    within = [replace(part, target=part.target.removeprefix(host)) for part in parts]
    return Outgoing(
        method="POST",
        url=URL(f"{target.base_url}/$batch", encoded=True),
        headers={
            "Accept": "application/json",
            "Content-Type": multipart.content_type_of(boundary),
            "OData-MaxVersion": "4.0",
            "OData-Version": "4.0",
            "Prefer": "odata.continue-on-error",
            "x-ms-client-request-id": str(uuid4()),
        },
        body=multipart.encode(within, boundary=boundary),
        answer_bytes=PART_BYTES * (len(parts) + 1),
    )


def _answer(part: multipart.PartAnswer) -> Answer:
    """
    One answer out of a batch's.
    """
    return Answer(status=part.status, headers=part.headers, body=part.body)


def _refusal(answer: Answer) -> DeliveryError:
    error = error_from_answer(answer.status, answer.headers, answer.body, now=datetime.now(UTC))
    log.info(
        "request.refused",
        status=answer.status,
        code=error.code,
        service_request_id=_service_request_id(answer.headers),
    )
    return error


def _service_request_id(headers: Mapping[str, str]) -> str | None:
    """
    What Microsoft's support asks for, if it is a GUID; nothing else of the answer is logged.
    """
    for name in _REQUEST_IDS:
        try:
            return str(UUID(headers.get(name, "")))
        except ValueError:
            continue
    return None
