"""
The API: what the app may ask and do, in JSON.

    GET   /api/v1/status
    GET   /api/v1/failures
    POST  /api/v1/failures/retry                        all of them
    POST  /api/v1/failures/{id}/retry                   one
    POST  /api/v1/failures/{id}/handled                 done by hand, with a note
    GET   /api/v1/mentors/{id}/portal
    POST  /api/v1/certifications/{id}/renewal           Prefer: wait=N, Idempotency-Key
    GET   /api/v1/openapi.json

What is wrong is told by problem details (RFC 9457). A renewal that is saved is a success, whatever
the portal does: `portal` says whether it follows, `warning` says it for people.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from datetime import date, datetime
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.routing import Route
from typing_extensions import override

from worker.certifications.transitions import LONGEST_WAIT_SECONDS
from worker.coordinator import alerts, mentors, wording
from worker.coordinator.idempotency import LONGEST_KEY
from worker.coordinator.openapi import DOCUMENT
from worker.coordinator.wording import Words
from worker.database import reading
from worker.errors import UnknownMentorError

if TYPE_CHECKING:
    from collections.abc import Collection
    from uuid import UUID

    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import BaseRoute

    from worker.coordinator.actions import Actions, Renewed
    from worker.coordinator.callers import Caller

PORTAL = {
    "ok": "confirmed",
    "pending": "pending",
    "failed": "failed",
    "handled": "handled",
    "untouched": "untouched",
}
"""A mentor's state, in the words of the API."""

_DAY = re.compile(r"\d{4}-\d{2}-\d{2}")
_WAIT = re.compile(r"\s*wait\s*=\s*\"?(\d{1,6})\"?\s*(;.*)?", re.IGNORECASE)
_KEY = re.compile(rf"[\x20-\x7e]{{1,{LONGEST_KEY}}}")


def routes() -> list[BaseRoute]:
    """
    Every route of the API.
    """
    return [
        Route("/api/v1/openapi.json", _document),
        Route("/api/v1/status", _status),
        Route("/api/v1/failures", _failures),
        Route("/api/v1/failures/retry", _retry_all, methods=["POST"]),
        Route("/api/v1/failures/{id:uuid}/retry", _retry, methods=["POST"]),
        Route("/api/v1/failures/{id:uuid}/handled", _handled, methods=["POST"]),
        Route("/api/v1/mentors/{id:uuid}/portal", _portal),
        Route("/api/v1/certifications/{id:uuid}/renewal", _renewal, methods=["POST"]),
    ]


class _Json(JSONResponse):
    @override
    def render(self, content: Any) -> bytes:
        return json.dumps(content, default=_jsonable, ensure_ascii=False, allow_nan=False).encode()


def _jsonable(value: object) -> str:
    return value.isoformat() if isinstance(value, datetime | date) else str(value)


async def _document(_request: Request) -> Response:
    return _Json(DOCUMENT)


# ------------------------------------------------------------------------------- looking


async def _status(request: Request) -> Response:
    async with reading(request.app.state.engine) as connection:
        now = await alerts.status(connection, organization_id=_caller(request).organization_id)
    document = asdict(now)
    gate = document.pop("gate")
    return _Json(
        document
        | {
            "waiting": now.waiting,
            "failed": now.failed,
            "maybe_wrongly_visible": now.maybe_wrongly_visible,
            "sending": {
                "state": gate["state"],
                "reason": gate["reason"],
                "closed_until": gate["closed_until"],
            },
        }
    )


async def _failures(request: Request) -> Response:
    words = _words(request)
    if unknown := set(request.query_params) - {"limit", "resolved"}:
        raise _invalid(f"There is no such parameter: {', '.join(sorted(unknown))}.")
    limit = _number(request, "limit", default=100, most=alerts.MOST_FAILURES)
    resolved_too = _flag(request, "resolved")
    async with reading(request.app.state.engine) as connection:
        found = await alerts.failures(
            connection,
            organization_id=_caller(request).organization_id,
            resolved_too=resolved_too,
            limit=limit,
        )
    return _Json(
        {
            "failures": [
                asdict(failure) | {"reason": alerts.reason(failure.error_code, words)}
                for failure in found
            ],
            "cut": len(found) == limit,
        },
        headers={"Content-Language": words.language},
    )


