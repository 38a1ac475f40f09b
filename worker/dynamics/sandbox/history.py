"""
Reading a ledger: pure questions to a list of entries, wherever they come from.
"""

from __future__ import annotations

import json
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from worker.dynamics.sandbox.ledger import Entry

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


def read_ledger(path: Path) -> list[Entry]:
    """
    The entries of a ledger's file; a last line that is still being written is left out.
    """
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [Entry.from_json(json.loads(line)) for line in lines if line.endswith("\n")]


def overlaps(entries: Iterable[Entry]) -> list[tuple[Entry, Entry]]:
    """
    Pairs of data requests for the same row that were under way at the same time.

    A row is known by its GUID, or by its key as addressed if there is no such row. The
    operations of one batch run one after the other, so they are no pair.
    """
    found: list[tuple[Entry, Entry]] = []
    for requests in _by_row(entries).values():
        under_way: list[Entry] = []
        for later in sorted(requests, key=lambda entry: entry.started_at):
            under_way = [e for e in under_way if _end(e) > later.started_at]
            found += [(e, later) for e in under_way if e.exchange != later.exchange]
            under_way.append(later)
    return found


def values(entries: Iterable[Entry], *, column: str = "hlf_portalvisible") -> dict[str, list[Any]]:
    """
    What each row was set to: GUID -> values of the column, in the order they took effect.
    """
    history: dict[str, list[Any]] = defaultdict(list)
    for entry in sorted(applied(entries), key=lambda entry: entry.applied_at or 0.0):
        if entry.row and entry.change and column in entry.change:
            history[entry.row].append(entry.change[column])
    return dict(history)


def applied(entries: Iterable[Entry]) -> list[Entry]:
    """
    The writes that took effect (of a batch: its operations).
    """
    return [entry for entry in entries if entry.applied and entry.kind == "data"]


def reads(entries: Iterable[Entry]) -> list[Entry]:
    """
    Every request that asked for data, which this service must never do.
    """
    return [entry for entry in entries if entry.kind == "read"]


def peak(entries: Iterable[Entry]) -> int:
    """
    The most requests that were under way at once; a batch is one.
    """
    spans = {e.exchange: (e.started_at, _end(e)) for e in entries}.values()
    steps = sorted(step for start, end in spans for step in ((start, 1), (end, -1)))
    highest = current = 0
    for _, change in steps:
        current += change
        highest = max(highest, current)
    return highest


def _by_row(entries: Iterable[Entry]) -> dict[tuple[str | None, str], list[Entry]]:
    rows: dict[tuple[str | None, str], list[Entry]] = defaultdict(list)
    for entry in entries:
        name = entry.row or entry.key
        if entry.kind == "data" and name:
            rows[entry.entity_set, name].append(entry)
    return rows


def _end(entry: Entry) -> float:
    return float("inf") if entry.finished_at is None else entry.finished_at
