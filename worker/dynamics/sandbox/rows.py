"""
The tables of the pretend organisation, and how a URL points into them.
"""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from worker.dynamics.sandbox.refusal import SandboxError

Row = dict[str, Any]
Rows = Mapping[str, Mapping[str, Row]]

GUID = re.compile(r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}", re.IGNORECASE)
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
COLUMN_TYPES: dict[str, tuple[type, ...]] = {
    "Edm.Boolean": (bool,),
    "Edm.String": (str,),
    "Edm.Decimal": (int, float),
}

_DATA = re.compile(r"/api/data/v9\.[0-2]/(?P<rest>.*)")
_SEGMENT = re.compile(r"(?P<name>[$\w.]+)(?:\((?P<key>.*)\))?", re.DOTALL)
_PART = re.compile(r"(?P<column>\w+)=(?P<value>'(?:[^']|'')*'|[^',]+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """
    What a path below `/api/data/v9.x/` points at.

    Source: Microsoft Learn, "Use an alternate key to reference a record", for the forms of
    a key: `(guid)`, `(column='text')`, `(column=value)`, several joined by commas.

    Args:
        segment: an entity set, an action, or "$batch".
        key: what stands in the parentheses, decoded; None without parentheses.
        guid: the key, if it is one; lower case.
        parts: column -> value, if the key is an alternate one.
    """

    segment: str
    key: str | None = None
    guid: str | None = None
    parts: tuple[tuple[str, str], ...] = ()

    @property
    def canonical_key(self) -> str | None:
        """
        The key in one spelling: quotes and case of GUIDs do not matter.
        """
        return ",".join(f"{name}={value}" for name, value in self.parts) or self.guid or self.key


def parse_address(path: str) -> Address | None:
    """
    Read a path.

    Args:
        path: still percent-encoded, without query.

    Returns:
        None if it does not point into the Web API. A key that cannot be read has neither
        `guid` nor `parts`.
    """
    inside = _DATA.fullmatch(path)
    decoded = urllib.parse.unquote(inside["rest"]) if inside else ""
    segment = _SEGMENT.fullmatch(decoded)
    if not segment:
        return Address(segment=decoded) if decoded else None
    key = segment["key"]
    if key is None:
        return Address(segment=segment["name"])
    if GUID.fullmatch(key):
        return Address(segment=segment["name"], key=key, guid=key.lower())
    return Address(segment=segment["name"], key=key, parts=_parts(key))


def _parts(key: str) -> tuple[tuple[str, str], ...]:
    found = list(_PART.finditer(key))
    if ",".join(part[0] for part in found) != key:
        return ()
    return tuple((part["column"], _plain(part["value"])) for part in found)


def _plain(literal: str) -> str:
    """
    The value of an OData literal: quotes off, doubled quotes single, GUIDs in lower case.
    """
    text = literal[1:-1].replace("''", "'") if literal.startswith("'") else literal
    return text.lower() if GUID.fullmatch(text) else text


@dataclass(slots=True, kw_only=True)
class EntitySet:
    """
    One table.

    Args:
        name: as in URLs ("contacts").
        columns: name -> one of `COLUMN_TYPES`.
        keys: columns that are alternate keys.
        rows: GUID in lower case -> column -> value.
    """

    name: str
    columns: dict[str, str] = field(default_factory=dict)
    keys: set[str] = field(default_factory=set)
    rows: dict[str, Row] = field(default_factory=dict)
    _index: dict[tuple[str, str], str] = field(default_factory=dict)

    @property
    def logical_name(self) -> str:
        """
        As in messages ("contact").
        """
        return self.name.removesuffix("s")

    @property
    def privilege_name(self) -> str:
        """
        As in the names of privileges ("Contact", or "hlf_mentor").
        """
        name = self.logical_name
        return name if "_" in name else name.capitalize()

    def find(self, column: str | None, value: str) -> str | None:
        """
        The GUID of a row.

        Args:
            column: of an alternate key; None to look for the GUID itself.
            value: in lower case if it is a GUID.
        """
        if column is None:
            return value if value in self.rows else None
        return self._index.get((column, value))

    def put(self, guid: str, values: Row) -> None:
        """
        Create a row, or change the given columns of one.
        """
        self.rows.setdefault(guid, {}).update(values)
        for column in self.keys & values.keys():
            self._index[column, _plain(str(values[column]))] = guid

    def replace(self, rows: Mapping[str, Row]) -> None:
        """
        Take these rows for all there are; columns that are new are defined by their values.
        """
        self.rows, self._index = {}, {}
        self.add(rows)

    def add(self, rows: Mapping[str, Row]) -> None:
        """
        Take these rows beside those there are; of a row that is there, change these columns.
        """
        for guid, values in rows.items():
            self.columns.update(
                {c: _type_of(v) for c, v in values.items() if c not in self.columns}
            )
            self.put(guid.lower(), values)

    def define_key(self, column: str) -> None:
        """
        Make a column an alternate key.

        Raises:
            SandboxError: that is no name.
        """
        _check_name(column)
        self.keys.add(column)
        self.columns.setdefault(column, "Edm.String")
        for guid, values in self.rows.items():
            if column in values:
                self._index[column, _plain(str(values[column]))] = guid

    def accepts(self, column: str, value: object) -> bool:
        """
        Whether the value has the type of the column; null has none, which is stricter than
        Dataverse: a flag that is neither true nor false is a mistake here.
        """
        types = COLUMN_TYPES[self.columns[column]]
        return isinstance(value, types) and (bool in types or not isinstance(value, bool))


class Catalogue:
    """
    All tables by the name of their entity set.
    """

    def __init__(self, entity_sets: Iterable[EntitySet] = ()) -> None:
        self._sets = {each.name: each for each in entity_sets}

    def get(self, name: str) -> EntitySet | None:
        """
        The table, or None.
        """
        return self._sets.get(name)

    def define(self, name: str) -> EntitySet:
        """
        The table; a new one if there was none.

        Raises:
            SandboxError: that is no name.
        """
        _check_name(name)
        return self._sets.setdefault(name, EntitySet(name=name))

    def replace(self, rows: Rows) -> None:
        """
        Give the named tables these rows; other tables stay as they are.

        Args:
            rows: entity set -> GUID -> column -> value.

        Raises:
            SandboxError: a name that is none, an id that is no GUID, or a value that is no
                boolean, text or number. Nothing is changed then.
        """
        _check_all(rows)
        for name, table in rows.items():
            self.define(name).replace(table)

    def add(self, rows: Rows) -> None:
        """
        Give the named tables these rows beside those they have; raises as `replace`.
        """
        _check_all(rows)
        for name, table in rows.items():
            self.define(name).add(table)

    def snapshot(self) -> dict[str, dict[str, Row]]:
        """
        Every row there is, in the shape that `replace` takes; a copy.
        """
        return {
            name: {guid: dict(values) for guid, values in table.rows.items()}
            for name, table in self._sets.items()
        }


def _check_all(rows: Rows) -> None:
    for name, table in rows.items():
        for guid, values in table.items():
            _check(name, guid, values)


def _check_name(name: str) -> None:
    if not NAME.fullmatch(name):
        raise SandboxError(f"{name!r} is no name: letters, digits and underscores only.")


def _check(name: str, guid: str, values: Row) -> None:
    _check_name(name)
    if not GUID.fullmatch(guid):
        raise SandboxError(f"Wrong rows at {name!r}: {guid!r} is no GUID.")
    for column, value in values.items():
        _check_name(column)
        if not isinstance(value, (bool, str, int, float)):
            raise SandboxError(
                f"Wrong rows at {name!r}, {guid!r}: {column!r} is neither true, false, text"
                " nor a number."
            )


def _type_of(value: object) -> str:
    if isinstance(value, bool):
        return "Edm.Boolean"
    return "Edm.String" if isinstance(value, str) else "Edm.Decimal"
