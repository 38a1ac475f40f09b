"""
The control endpoints: what `Sandbox` can do, as JSON over HTTP.

    GET    /_sandbox/health
    GET    /_sandbox/ledger?since=SEQ
    GET    /_sandbox/rows             PUT /_sandbox/rows (these alone)
                                      POST /_sandbox/rows (these too)
    GET    /_sandbox/faults           POST /_sandbox/faults   DELETE /_sandbox/faults?id=ID
    GET    /_sandbox/settings         POST /_sandbox/settings
    POST   /_sandbox/keys
    POST   /_sandbox/registrations
    POST   /_sandbox/revoke

Bad input is answered with 400 and `{"error": sentence}`.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from worker.dynamics.sandbox.messages import Request, Response
from worker.dynamics.sandbox.refusal import SandboxError, sentence
from worker.dynamics.sandbox.rows import Row

if TYPE_CHECKING:
    from collections.abc import Callable

    from worker.dynamics.sandbox.sandbox import Sandbox

T = TypeVar("T")

PREFIX = "/_sandbox/"

_ROWS: TypeAdapter[dict[str, dict[str, Row]]] = TypeAdapter(dict[str, dict[str, Row]])
_KEYS: TypeAdapter[dict[str, list[str]]] = TypeAdapter(dict[str, list[str]])
_FIELDS: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Any])


def answer(sandbox: Sandbox, request: Request) -> Response:
    """
    Carry out a control request.
    """
    name = request.path.removeprefix(PREFIX)
    if name not in {known for _, known in _ROUTES}:
        return _json(404, {"error": f"There is nothing at {request.path}."})
    route = _ROUTES.get((request.method, name))
    if route is None:
        return _json(405, {"error": f"{request.path} does not take {request.method}."})
    try:
        return _json(200, route(sandbox, request))
    except SandboxError as error:
        return _json(400, {"error": str(error)})


def _json(status: int, document: dict[str, Any]) -> Response:
    headers = (("Content-Type", "application/json"),)
    return Response(status=status, headers=headers, body=json.dumps(document).encode())


def _body(request: Request, shape: TypeAdapter[T], subject: str) -> T:
    if request.oversized:
        raise SandboxError(f"{subject}: the body is larger than 1 MiB.")
    try:
        return shape.validate_json(request.body)
    except ValidationError as error:
        raise SandboxError(sentence(subject, error)) from error


def _number(request: Request, name: str) -> int | None:
    text = request.query.get(name)
    if text is None:
        return None
    if not text.isdecimal():
        raise SandboxError(f"{name!r} must be a whole number from 0 up, not {text!r}.")
    return int(text)


def _health(sandbox: Sandbox, _: Request) -> dict[str, Any]:
    rows = sandbox.rows
    return {
        "ok": True,
        "entries": len(sandbox.ledger.entries),
        "in_progress": len(sandbox.ledger.in_progress),
        "faults": len(sandbox.faults),
        "rows": {name: len(table) for name, table in rows.items()},
    }


def _get_ledger(sandbox: Sandbox, request: Request) -> dict[str, Any]:
    entries = sandbox.ledger.since(_number(request, "since") or 0)
    return {
        "entries": [entry.to_json() for entry in entries],
        "in_progress": [entry.to_json() for entry in sandbox.ledger.in_progress],
    }


def _get_rows(sandbox: Sandbox, _: Request) -> dict[str, Any]:
    return dict(sandbox.rows)


def _put_rows(sandbox: Sandbox, request: Request) -> dict[str, Any]:
    rows = _body(request, _ROWS, "Wrong rows")
    sandbox.put_rows(rows)
    return {name: len(table) for name, table in rows.items()}


def _post_rows(sandbox: Sandbox, request: Request) -> dict[str, Any]:
    rows = _body(request, _ROWS, "Wrong rows")
    sandbox.add_rows(rows)
    return {name: len(table) for name, table in rows.items()}


def _post_keys(sandbox: Sandbox, request: Request) -> dict[str, Any]:
    keys = _body(request, _KEYS, "Wrong keys")
    for name, columns in keys.items():
        for column in columns:
            sandbox.define_key(name, column)
    return dict(keys)


def _get_faults(sandbox: Sandbox, _: Request) -> dict[str, Any]:
    return {"faults": [standing.to_json() for standing in sandbox.faults]}


def _post_fault(sandbox: Sandbox, request: Request) -> dict[str, Any]:
    return {"id": sandbox.order(_body(request, _FIELDS, "Wrong fault"))}


def _delete_faults(sandbox: Sandbox, request: Request) -> dict[str, Any]:
    return {"removed": sandbox.call_off(_number(request, "id"))}


def _get_settings(sandbox: Sandbox, _: Request) -> dict[str, Any]:
    return sandbox.settings.model_dump()


def _post_settings(sandbox: Sandbox, request: Request) -> dict[str, Any]:
    return sandbox.adjust(**_body(request, _FIELDS, "Wrong settings")).model_dump()


def _post_registration(sandbox: Sandbox, request: Request) -> dict[str, Any]:
    registration = sandbox.register(_body(request, _FIELDS, "Wrong registration"))
    return registration.model_dump(exclude={"client_secret"})


def _revoke(sandbox: Sandbox, _: Request) -> dict[str, Any]:
    return {"revoked": sandbox.revoke()}


_ROUTES: dict[tuple[str, str], Callable[[Sandbox, Request], dict[str, Any]]] = {
    ("GET", "health"): _health,
    ("GET", "ledger"): _get_ledger,
    ("GET", "rows"): _get_rows,
    ("PUT", "rows"): _put_rows,
    ("POST", "rows"): _post_rows,
    ("POST", "keys"): _post_keys,
    ("GET", "faults"): _get_faults,
    ("POST", "faults"): _post_fault,
    ("DELETE", "faults"): _delete_faults,
    ("GET", "settings"): _get_settings,
    ("POST", "settings"): _post_settings,
    ("POST", "registrations"): _post_registration,
    ("POST", "revoke"): _revoke,
}
