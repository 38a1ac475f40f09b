"""
What Supabase's Realtime does with a change: reads it from the publication by logical decoding, and
asks the database, as each subscriber, whether that subscriber sees the row.

The format is PostgreSQL's own, "Logical Replication Message Formats", protocol 1; the rule is
Realtime's: the row is looked for by its key, now, under the role and claims of the subscriber.
"""

from __future__ import annotations

import secrets
import struct
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import psycopg

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.supabase import Project

PUBLICATION = "supabase_realtime"


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """
    One row that was inserted or updated.

    Args:
        record: the new row, as text; what was not sent is not in it.
    """

    kind: Literal["insert", "update"]
    table: str
    record: dict[str, str | None]


@dataclass(slots=True, kw_only=True)
class Realtime:
    """
    A slot, read from where it was left.
    """

    project: Project
    slot: str
    _relations: dict[int, tuple[str, list[str]]] = field(default_factory=dict)

    def changes(self) -> list[Change]:
        """
        What was committed since the last call.
        """
        with psycopg.connect(self.project.url, autocommit=True) as connection:
            messages = connection.execute(
                "SELECT data FROM pg_logical_slot_get_binary_changes(%s, NULL, NULL,"
                " 'proto_version', '1', 'publication_names', %s)",
                [self.slot, PUBLICATION],
            ).fetchall()
        found = (self._read(_Reader(bytes(data))) for (data,) in messages)
        return [change for change in found if change is not None]

    def hears(self, change: Change, claims: str, *, role: str = "authenticated") -> bool:
        """
        Whether a subscriber gets it.
        """
        with self.project.request(role, claims) as connection:
            try:
                seen = connection.execute(
                    "SELECT FROM public.dynamics_sync_failures WHERE id = %s",
                    [change.record["id"]],
                )
            except psycopg.errors.InsufficientPrivilege:
                return False
            return seen.fetchone() is not None

    def _read(self, reader: _Reader) -> Change | None:
        kind = reader.letter()
        if kind == "R":
            number = reader.integer()
            name = f"{reader.word()}.{reader.word()}"
            reader.letter()  # the replica identity
            self._relations[number] = name, [self._column(reader) for _ in range(reader.short())]
            return None
        if kind not in "IU":
            return None
        table, columns = self._relations[reader.integer()]
        if reader.letter() != "N":  # the old row, or its key, comes first
            reader.row(columns)
            reader.letter()
        return Change(
            kind="insert" if kind == "I" else "update", table=table, record=reader.row(columns)
        )

    @staticmethod
    def _column(reader: _Reader) -> str:
        reader.letter()  # whether it is part of the key
        name = reader.word()
        reader.integer(), reader.integer()  # its type
        return name


class _Reader:
    """
    Reads a message from its beginning to its end.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def letter(self) -> str:
        return self._take(1).decode("latin-1")

    def short(self) -> int:
        return int(struct.unpack("!h", self._take(2))[0])

    def integer(self) -> int:
        return int(struct.unpack("!i", self._take(4))[0])

    def word(self) -> str:
        end = self._data.index(0, self._at)
        word = self._take(end - self._at).decode()
        self._take(1)
        return word

    def row(self, columns: list[str]) -> dict[str, str | None]:
        record: dict[str, str | None] = {}
        for column in columns[: self.short()]:
            match self.letter():
                case "n":
                    record[column] = None
                case "t":
                    record[column] = self._take(self.integer()).decode()
        return record

    def _take(self, length: int) -> bytes:
        taken = self._data[self._at : self._at + length]
        self._at += length
        return taken


@contextmanager
def listening(project: Project) -> Iterator[Realtime]:
    """
    Read along from now on, until the block ends.
    """
    slot = f"hlf_test_{secrets.token_hex(6)}"
    with psycopg.connect(project.url, autocommit=True) as connection:
        connection.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [slot])
        try:
            yield Realtime(project=project, slot=slot)
        finally:
            connection.execute("SELECT pg_drop_replication_slot(%s)", [slot])
