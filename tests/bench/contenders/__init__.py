"""
Who takes part.

A module of contenders defines `CONTENDERS`, and its name goes into `MODULES`. The groups below
are names, so that a goal can speak of a peer that is not installed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.bench.contender import Contender

MODULES = (
    "ours",
    "bare",
    "bare_ours",
    "procrastinate",
    "pgqueuer",
    "faststream_outbox",
    "node_peers",
)

PYTHON_PEERS = (
    "procrastinate",
    "pgqueuer",
    "pgqueuer:b100",
    "faststream-outbox",
    "faststream-outbox:tuned",
)
PYTHON_PEERS_BY_AIOHTTP = (
    "pgqueuer:aiohttp",
    "pgqueuer:b100:aiohttp",
    "faststream-outbox:tuned:aiohttp",
)
"""The faster ones of them, with our own HTTP client instead of httpx."""

NODE_PEERS = ("graphile-worker", "graphile-worker:tuned", "pg-boss")
PEERS = (*PYTHON_PEERS, *NODE_PEERS)


def all_contenders() -> tuple[list[Contender], dict[str, str]]:
    """
    Those who take part, and those who cannot, with the reason.
    """
    present: list[Contender] = []
    absent: dict[str, str] = {}
    for name in MODULES:
        try:
            contenders = import_module(f"tests.bench.contenders.{name}").CONTENDERS
        except (ImportError, AttributeError) as error:
            absent[name] = str(error)
            continue
        for one in contenders:
            if why := one.missing():
                absent[one.name] = why
            else:
                present.append(one)
    return present, absent
