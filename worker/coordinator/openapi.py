"""
The API described for programs: OpenAPI 3.1.
"""

from __future__ import annotations

from typing import Any

from worker.coordinator.problems import TYPE

Schema = dict[str, Any]


def _object(optional: tuple[str, ...] = (), **properties: Schema) -> Schema:
    return {
        "type": "object",
        "required": [name for name in properties if name not in optional],
        "properties": properties,
        "additionalProperties": False,
    }


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _words(*words: str) -> Schema:
    return {"type": "string", "enum": list(words)}


ID: Schema = {"type": "string", "format": "uuid"}
MOMENT: Schema = {"type": "string", "format": "date-time"}
DAY: Schema = {"type": "string", "format": "date"}
TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
NUMBER: Schema = {"type": "integer", "minimum": 0}

WARNING = _or_null(TEXT) | {
    "description": "For people, in the language of `Accept-Language` (nb or en); null if the "
    "portal confirmed.",
    "examples": ["Portal visibility update pending"],
}
ERROR_CODE = _or_null(TEXT) | {"description": "Why the last attempt failed, if one did."}
REASON = _or_null(TEXT) | {"description": "`error_code` in words."}

SCHEMAS: dict[str, Schema] = {
    "Problem": _object(
        type=TEXT | {"format": "uri", "examples": [f"{TYPE}unknown-failure"]},
        title=TEXT,
        status={"type": "integer"},
        detail=TEXT,
    ),
    "Status": _object(
        in_order=NUMBER,
        waiting_to_hide=NUMBER,
        waiting_to_show=NUMBER,
        failed_to_hide=NUMBER,
        failed_to_show=NUMBER,
        by_hand=NUMBER,
        unaccounted=NUMBER,
        asserting_again=NUMBER,
        oldest_waiting_seconds={"type": "number", "minimum": 0},
        next_try_at=_or_null(MOMENT),
        last_confirmed_at=_or_null(MOMENT),
        waiting=NUMBER,
        failed=NUMBER,
        maybe_wrongly_visible=NUMBER,
        sending=_object(
            state=_words("open", "half-open", "closed"),
            reason=_or_null(_words("throttled", "outage", "configuration", "operator")),
            closed_until=_or_null(MOMENT),
        ),
    ),
    "Failure": _object(
        id=ID,
        mentor_id=ID,
        mentor_name=TEXT,
        certification_id=_or_null(ID),
        visible=FLAG | {"description": "What the portal should have shown."},
        version=NUMBER,
        attempted_at=MOMENT,
        error_code=TEXT,
        error_message=TEXT,
        retry_count=NUMBER,
        recoverable=FLAG | {"description": "It is tried again when Dynamics recovers."},
        created_at=MOMENT,
        resolved_at=_or_null(MOMENT),
        resolution=_or_null(_words("delivered", "superseded", "manual")),
        resolved_by=_or_null(TEXT),
        trying_again=FLAG,
        reason=TEXT,
    ),
    "Failures": _object(
        failures={"type": "array", "items": {"$ref": "#/components/schemas/Failure"}},
        cut=FLAG | {"description": "There may be more."},
    ),
    "Retried": _object(
        started=NUMBER | {"description": "On their way now."},
        under_way=NUMBER | {"description": "They were already; nothing was added."},
        resolved=NUMBER | {"description": "In order; nothing is left to do."},
        gone=NUMBER | {"description": "Not in our register any more; see to them by hand."},
    ),
    "Note": _object(note=TEXT | {"minLength": 1, "maxLength": 1000}),
    "Handled": _object(
        failure_id=ID,
        mentor_id=ID,
        done=FLAG | {"description": "False if it was in order already."},
    ),
    "Portal": _object(
        mentor_id=ID,
        visible=_or_null(FLAG) | {"description": "What the portal has to show."},
        portal=_words("confirmed", "pending", "failed", "handled", "untouched"),
        warning=WARNING,
        confirmed_at=_or_null(MOMENT),
        next_try_at=_or_null(MOMENT),
        error_code=ERROR_CODE,
        reason=REASON,
        failure_id=_or_null(ID),
    ),
    "Renewal": _object(expires_on=DAY | {"description": "The new last valid day."}),
    "Renewed": _object(
        certification_id=ID,
        mentor_id=ID,
        expires_on=DAY,
        visible=FLAG | {"description": "What the portal has to show now."},
        version=NUMBER,
        portal=_words("confirmed", "pending", "failed"),
        warning=WARNING,
        error_code=ERROR_CODE,
        reason=REASON,
        repeated=FLAG | {"description": "An earlier request with this key renewed it."},
    ),
}


