"""
The sandbox as a process: what `hlf-sync sandbox` needs.
"""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from worker.dynamics.sandbox.limits import Limits
from worker.dynamics.sandbox.sandbox import (
    DEFAULT_ACTION,
    DEFAULT_CLIENT_ID,
    DEFAULT_CLIENT_SECRET,
    DEFAULT_COLUMN,
    DEFAULT_ENTITY_SET,
    DEFAULT_TENANT,
    Sandbox,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """
    How to run it.

    Args:
        host: loopback.
        port: 0 for any free one.
        ledger_path: also append the ledger to this file.
        tenant: of the one registration.
        client_id: of it.
        client_secret: of it.
        entity_set: the table of mentors.
        key: column that is its alternate key; None for none.
        column: its visibility column.
        action: the Custom API.
        latency_seconds: every answer takes so long.
        limits: service protection limits.
        accept_any_row: unknown keys are rows, for load tests.
    """

    host: str = "127.0.0.1"
    port: int = 0
    ledger_path: Path | None = None
    tenant: str = DEFAULT_TENANT
    client_id: str = DEFAULT_CLIENT_ID
    client_secret: str = field(default=DEFAULT_CLIENT_SECRET, repr=False)
    entity_set: str = DEFAULT_ENTITY_SET
    key: str | None = None
    column: str = DEFAULT_COLUMN
    action: str = DEFAULT_ACTION
    latency_seconds: float = 0.0
    limits: Limits = field(default_factory=Limits)
    accept_any_row: bool = False


def build(options: Options) -> Sandbox:
    """
    A sandbox by these options, not yet listening.

    Raises:
        SandboxError: an impossible value.
    """
    registration = {
        "tenant": options.tenant,
        "client_id": options.client_id,
        "client_secret": options.client_secret,
    }
    return Sandbox(
        registrations=[registration],
        entity_set=options.entity_set,
        column=options.column,
        keys=[options.key] if options.key else [],
        action=options.action,
        ledger_path=options.ledger_path,
        latency_seconds=options.latency_seconds,
        limits=options.limits,
        accept_any_row=options.accept_any_row,
    )


def announcement(options: Options, *, url: str) -> str:
    """
    The one line of JSON that is printed when the sandbox listens; no secret is in it.
    """
    document = {
        "listening": url,
        "control": f"{url}/_sandbox/",
        "tenant": options.tenant,
        "client_id": options.client_id,
        "entity_set": options.entity_set,
        "key": options.key,
        "column": options.column,
        "action": options.action,
    }
    return json.dumps(document)


async def run(options: Options, *, announce: Callable[[str], None] | None = None) -> None:
    """
    Serve until cancelled.

    Args:
        options: see there.
        announce: is given the announcement once the port is open; standard output if None.

    Raises:
        SandboxError: an impossible value, a host that is not loopback, a port that is taken.
    """
    async with build(options).serve(host=options.host, port=options.port) as running:
        (announce or _print)(announcement(options, url=running.url))
        await asyncio.get_running_loop().create_future()


def _print(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
