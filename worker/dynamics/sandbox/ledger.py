"""
What was asked of the sandbox and what came of it, one entry per request.

    begin ──► in progress ──► finish ──► entries, numbered, never changed again
                                            └──► one JSON line, flushed

An entry is written when the request is over: just before its answer leaves, when the
client gives up, or when the change lands that the client will not hear of. So a client
that holds an answer finds the entry, and two requests that a client sent one after the
other never seem to overlap. Secrets and tokens are not in it: a token is known by its
fingerprint.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import TYPE_CHECKING, Any, Literal, Self, TextIO

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

Kind = Literal["token", "discovery", "data", "read", "batch", "other"]


@dataclass(slots=True, kw_only=True)
class Entry:
    """
    One request; an operation of a $batch has an entry of its own.

    Times called `_at` are seconds of the sandbox's monotonic clock, those called `_utc`
    are ISO 8601 in UTC.

    Args:
        seq: 1 for the first entry, no gaps, in the order in which requests were over;
            0 while it is in progress.
        exchange: the HTTP request, numbered by arrival; a batch and its operations share it.
        kind: "read" is whatever asks for data: GET, or Prefer: return=representation.
        path: with its query, except at the token endpoint.
        entity_set: as addressed, or None.
        key: as addressed: a GUID in lower case or "column=value".
        row: GUID of the row that was meant, or None if there is no such row.
        if_match: the header, or None.
        body: the JSON of a data request, or None if it was none.
        change: column -> value as written, whichever operation wrote it; None if nothing was.
        client_id: whose token it was, or who asked for one.
        token: fingerprint of the bearer token, or of the token that was issued.
        status: of the answer, or None if there was none.
        code: error code in the answer, or None.
        applied: the change took effect.
        created: a row was created by it.
        fault: what was done on purpose, or None.
    """

    seq: int = 0
    exchange: int = 0
    kind: Kind = "other"
    method: str = ""
    path: str = ""
    entity_set: str | None = None
    key: str | None = None
    row: str | None = None
    correlation_id: str | None = None
    client_request_id: str | None = None
    if_match: str | None = None
    body: Any = None
    change: dict[str, Any] | None = None
    client_id: str | None = None
    token: str | None = None
    status: int | None = None
    code: str | None = None
    applied: bool = False
    created: bool = False
    fault: str | None = None
    started_at: float = 0.0
    started_utc: str = ""
    applied_at: float | None = None
    applied_utc: str | None = None
    finished_at: float | None = None
    finished_utc: str | None = None

    def to_json(self) -> dict[str, Any]:
        """
        Every field by its name.
        """
        return {name: getattr(self, name) for name in _FIELDS}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Self:
        """
        The entry that `to_json` was made of.
        """
        return cls(**fields)


_FIELDS = tuple(field.name for field in dataclasses.fields(Entry))


class Ledger:
    """
    Append-only; in memory and, if wanted, as lines of JSON in a file.

    Args:
        clock: monotonic seconds.
        path: lines are appended to this file, one per entry, flushed at once.
    """

    def __init__(self, *, clock: Callable[[], float], path: Path | None = None) -> None:
        self._clock = clock
        self._path = path
        self._file: TextIO | None = None
        self._entries: list[Entry] = []
        self._open: dict[int, Entry] = {}
        self._exchanges = count(1)
        self._waiting: list[tuple[Callable[[Entry], bool], asyncio.Future[Entry]]] = []

    @property
    def entries(self) -> Sequence[Entry]:
        """
        All that is over, in the order of `seq`.
        """
        return tuple(self._entries)

    @property
    def in_progress(self) -> Sequence[Entry]:
        """
        Requests that have arrived and are not over, in the order of arrival.
        """
        return tuple(self._open.values())

    def since(self, seq: int) -> Sequence[Entry]:
        """
        The entries after that number; 0 for all.
        """
        return tuple(self._entries[seq:])

    def begin(self, entry: Entry) -> None:
        """
        Stamp a request that has arrived.
        """
        entry.exchange = next(self._exchanges)
        entry.started_at, entry.started_utc = self._clock(), _utc()
        self._open[entry.exchange] = entry
        self._tell(entry)

    def note_applied(self, entry: Entry) -> None:
        """
        Stamp a change that has just taken effect.
        """
        entry.applied = True
        entry.applied_at, entry.applied_utc = self._clock(), _utc()
        self._tell(entry)

    def finish(self, entry: Entry, *, at: float | None = None, parts: Sequence[Entry] = ()) -> None:
        """
        Write an entry down.

        Args:
            entry: one that has begun.
            at: when the request was over, if before now.
            parts: the operations of a batch; they take its number and its times, because
                to the client all of them were under way for as long as the batch was.
        """
        del self._open[entry.exchange]
        now = self._clock()
        entry.finished_at = now if at is None else at
        entry.finished_utc = _utc(seconds_ago=now - entry.finished_at)
        for part in parts:
            part.exchange = entry.exchange
            part.started_at, part.started_utc = entry.started_at, entry.started_utc
            part.finished_at, part.finished_utc = entry.finished_at, entry.finished_utc
        for finished in (entry, *parts):
            self._append(finished)

    async def wait_for(self, claim: Callable[[Entry], bool]) -> Entry:
        """
        Wait for a request that fits, in progress or over (`seq` tells), also a past one.

        Looked at when it arrives, when its change takes effect and when it is over. Waits
        for ever if need be: put it under `asyncio.timeout`.
        """
        for entry in (*self._entries, *self._open.values()):
            if claim(entry):
                return entry
        future: asyncio.Future[Entry] = asyncio.get_running_loop().create_future()
        self._waiting.append((claim, future))
        return await future

    async def wait_finished(self, claim: Callable[[Entry], bool]) -> Entry:
        """
        As `wait_for`, but only when the request is over.
        """
        return await self.wait_for(lambda entry: entry.seq > 0 and claim(entry))

    def close(self) -> None:
        """
        Close the file, if there is one; the next entry opens it again.
        """
        if self._file:
            self._file.close()
            self._file = None

    def _append(self, entry: Entry) -> None:
        entry.seq = len(self._entries) + 1
        self._entries.append(entry)
        if self._path:
            self._write(entry, self._path)
        self._tell(entry)

    def _write(self, entry: Entry, path: Path) -> None:
        if self._file is None:
            self._file = path.open("a", encoding="utf-8")
        self._file.write(json.dumps(entry.to_json(), separators=(",", ":")) + "\n")
        self._file.flush()

    def _tell(self, entry: Entry) -> None:
        met = [pair for pair in self._waiting if pair[1].done() or pair[0](entry)]
        for pair in met:
            self._waiting.remove(pair)
            if not pair[1].done():
                pair[1].set_result(entry)


def _utc(*, seconds_ago: float = 0.0) -> str:
    moment = datetime.now(UTC) - timedelta(seconds=seconds_ago)
    return moment.isoformat(timespec="microseconds")


def fingerprint(secret: str) -> str:
    """
    The first 12 hexadecimal digits of its SHA-256: tells two apart, gives none away.
    """
    return hashlib.sha256(secret.encode()).hexdigest()[:12]
