"""
What may be told about this service, to a log or to anybody who collects errors.

Only keys that are known to be harmless are told, and of exceptions that are not ours only what
they are and where: their texts may hold rows, addresses or headers. What looks like a secret is
taken out of whatever is left.
"""

from __future__ import annotations

import re
import traceback
from datetime import date
from typing import TYPE_CHECKING, Any
from uuid import UUID

if TYPE_CHECKING:
    from collections.abc import Mapping

REDACTED = "[redacted]"

KNOWN = frozenset(
    {
        # who and where
        "destination", "level", "logger", "organization_id", "span_id", "timestamp", "trace_id",
        "worker_id",
        # about whom
        "actor", "attempt", "certification_id", "event_id", "key", "mentor_id", "mentors",
        "subject", "version",
        # what happened
        "code", "error", "event", "message", "outcome", "part", "path", "reason",
        "service_request_id", "sqlstate", "status", "url",
        # how much
        "again_in_seconds", "concurrency", "failures", "operations", "redriven",
        # what a worker did
        "dead", "deferred", "delivered", "lost", "retry", "skipped", "superseded",
    }
)  # fmt: skip
"""Keys whose values are told; a test knows which ones our code uses."""

LONGEST = 500
"""Characters of a text."""

MOST = 50
"""Items of a list, frames of a trace, causes of an exception."""

OURS = ("outbox.", "worker.")
"""Modules whose exceptions have sentences that were written to be read."""

_SECRETS = re.compile(
    r"""
      \b(?:bearer|basic)\s+[\w.~+/=-]{20,}                      # an Authorization header
    | \beyJ[\w-]+\.[\w-]+\.[\w-]*                           # a JSON Web Token
    | \bwhsec_[\w+/=-]+                                     # a key of Standard Webhooks
    | (?<=://)[^/\s]+@                                      # who logs in at an address
    | (?:password|passwd|secret|token|authorization|api_?key)["']?\s*[=:]\s*
      (?:(?:bearer|basic)\s+)?[^\s,;&]+
    """,
    re.IGNORECASE | re.VERBOSE,
)


def harmless(words: str) -> str:
    """
    A text without what looks like a secret, and not longer than anybody reads.
    """
    words = _SECRETS.sub(REDACTED, words)
    return words if len(words) <= LONGEST else f"{words[:LONGEST]}…"


def known_only(fields: Mapping[str, Any]) -> dict[str, Any]:
    """
    The values of known keys, made harmless; of the others that there is something.
    """
    return {
        key: harmless_value(value) if key in KNOWN else REDACTED for key, value in fields.items()
    }


def harmless_value(value: object) -> object:
    """
    A value that is plain, or that it is not.
    """
    match value:
        case None | bool() | int() | float():
            return value
        case str():
            return harmless(value)
        case UUID() | date():
            return str(value)
        case list() | tuple() | set() | frozenset():
            return [harmless_value(one) for one in list(value)[:MOST]]
        case _:
            return REDACTED


def told(error: BaseException, *, depth: int = 0) -> dict[str, Any]:
    """
    What may be told of an exception: what it is, where, and why it came, but not one value.

    Its sentence only if it is one of ours.
    """
    kind = type(error)
    document: dict[str, Any] = {"type": name_of(kind)}
    if kind.__module__.startswith(OURS):
        document["message"] = harmless(str(error))
    if sqlstate := getattr(getattr(error, "orig", error), "sqlstate", None):
        document["sqlstate"] = harmless(str(sqlstate))
    document["frames"] = [
        {
            "module": frame.f_globals.get("__name__", "?"),
            "line": line,
            "function": frame.f_code.co_qualname,
        }
        for frame, line in list(traceback.walk_tb(error.__traceback__))[-MOST:]
    ]
    if depth >= MOST:
        return document
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if cause is not None:
        document["cause"] = told(cause, depth=depth + 1)
    if isinstance(error, BaseExceptionGroup):
        document["parts"] = [told(one, depth=depth + 1) for one in error.exceptions[:MOST]]
    return document


def name_of(kind: type[BaseException]) -> str:
    """
    Of a class of exceptions, with its module unless everybody knows it.
    """
    plain = kind.__module__ in {"builtins", "exceptions"}
    return kind.__qualname__ if plain else f"{kind.__module__}.{kind.__qualname__}"
