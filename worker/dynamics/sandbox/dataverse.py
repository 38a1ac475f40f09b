"""
The Dataverse Web API, as far as a service that writes one column meets it.

A request is read into a `Call`; the first rule that it breaks is its answer; if it breaks
none, the change is made and the answer is 204.
"""

from __future__ import annotations

import json
import uuid
from http import HTTPStatus
from typing import TYPE_CHECKING, cast

from worker.dynamics.sandbox.messages import Response

if TYPE_CHECKING:
    from worker.dynamics.sandbox.call import Call
    from worker.dynamics.sandbox.ledger import Entry
    from worker.dynamics.sandbox.rows import EntitySet
    from worker.dynamics.sandbox.rules import Rule


def perform(call: Call, entry: Entry) -> str:
    """
    Make the change that a call which breaks no rule asks for.

    Args:
        call: a write or an action.
        entry: told what changed and whether a row is new.

    Returns:
        GUID of the row.
    """
    table = cast("EntitySet", call.table)  # a rule has seen to it
    change = {call.column: call.body["Visible"]} if call.is_action else dict(call.body)
    address = call.address if call.is_write else None
    row = call.row or (address.guid if address else None) or str(uuid.uuid4())
    entry.change, entry.created, entry.row = change, call.row is None, row
    parts = dict(address.parts) if address and call.row is None else {}
    table.put(row, {**parts, **change})
    return row


def done(call: Call, row: str) -> Response:
    """
    The answer to a change that was made.

    Source: the update page, "204 No Content" with the row's URL in OData-EntityId.
    """
    version = call.request.path.partition("/api/data/")[2].partition("/")[0]
    headers = [*_own_headers()]
    if call.is_write and call.address:
        where = f"{call.request.base_url}/api/data/{version}/{call.address.segment}({row})"
        headers.append(("OData-EntityId", where))
    return Response(status=204, headers=tuple(headers))


def refusal(rule: Rule, call: Call) -> Response:
    """
    The answer to a call that breaks a rule.
    """
    extra: tuple[tuple[str, str], ...] = ()
    if rule.status == HTTPStatus.UNAUTHORIZED:
        extra = (("WWW-Authenticate", f"Bearer resource_id={call.request.base_url}/"),)
    return error(rule.status, rule.code, rule.message.format(**call.words), headers=extra)


def error(
    status: int, code: str, message: str, *, headers: tuple[tuple[str, str], ...] = ()
) -> Response:
    """
    An error in Dataverse's shape.

    Source: the compose page, "Parse errors from the response".
    """
    return Response(
        status=status,
        headers=(
            ("Content-Type", "application/json; odata.metadata=minimal"),
            *_own_headers(),
            *headers,
        ),
        body=json.dumps({"error": {"code": code, "message": message}}).encode(),
        code=code,
    )


def _own_headers() -> tuple[tuple[str, str], ...]:
    """
    Headers of every answer; a request id has two spellings.
    """
    request_id = str(uuid.uuid4())
    return (
        ("OData-Version", "4.0"),
        ("x-ms-service-request-id", request_id),
        ("REQ_ID", request_id),
    )