def _answer(schema: str) -> Schema:
    return {
        "description": "Done.",
        "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}},
    }


PROBLEMS = {
    "400": "It cannot be read.",
    "401": "Nobody is known to ask.",
    "403": "A viewer may not do this, or it came from another site's page.",
    "404": "There is no such thing in this organisation.",
    "413": "It is too large.",
    "415": "It is no JSON.",
    "422": "It cannot be meant.",
    "503": "The database or the login does not answer, or somebody else holds what has to be "
    "changed; what was saved stands.",
}

ALWAYS = ("401", "403", "503")


def _problems(*statuses: str) -> Schema:
    problem = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {
        status: {"description": PROBLEMS[status], "content": problem}
        for status in sorted({*ALWAYS, *statuses})
    }


def _operation(
    name: str,
    summary: str,
    answer: str,
    *statuses: str,
    parameters: list[Schema] | None = None,
    body: str | None = None,
) -> Schema:
    operation: Schema = {
        "operationId": name,
        "summary": summary,
        "responses": {"200": _answer(answer)} | _problems(*statuses),
    }
    if parameters:
        operation["parameters"] = parameters
    if body:
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{body}"}}},
        }
    return operation


BY_ID: Schema = {"name": "id", "in": "path", "required": True, "schema": ID}
LANGUAGE: Schema = {
    "name": "Accept-Language",
    "in": "header",
    "description": "nb or en.",
    "schema": TEXT,
}

DOCUMENT: Schema = {
    "openapi": "3.1.0",
    "info": {
        "title": "hlf-dynamics-sync",
        "version": "1",
        "summary": "Whether HLF's portal shows what the database says, and what to do if not.",
        "license": {"name": "MIT", "identifier": "MIT"},
    },
    "servers": [{"url": "/"}],
    "security": [{"bearer": []}],
    "paths": {
        "/api/v1/status": {
            "get": _operation("status", "How far the portal is.", "Status"),
        },
        "/api/v1/failures": {
            "get": _operation(
                "failures",
                "Mentors whose state did not get through, the oldest first.",
                "Failures",
                "422",
                parameters=[
                    {
                        "name": "resolved",
                        "in": "query",
                        "description": "Those that are in order again, too.",
                        "schema": FLAG | {"default": False},
                    },
                    {
                        "name": "limit",
                        "in": "query",
                        "schema": {
                            "type": "integer",
                            "minimum": 1,
                            "maximum": 1000,
                            "default": 100,
                        },
                    },
                    LANGUAGE,
                ],
            ),
        },
        "/api/v1/failures/retry": {
            "post": _operation(
                "retryAll", "Make the portal show what it has to show, for all.", "Retried"
            ),
        },
        "/api/v1/failures/{id}/retry": {
            "parameters": [BY_ID],
            "post": _operation(
                "retry", "Make the portal show what it has to show now.", "Retried", "404"
            ),
        },
        "/api/v1/failures/{id}/handled": {
            "parameters": [BY_ID],
            "post": _operation(
                "handled",
                "A person has done it in Dynamics by hand.",
                "Handled",
                *("400", "404", "413", "415", "422"),
                body="Note",
            ),
        },
        "/api/v1/mentors/{id}/portal": {
            "parameters": [BY_ID],
            "get": _operation(
                "portal",
                "Where the portal is for one mentor.",
                "Portal",
                "404",
                parameters=[LANGUAGE],
            ),
        },
        "/api/v1/certifications/{id}/renewal": {
            "parameters": [BY_ID],
            "post": _operation(
                "renew",
                "Renew a certification; the renewal stands whatever the portal does.",
                "Renewed",
                *("400", "404", "413", "415", "422"),
                body="Renewal",
                parameters=[
                    {
                        "name": "Prefer",
                        "in": "header",
                        "description": "`wait=N`: wait so many seconds for the portal, up to 15.",
                        "schema": TEXT,
                        "examples": {"wait": {"value": "wait=10"}},
                    },
                    {
                        "name": "Idempotency-Key",
                        "in": "header",
                        "description": "The same key renews once, however often it is sent; it is "
                        "remembered for two days.",
                        "schema": {
                            "type": "string",
                            "minLength": 1,
                            "maxLength": 200,
                            "pattern": "^[!-~]([ -~]*[!-~])?$",
                        },
                    },
                    LANGUAGE,
                ],
            ),
        },
    },
    "components": {
        "schemas": SCHEMAS,
        "securitySchemes": {
            "bearer": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"},
        },
    },
}
