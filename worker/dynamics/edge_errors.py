"""
What an answer of the Edge Function, or of its platform instead, means.

    200 and a verdict ──► what it says: classified there, by the tables in `errors`
    anything else ──────► STATUSES: the function is missing, stopped, overrun, closed to us

Source of the platform's answers: Supabase's documentation, "Edge Functions: Status codes".
"""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import TYPE_CHECKING

from outbox.errors import (
    ConfigurationError,
    DeliveryError,
    PermanentError,
    ThrottledError,
    TransientError,
)
from worker.dynamics.errors import (
    MAX_RETRY_AFTER_SECONDS,
    REDIRECT_REFUSED,
    Meaning,
    Silence,
    retry_after_seconds,
)

if TYPE_CHECKING:
    from datetime import datetime

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


def error_from_platform(status: int, retry_after: str | None, *, now: datetime) -> DeliveryError:
    """
    What it means that something else than the function's verdict came.

    No refusal (4xx) is about a mentor: the function says with 200 what Dynamics has against one.

    Args:
        retry_after: that header, if it came.
        now: with a time zone; what a date in it is compared to.
    """
    wait = retry_after_seconds(retry_after, now=now)
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
