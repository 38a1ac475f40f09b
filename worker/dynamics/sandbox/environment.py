"""
The pretend organisation: its tables, its users' tokens, and how requests change it.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

from worker.dynamics.sandbox import batch, dataverse
from worker.dynamics.sandbox.call import Call, bearer_of, is_read, parse_body
from worker.dynamics.sandbox.faults import Fault, Faults, Status
from worker.dynamics.sandbox.ledger import Entry, Kind, Ledger
from worker.dynamics.sandbox.rows import GUID, Catalogue, EntitySet, parse_address
from worker.dynamics.sandbox.rules import OPERATION_RULES, REQUEST_RULES, broken_rule
from worker.dynamics.sandbox.visit import status_answer

if TYPE_CHECKING:
    from collections.abc import Callable

    from worker.dynamics.sandbox.messages import Request, Response
    from worker.dynamics.sandbox.registrations import Directory
    from worker.dynamics.sandbox.settings import Settings


class Environment:
    """
    One Dataverse environment.

    Args:
        directory: knows the tokens.
        catalogue: the tables.
        faults: for single operations of a batch.
        ledger: stamps changes.
        settings: gives those in force.
        clock: monotonic seconds.
        action: name of the Custom API that sets the visibility of a row.
        table: entity set that the Custom API writes to.
        column: the visibility column.
    """

    def __init__(
        self,
        *,
        directory: Directory,
        catalogue: Catalogue,
        faults: Faults,
        ledger: Ledger,
        settings: Callable[[], Settings],
        clock: Callable[[], float],
        action: str,
        table: str,
        column: str,
    ) -> None:
        self.catalogue = catalogue
        self._directory = directory
        self._faults = faults
        self._ledger = ledger
        self._settings = settings
        self._clock = clock
        self._action = action
        self._table = table
        self._column = column

    def read(self, request: Request) -> Call:
        """
        Understand a request: what it addresses, and whose it is.
        """
        address = parse_address(request.path)
        segment = address.segment if address else ""
        call = Call(
            request=request,
            address=address,
            body=parse_body(request),
            bearer=bearer_of(request),
            table=self.catalogue.get(self._table if segment == self._action else segment),
            action=self._action,
            column=self._column,
            settings=self._settings(),
        )
        self._look_up(call)
        return call

    def answer(self, call: Call, entry: Entry) -> Response:
        """
        Carry out a request that is no batch, as things are now.
        """
        self._look_up(call)
        if rule := broken_rule(call, REQUEST_RULES):
            return dataverse.refusal(rule, call)
        return self._operate(call, entry)

    def answer_batch(self, envelope: Call, parts: list[Entry]) -> Response:
        """
        Carry out a batch.

        Args:
            envelope: the batch as a whole.
            parts: filled with an entry for each operation that was carried out.
        """
        self._look_up(envelope)
        if rule := broken_rule(envelope, REQUEST_RULES):
            return dataverse.refusal(rule, envelope)
        try:
            operations = batch.read_batch(envelope.request)
        except batch.BatchError as error:
            return dataverse.error(400, "0x80048d19", str(error))
        continued = batch.continues_on_error(envelope.request)
        answers: list[Response] = []
        for operation in operations:
            answers.append(self._answer_part(operation, envelope, parts))
            if batch.is_error(answers[-1]) and not continued:
                break
        return batch.batch_answer(answers, continued=continued)

    def _answer_part(self, operation: Request, envelope: Call, parts: list[Entry]) -> Response:
        call = self.read(operation)
        call.bearer, call.token = envelope.bearer, envelope.token
        entry = entry_of(call)
        parts.append(entry)
        fault = self._faults.take(entry, allowed=_is_for_one_operation)
        if isinstance(fault, Status):
            entry.fault = fault.what
            answer = status_answer(fault, kind=entry.kind)
        else:
            answer = self._operate(call, entry)
        entry.status, entry.code = answer.status, answer.code
        return answer

    def _operate(self, call: Call, entry: Entry) -> Response:
        if rule := broken_rule(call, OPERATION_RULES):
            return dataverse.refusal(rule, call)
        row = dataverse.perform(call, entry)
        self._ledger.note_applied(entry)
        return dataverse.done(call, row)

    def _look_up(self, call: Call) -> None:
        call.now = self._clock()
        call.settings = self._settings()
        call.token = self._directory.identify(call.bearer) if call.bearer else None
        call.row = self._find(call)

    def _find(self, call: Call) -> str | None:
        table = call.table
        if table is None:
            return None
        column, value = _wanted(call, table)
        row = table.find(column, value)
        if row is None and value and call.settings.accept_any_row:
            return _conjure(table, column, value)
        return row


def _wanted(call: Call, table: EntitySet) -> tuple[str | None, str]:
    """
    The row that is meant: column of the alternate key (None for the GUID), and value.

    The Custom API gets a row's GUID, or, where mentors are known by an alternate key, the
    value of that.
    """
    address = call.address
    if call.is_action:
        mentor = str(call.properties.get("MentorId", "")).lower()
        is_row = mentor in table.rows or not table.keys
        return (None, mentor) if is_row else (min(table.keys), mentor)
    if address and address.guid:
        return None, address.guid
    if address and len(address.parts) == 1:
        return address.parts[0]
    return None, ""


def _conjure(table: EntitySet, column: str | None, value: str) -> str | None:
    """
    A row of that key, as if it had always been there; None if there can be none.
    """
    if column is None and GUID.fullmatch(value):
        table.put(value, {})
        return value
    if column not in table.keys:
        return None
    row = str(uuid.uuid4())
    table.put(row, {column: value})
    return row


def entry_of(call: Call) -> Entry:
    """
    An entry for a call; it has not begun.
    """
    request, token = call.request, call.token
    return Entry(
        kind=_kind(call),
        method=request.method,
        path=request.target,
        entity_set=call.table.name if call.table else None,
        key=_key(call),
        row=call.row,
        correlation_id=request.headers.get("x-ms-correlation-id"),
        client_request_id=request.headers.get("x-ms-client-request-id"),
        if_match=request.headers.get("if-match"),
        body=call.body,
        client_id=token.client_id if token else None,
        token=token.fingerprint if token else None,
    )


def _key(call: Call) -> str | None:
    if call.is_action:
        return str(call.properties.get("MentorId", "")).lower() or None
    return call.address.canonical_key if call.address else None


def _kind(call: Call) -> Kind:
    if is_read(call.request):
        return "read"
    return "batch" if call.is_batch else "data"


def _is_for_one_operation(fault: Fault) -> bool:
    """
    Within a batch only an error answer makes sense, and only for a row that is named.
    """
    return isinstance(fault, Status) and fault.key is not None and not fault.applied
