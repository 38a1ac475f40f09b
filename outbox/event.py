"""
What an event is in Python: plain values, no SQL, no behaviour.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datetime import datetime
    from uuid import UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class NewEvent:
    """
    The desired state of one key, to be enqueued.

    Args:
        destination: who is to be told, e.g. `dynamics`.
        key: whose state it is; at most one event per (destination, key) is live.
        organization_id: whose credentials may deliver it.
        version: grows with each change of mind about the key; an older one never
            replaces a newer one.
        payload: the state, as JSON; a newer payload makes an older one worthless.
        priority: lower goes first.
        traceparent: W3C trace context of the transition, if it was traced.
    """

    destination: str
    key: str
    organization_id: UUID
    version: int
    payload: dict[str, Any]
    priority: int = 0
    traceparent: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """
    A claimed event: one attempt at one version, ours until the lease ends.

    Args:
        attempts: claims since the state was enqueued, this one included; starts at 1.
        elapsed_seconds: since the first attempt of this series, on the database's clock.
        claim_token: guards every later write; a worker without it changes nothing.
        last_error_code: why the attempt before this one failed.
        found: what the destination's `look_up` found when it was claimed.
    """

    id: int
    destination: str
    key: str
    organization_id: UUID
    version: int
    payload: dict[str, Any]
    priority: int
    created_at: datetime
    attempts: int
    elapsed_seconds: float
    claim_token: UUID
    last_error_code: str | None
    traceparent: str | None
    found: object = None
