"""
A data request, read: what it addresses, what it carries, whose it is.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from worker.dynamics.sandbox.rows import Address

if TYPE_CHECKING:
    from worker.dynamics.sandbox.messages import Request
    from worker.dynamics.sandbox.registrations import Token
    from worker.dynamics.sandbox.rows import EntitySet
    from worker.dynamics.sandbox.settings import Settings

ACTION_PARAMETERS = ("MentorId", "Visible")


@dataclass(slots=True, kw_only=True)
class Call:
    """
    A data request as the rules see it.

    The last four are looked up when the request arrives and again when it is carried out:
    in between a token may expire and a row appear.

    Args:
        request: as received; an operation of a batch looks like any other.
        address: None if the path does not point into the Web API.
        body: the JSON, or None if there is none or it cannot be read.
        bearer: text of the token, or None.
        table: the entity set that is addressed, or the one that the action writes to.
        action: name of the Custom API, as configured.
        column: the visibility column, which the Custom API writes.
        settings: those in force.
        token: what is known of the bearer, or None.
        row: GUID of the row that is meant, or None if there is no such row.
        now: monotonic seconds.
    """

    request: Request
    address: Address | None
    body: Any
    bearer: str | None
    table: EntitySet | None
    action: str
    column: str
    settings: Settings
    token: Token | None = None
    row: str | None = None
    now: float = 0.0

    @property
    def is_batch(self) -> bool:
        """
        It is an envelope of operations.
        """
        return self.address is not None and self.address.segment == "$batch"

    @property
    def is_action(self) -> bool:
        """
        It calls the Custom API.
        """
        return self.address is not None and self.address.segment == self.action

    @property
    def is_write(self) -> bool:
        """
        It changes, or would create, one row.
        """
        return not self.is_action and not self.is_batch and self.request.method == "PATCH"

    @property
    def is_read(self) -> bool:
        """
        It asks for data, by its method or as the answer to a change.
        """
        return is_read(self.request)

    @property
    def update_only(self) -> bool:
        """
        It must not create a row.
        """
        return self.header("if-match") == "*"

    def header(self, name: str) -> str:
        """
        A request header, empty if absent.
        """
        return self.request.headers.get(name, "").strip()

    @property
    def properties(self) -> dict[str, Any]:
        """
        The body, if it is a JSON object, else nothing.
        """
        return self.body if isinstance(self.body, dict) else {}

    @property
    def strangers(self) -> list[str]:
        """
        Properties that the table, or the action, does not have.
        """
        columns = self.table.columns if self.table else {}
        known = ACTION_PARAMETERS if self.is_action else columns
        return [name for name in self.properties if name not in known]

    @property
    def misfits(self) -> list[str]:
        """
        Properties whose value has not the type of the column of that name.
        """
        table = self.table
        if table is None:
            return []
        pairs = self.properties.items()
        return [
            name
            for name, value in pairs
            if name in table.columns and not table.accepts(name, value)
        ]

    @property
    def words(self) -> dict[str, str]:
        """
        What a message may name.
        """
        address = self.address or Address(segment="")
        return {
            "segment": address.segment,
            "key": address.canonical_key or str(self.properties.get("MentorId", "")),
            "table": self.table.logical_name if self.table else "",
            "Table": self.table.privilege_name if self.table else "",
            "method": self.request.method,
            "client_id": self.token.client_id if self.token else "",
            "strangers": ", ".join(self.strangers),
            "misfits": ", ".join(self.misfits),
        }


def is_read(request: Request) -> bool:
    """
    Whether a request asks for data.
    """
    wants_data = "return=representation" in request.headers.get("prefer", "").replace(" ", "")
    return request.method in {"GET", "HEAD"} or wants_data


def bearer_of(request: Request) -> str | None:
    """
    The text of the bearer token, or None.
    """
    scheme, _, text = request.headers.get("authorization", "").partition(" ")
    return text.strip() if scheme.lower() == "bearer" and text.strip() else None


def parse_body(request: Request) -> Any:  # noqa: ANN401 - JSON may be anything
    """
    The JSON of a request, or None if it cannot be read.
    """
    try:
        return json.loads(request.body)
    except ValueError:
        return None
