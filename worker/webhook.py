"""
The webhook that delivers reminders: one signed POST, and what its answer means.

    2xx                     delivered
    429                     everybody waits, as long as Retry-After says
    408, 425, 5xx, nothing  tried again
    400, 410, 413, 422      this reminder is refused, for good
    any other               our set-up is wrong: nothing is sent before somebody mends it

Source: the Standard Webhooks specification, standardwebhooks.com. The id is the same at every
attempt, so that the receiver can drop a repeat; the time is that of the attempt. The answer's
body is read up to a limit and thrown away, and a redirect is never followed.
"""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from uuid import NAMESPACE_URL, UUID, uuid5

import structlog
from typing_extensions import override

from outbox.errors import (
    ConfigurationError,
    DeliveryError,
    PermanentError,
    ThrottledError,
    TransientError,
)
from worker.dynamics.errors import Meaning, retry_after_seconds
from worker.http_client import HttpClient, NoAnswerError, Outgoing, checked_address

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

    from worker.http_client import Answer

    Sign = Callable[[str, datetime, str], str]

log = structlog.get_logger(__name__)

EVENT_TYPE = "certification.reminder"
"""The `type` of a message, for receivers that take others too."""

THROTTLED = Meaning(
    kind=ThrottledError,
    code="webhook_throttled",
    says="The webhook asks everybody to wait before sending more",
)
UNAVAILABLE = Meaning(
    kind=TransientError,
    code="webhook_unavailable",
    says="The webhook failed, or is not available at the moment",
    doubtful=True,
)
UNREACHABLE = Meaning(
    kind=TransientError,
    code="webhook_unreachable",
    says="No connection to the webhook could be made",
)
TIMEOUT = Meaning(
    kind=TransientError,
    code="webhook_timeout",
    says="The webhook did not answer in time",
    doubtful=True,
)
CONNECTION_LOST = Meaning(
    kind=TransientError,
    code="webhook_connection_lost",
    says="The connection to the webhook broke, or brought no proper answer",
    doubtful=True,
)
REFUSED = Meaning(
    kind=PermanentError,
    code="webhook_refused",
    says="The webhook refused this reminder",
)
UNAUTHORIZED = Meaning(
    kind=ConfigurationError,
    code="webhook_unauthorized",
    says="The webhook does not accept our signature; check HLF_REMINDER_SECRET",
)
WRONG_ADDRESS = Meaning(
    kind=ConfigurationError,
    code="webhook_wrong_address",
    says="This is no address of a webhook that takes reminders; check HLF_REMINDER_URL",
)
CERTIFICATE = Meaning(
    kind=ConfigurationError,
    code="webhook_certificate",
    says="The webhook's certificate is not trusted, has expired or is for another name",
)

STATUSES = {
    HTTPStatus.BAD_REQUEST: REFUSED,
    HTTPStatus.UNAUTHORIZED: UNAUTHORIZED,
    HTTPStatus.FORBIDDEN: UNAUTHORIZED,
    HTTPStatus.REQUEST_TIMEOUT: UNAVAILABLE,
    HTTPStatus.GONE: REFUSED,
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: REFUSED,
    HTTPStatus.UNPROCESSABLE_ENTITY: REFUSED,
    HTTPStatus.TOO_EARLY: UNAVAILABLE,
    HTTPStatus.TOO_MANY_REQUESTS: THROTTLED,
}
"""Statuses below 500 that say something of their own."""

FINAL = frozenset({REFUSED.code})
"""Codes of reminders that are never sent again by themselves."""

SILENCE = {
    "address": WRONG_ADDRESS,
    "certificate": CERTIFICATE,
    "unreachable": UNREACHABLE,
    "lost": CONNECTION_LOST,
    "incomplete": CONNECTION_LOST,
}
"""What it means that no answer came, by the reason."""


def message_id(certification_id: str, threshold_days: int, expires_on: str) -> UUID:
    """
    The same for one certification, threshold and period, whoever sends it and however often.
    """
    return uuid5(NAMESPACE_URL, f"reminder:{certification_id}/{threshold_days}/{expires_on}")


class ReminderWebhook:
    """
    Sends reminders to one address, and nowhere else.

    Args:
        url: https, or http to this machine; a path is part of it.
        sign: `(id, time, body)` gives the value of `webhook-signature`; a DeliveryError that
            it raises is the outcome.
        tls: what certificates to trust; the system's by default.

    Raises:
        ValueError: the address is not usable; one sentence.
    """

    def __init__(self, url: str, *, sign: Sign, tls: ssl.SSLContext | None = None) -> None:
        self._url = checked_address("HLF_REMINDER_URL", url, path=True)
        self._sign = sign
        self._http = HttpClient(tls=tls)

    @override
    def __repr__(self) -> str:
        return f"ReminderWebhook(host={self._url.host!r})"  # the path may be a secret of its own

    async def aclose(self) -> None:
        """
        Close the connections to the webhook.
        """
        await self._http.aclose()

    async def send(
        self, reminder: dict[str, Any], *, enqueued_at: datetime, seconds: float
    ) -> None:
        """
        Send one reminder; returns when the webhook has confirmed it.

        Args:
            reminder: certification_id, mentor_id, expires_on and threshold_days.
            enqueued_at: of the reminder; part of the body, so the same at each attempt.
            seconds: for everything: connection, signature, the answer's last byte.

        Raises:
            DeliveryError: one of its four classes.
        """
        failure = await self._failure(reminder, enqueued_at, seconds)
        if failure is not None:
            log.info("reminder.refused", code=failure.code)
            raise failure

    async def _failure(
        self, reminder: dict[str, Any], enqueued_at: datetime, seconds: float
    ) -> DeliveryError | None:
        """
        What went wrong. A value, so that no exception of the HTTP library, whose text may hold
        what was sent, hangs on the error that is raised.
        """
        request = self._request(reminder, enqueued_at)
        try:
            async with asyncio.timeout(seconds):
                answer = await self._http.send(request)
        except NoAnswerError as silence:
            return SILENCE[silence.reason].error(silence.name)
        except TimeoutError as error:
            return TIMEOUT.error(type(error).__name__)
        return error_from_answer(answer)

    def _request(self, reminder: dict[str, Any], enqueued_at: datetime) -> Outgoing:
        now = datetime.now(UTC)
        name = str(
            message_id(
                reminder["certification_id"], reminder["threshold_days"], reminder["expires_on"]
            )
        )
        body = json.dumps(
            {"type": EVENT_TYPE, "timestamp": enqueued_at.isoformat(), "data": reminder},
            separators=(",", ":"),
        )
        return Outgoing(
            method="POST",
            url=self._url,
            body=body.encode(),
            headers={
                "Content-Type": "application/json",
                "webhook-id": name,
                "webhook-timestamp": str(int(now.timestamp())),
                "webhook-signature": self._sign(name, now, body),
            },
        )


def error_from_answer(answer: Answer) -> DeliveryError | None:
    """
    What an answer means; None if the reminder was taken.
    """
    status = answer.status
    if answer.is_success:
        return None
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        meaning = UNAVAILABLE
    else:
        meaning = next((m for s, m in STATUSES.items() if s == status), WRONG_ADDRESS)
    asked = retry_after_seconds(answer.headers.get("retry-after"), now=datetime.now(UTC))
    return meaning.error(f"HTTP {status}", retry_after=asked)