async def _portal(request: Request) -> Response:
    words, mentor_id = _words(request), _id(request)
    async with reading(request.app.state.engine) as connection:
        mentor = await mentors.mentor(
            connection, mentor_id, organization_id=_caller(request).organization_id
        )
    if mentor is None:
        raise UnknownMentorError(f"There is no mentor {mentor_id}.")
    portal = PORTAL[mentor.state]
    return _Json(
        {
            "mentor_id": mentor.id,
            "visible": mentor.visible,
            "portal": portal,
            "warning": _warning(words, portal),
            "confirmed_at": mentor.confirmed_at,
            "next_try_at": mentor.next_try_at,
            "error_code": mentor.error_code,
            "reason": alerts.reason(mentor.error_code, words) if mentor.error_code else None,
            "failure_id": mentor.failure_id,
        },
        headers={"Content-Language": words.language},
    )


# -------------------------------------------------------------------------------- acting


async def _retry_all(request: Request) -> Response:
    return _Json(asdict(await _actions(request).retry_all()))


async def _retry(request: Request) -> Response:
    return _Json(asdict(await _actions(request).retry([_id(request)])))


async def _handled(request: Request) -> Response:
    body = await _body(request, {"note"})
    if not isinstance(body["note"], str):
        raise _invalid("note is text.")
    return _Json(asdict(await _actions(request).handle(_id(request), note=body["note"])))


async def _renewal(request: Request) -> Response:
    words = _words(request)
    key = request.headers.get("idempotency-key")
    if key is not None and not _KEY.fullmatch(key):
        raise HTTPException(400, f"Idempotency-Key is 1 to {LONGEST_KEY} printable characters.")
    body = await _body(request, {"expires_on"})
    wait = wait_preferred(request.headers.getlist("prefer"))
    renewed = await _actions(request).renew(
        _id(request), _day(body["expires_on"]), wait_seconds=wait or 0, key=key
    )
    headers = {"Content-Language": words.language, "Vary": "Accept-Language, Prefer"}
    if wait is not None:
        headers["Preference-Applied"] = f"wait={wait}"
    return _Json(_renewed(renewed, words), headers=headers)


def _renewed(renewed: Renewed, words: Words) -> dict[str, Any]:
    return asdict(renewed) | {
        "warning": _warning(words, renewed.portal),
        "reason": alerts.reason(renewed.error_code, words) if renewed.error_code else None,
    }


def _warning(words: Words, portal: str) -> str | None:
    return words(f"warning.{portal}") if portal in {"pending", "failed"} else None


# ------------------------------------------------------------------------------- reading


def _caller(request: Request) -> Caller:
    caller: Caller = request.state.caller
    return caller


def _actions(request: Request) -> Actions:
    actions: Actions = request.app.state.actions
    return actions


def _id(request: Request) -> UUID:
    identity: UUID = request.path_params["id"]
    return identity


def _words(request: Request) -> Words:
    language = wording.language(None, None, request.headers.get("accept-language"))
    return Words(language, timezone=request.app.state.timezone)


def wait_preferred(headers: Collection[str]) -> int | None:
    """
    The seconds of `Prefer: wait=N` (RFC 7240), no more than we wait; None if nobody asked.
    """
    for preference in ",".join(headers).split(","):
        if found := _WAIT.fullmatch(preference):
            return min(int(found[1]), int(LONGEST_WAIT_SECONDS))
    return None


async def _body(request: Request, names: set[str]) -> dict[str, Any]:
    """
    A JSON object with exactly these names.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HTTPException(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "Send JSON: application/json.")
    try:
        body = json.loads(await request.body())
    except (ValueError, RecursionError):
        raise HTTPException(HTTPStatus.BAD_REQUEST, "This is no JSON.") from None
    if not isinstance(body, dict) or set(body) != names:
        raise _invalid(f"Send an object with just {' and '.join(sorted(names))}.")
    return body


def _day(value: object) -> date:
    try:
        if isinstance(value, str) and _DAY.fullmatch(value):
            return date.fromisoformat(value)
    except ValueError:
        pass
    raise _invalid("expires_on is a day like 2027-11-24.")


def _number(request: Request, name: str, *, default: int, most: int) -> int:
    value = request.query_params.get(name)
    if value is None:
        return default
    if not re.fullmatch(r"[0-9]{1,6}", value, re.ASCII) or not 1 <= int(value) <= most:
        raise _invalid(f"{name} is a number from 1 to {most}.")
    return int(value)


def _flag(request: Request, name: str) -> bool:
    value = request.query_params.get(name, "false")
    if value not in {"true", "false"}:
        raise _invalid(f"{name} is true or false.")
    return value == "true"


def _invalid(sentence: str) -> HTTPException:
    return HTTPException(HTTPStatus.UNPROCESSABLE_ENTITY, sentence)
