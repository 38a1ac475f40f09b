"""
Errors that nobody expected, told to Sentry; the extra `sentry`.

What is told is what the log tells, after its redaction: nothing is collected by Sentry's own means,
neither variables nor lines of source, requests, bodies or what was logged before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sentry_sdk import Client
from sentry_sdk.utils import BadDsn

from worker import redaction

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sentry_sdk._types import DataCollectionUserOptions
    from sentry_sdk.types import Event, Hint

NOTHING: DataCollectionUserOptions = {
    "user_info": False,
    "http_bodies": [],
    "database_query_data": False,
    "queues": False,
    "stack_frame_variables": False,
    "frame_context_lines": 0,
}
"""What Sentry collects by itself."""

FLUSH_SECONDS = 2.0
"""For what was reported last to be sent, when a process ends."""

TAGS = ("destination", "organization_id", "worker_id", "code", "error", "part")
"""Fields by which people look for errors."""

TOLD = frozenset(
    {
        "environment",
        "event_id",
        "exception",
        "extra",
        "level",
        "logger",
        "message",
        "platform",
        "release",
        "sdk",
        "tags",
        "timestamp",
    }
)
"""Parts of an event that leave this process."""


class Reports:
    """
    Where unexpected errors go.

    Args:
        dsn: of the project; it is not repeated.
        release: of this package.

    Raises:
        ValueError: it is no address of a Sentry project.
    """

    def __init__(self, dsn: str, *, release: str) -> None:
        try:
            self._client = Client(
                dsn=dsn,
                release=release,
                data_collection=NOTHING,
                max_breadcrumbs=0,
                default_integrations=False,
                auto_enabling_integrations=False,
                send_client_reports=False,
                before_send=_told_parts,
            )
        except BadDsn:
            raise ValueError("it is no address of a Sentry project") from None

    def __call__(self, fields: Mapping[str, Any]) -> None:
        """
        Report a line of the log, as it was made harmless; returns at once.
        """
        self._client.capture_event(event_of(fields))

    def close(self) -> None:
        """
        Send what is left, for as long as it is worth.
        """
        self._client.close(timeout=FLUSH_SECONDS)


def event_of(fields: Mapping[str, Any]) -> Event:
    """
    A line of the log, as Sentry has it.
    """
    apart = {"event", "level", "logger", "timestamp", "exception", *TAGS}
    event: Event = {
        "level": "fatal" if fields.get("level") == "critical" else "error",
        "logger": str(fields.get("logger", "hlf_sync")),
        "message": str(fields["event"]),
        "tags": {name: str(fields[name]) for name in TAGS if name in fields},
        "extra": {name: value for name, value in fields.items() if name not in apart},
    }
    if "exception" in fields:
        event["exception"] = {"values": _exceptions(fields["exception"])}
    return event


def _exceptions(told: Mapping[str, Any]) -> list[dict[str, Any]]:
    """
    The first cause first; those of a group after it.
    """
    before = _exceptions(told["cause"]) if "cause" in told else []
    parts = [one for part in told.get("parts", []) for one in _exceptions(part)]
    module, _, name = told["type"].rpartition(".")
    says = " ".join(told[key] for key in ("message", "sqlstate") if key in told)
    frames = [
        {"module": one["module"], "function": one["function"], "lineno": one["line"]}
        for one in told["frames"]
    ]
    own: dict[str, Any] = {"type": name, "module": module or "builtins", "value": says}
    if frames:
        own["stacktrace"] = {"frames": frames}
    return [*before, *parts, own]


def _told_parts(event: Event, _hint: Hint) -> Event:
    """
    Once more, whatever else the library may have added.
    """
    event["extra"] = redaction.known_only(event.get("extra", {}))
    for name in event.keys() - TOLD:
        del event[name]  # type: ignore[misc] # a TypedDict of parts that may be missing
    return event
