"""
A transactional outbox for *states*: "this key must be so", not "this happened".

        a business transaction of the caller
                    │ enqueue: insert, or replace the live event of the same key
                    ▼
   ┌──────────► waiting ── claim ──► in flight ──► delivered or skipped  → history
   │               ▲                    │  │
   │               │ retry, deferred    │  └─────► dead                  → history, and the
   │               └────────────────────┘                                  application's record
   └─ retry by hand, or re-drive: enqueue the *current* state

At most one event per (destination, key) is live; a newer version takes its place, an older
one never does. A claim is a lease with a token: whoever lost it changes nothing. One
column, `available_at`, is both backoff and lease, so nothing has to be rescued.

Read on in running order: `event` (what a row is), `errors` (what a handler may raise),
`retry` (when to try again), `outcome` (what an attempt means), `tables`, `store` (all SQL of
an event's life), `gate` (when to leave a destination alone), `destination` (who is told),
`observer` (who wants to know), `attempt` (one delivery), `flights` (those under way), `breaker`
(what outcomes say about a destination), `cursor` (where claims go on in a backlog), `relay`
(the loop).

The library knows no application, no HTTP, and never ends a transaction of its caller.
"""

from __future__ import annotations

from outbox.attempt import about_the_attempt
from outbox.destination import Destination
from outbox.errors import (
    ConfigurationError,
    DeliveryError,
    OutboxError,
    PermanentError,
    ThrottledError,
    TransientError,
)
from outbox.event import Event, NewEvent
from outbox.observer import Observer
from outbox.outcome import Delivered, Settlement, Skipped
from outbox.relay import Drained, Relay
from outbox.retry import RetryPolicy
from outbox.store import LookUp, enqueue
from outbox.tables import add_tables

__all__ = [
    "ConfigurationError",
    "Delivered",
    "DeliveryError",
    "Destination",
    "Drained",
    "Event",
    "LookUp",
    "NewEvent",
    "Observer",
    "OutboxError",
    "PermanentError",
    "Relay",
    "RetryPolicy",
    "Settlement",
    "Skipped",
    "ThrottledError",
    "TransientError",
    "about_the_attempt",
    "add_tables",
    "enqueue",
]
