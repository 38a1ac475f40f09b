"""
A pretend Microsoft Entra ID and Dataverse on loopback, with faults to order.

    POST /{tenant}/oauth2/v2.0/token ─────┐             ┌─ entra (rules) ─ registrations
    PATCH /api/data/v9.2/contacts(…) ─────┼─► Sandbox ──┼─ rules ─ dataverse ─ rows
    POST /api/data/v9.2/{action}, $batch ─┘      │      ├─ limits (429)
                                                 │      └─ faults ─ visit (acted out)
    /_sandbox/… ── control ──────────────────────┘
                                                 └─► ledger ─► history (questions to it)

It speaks HTTP over real sockets, so that timeouts, resets and half answers are real. Use
it in a test:

    sandbox = Sandbox(rows={"contacts": {guid: {"hlf_portalvisible": True}}})
    async with sandbox.serve() as running:
        sandbox.order(ResetAfter(target="data", key=guid))
        ...  # a client at running.url
    assert values(sandbox.ledger.entries) == {guid: [False, False]}

or as a process, through `run(Options(…))` and the control endpoints.

It is as strict as a careful client deserves, which is stricter than Dataverse in places:
each rule says where it is from.
"""

from __future__ import annotations

from worker.dynamics.sandbox.command import Options, announcement, build, run
from worker.dynamics.sandbox.faults import (
    Drip,
    ExpireToken,
    Fault,
    Garbage,
    Hang,
    Html,
    Late,
    Oversized,
    Redirect,
    ResetAfter,
    ResetBefore,
    Slow,
    Standing,
    Status,
    Truncated,
)
from worker.dynamics.sandbox.history import applied, overlaps, peak, read_ledger, reads, values
from worker.dynamics.sandbox.ledger import Entry, Ledger, fingerprint
from worker.dynamics.sandbox.limits import Limits
from worker.dynamics.sandbox.refusal import SandboxError
from worker.dynamics.sandbox.registrations import Registration
from worker.dynamics.sandbox.sandbox import (
    DEFAULT_ACTION,
    DEFAULT_CLIENT_ID,
    DEFAULT_CLIENT_SECRET,
    DEFAULT_COLUMN,
    DEFAULT_ENTITY_SET,
    DEFAULT_TENANT,
    Running,
    Sandbox,
)
from worker.dynamics.sandbox.settings import Privileges, Settings

__all__ = [
    "DEFAULT_ACTION",
    "DEFAULT_CLIENT_ID",
    "DEFAULT_CLIENT_SECRET",
    "DEFAULT_COLUMN",
    "DEFAULT_ENTITY_SET",
    "DEFAULT_TENANT",
    "Drip",
    "Entry",
    "ExpireToken",
    "Fault",
    "Garbage",
    "Hang",
    "Html",
    "Late",
    "Ledger",
    "Limits",
    "Options",
    "Oversized",
    "Privileges",
    "Redirect",
    "Registration",
    "ResetAfter",
    "ResetBefore",
    "Running",
    "Sandbox",
    "SandboxError",
    "Settings",
    "Slow",
    "Standing",
    "Status",
    "Truncated",
    "announcement",
    "applied",
    "build",
    "fingerprint",
    "overlaps",
    "peak",
    "read_ledger",
    "reads",
    "run",
    "values",
]
