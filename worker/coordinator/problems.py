"""
What went wrong, for a program: problem details after RFC 9457.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from worker.coordinator.idempotency import KeyReusedError
from worker.errors import (
    CommitUnknownError,
    HeldError,
    NotAllowedError,
    RenewalNotInFutureError,
    UnknownCertificationError,
    UnknownFailureError,
    UnknownMentorError,
    UnreachableError,
    UsageError,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

API = "/api/"
"""Where programs ask; people get pages."""

TYPE = "urn:hlf-sync:problem:"
"""What kind of problem it is follows; a program may rely on it."""

KINDS = {
    400: "malformed",
    401: "unauthorized",
    403: "forbidden",
    404: "not-found",
    405: "method-not-allowed",
    406: "not-acceptable",
    413: "too-large",
    415: "unsupported-media-type",
    422: "invalid",
}
"""By status, for what has no kind of its own."""

TITLES = {
    "malformed": "The request cannot be read",
    "unauthorized": "Nobody is known to ask",
    "forbidden": "Not allowed",
    "cross-origin": "This came from another site",
    "misdirected": "This is not the address",
    "not-found": "There is no such thing",
    "method-not-allowed": "This cannot be done here",
    "too-large": "The request is too large",
    "unsupported-media-type": "JSON is needed",
    "invalid": "The request cannot be meant",
    "unknown-certification": "There is no such certification",
    "unknown-mentor": "There is no such mentor",
    "unknown-failure": "There is no such failure",
    "renewal-not-in-future": "A renewal must reach into the future",
    "key-reused": "The idempotency key belongs to another request",
    "held": "Somebody else holds what has to be changed",
    "commit-unknown": "Nobody can tell whether the change was saved",
    "database-lost": "The database does not answer",
    "provider-unreachable": "The login does not answer",
    "unexpected": "Something unexpected happened",
}
"""The same for every problem of its kind."""

_BY_ERROR: dict[type[Exception], tuple[int, str]] = {
    UnknownCertificationError: (404, "unknown-certification"),
    UnknownMentorError: (404, "unknown-mentor"),
    UnknownFailureError: (404, "unknown-failure"),
    RenewalNotInFutureError: (422, "renewal-not-in-future"),
    NotAllowedError: (403, "forbidden"),
    KeyReusedError: (422, "key-reused"),
    UsageError: (422, "invalid"),
    HeldError: (503, "held"),
    CommitUnknownError: (503, "commit-unknown"),
    UnreachableError: (503, "provider-unreachable"),
}
"""The first that fits."""

DATABASE_LOST = "The database does not answer. What was saved stands; try again in a moment."


class ProblemResponse(JSONResponse):
    """
    Problem details, by their own media type.
    """

    media_type = "application/problem+json"


def answer(
    status: int, kind: str, detail: str, *, headers: Mapping[str, str] | None = None
) -> ProblemResponse:
    """
    A problem as a response.
    """
    return ProblemResponse(
        {
            "type": TYPE + kind,
            "title": TITLES.get(kind, "The request failed"),
            "status": status,
            "detail": detail,
        },
        status_code=status,
        headers=headers,
    )


def of(error: Exception) -> tuple[int, str, str]:
    """
    Status, kind and sentence for what went wrong, whatever it was.
    """
    for known, (status, kind) in _BY_ERROR.items():
        if isinstance(error, known):
            return status, kind, str(error)
    if isinstance(error, HTTPException):
        return error.status_code, KINDS.get(error.status_code, "error"), error.detail
    if isinstance(error, TimeoutError) or _is_lost_connection(error):
        return 503, "database-lost", DATABASE_LOST
    return 500, "unexpected", "Something unexpected happened; it was written down."


def _is_lost_connection(error: Exception) -> bool:
    """
    Whether it is the database that cannot be reached, and not our statement that is wrong.
    """
    if isinstance(error, DBAPIError):
        return isinstance(error, OperationalError | InterfaceError) or error.connection_invalidated
    return isinstance(error, PoolTimeout)
