"""
The Edge Function's TypeScript: in order, tested by itself, and of one mind with the worker.
"""

from __future__ import annotations

import json
import random
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import TYPE_CHECKING, Any

import pytest

from outbox.errors import ThrottledError
from tests.integration import edge_tables
from tests.integration.edge_function import FUNCTION, RUNTIME, deno
from worker.dynamics.edge_errors import KINDS
from worker.dynamics.errors import (
    DATAVERSE_CODES,
    MAX_JSON_BYTES,
    OAUTH_ERRORS,
    error_from_answer,
    error_from_token_answer,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

NOW = datetime(2027, 3, 1, 12, 0, tzinfo=UTC)


def test_the_tables_are_the_workers() -> None:
    """
    To the letter; `python -m tests.integration.edge_tables` makes them anew.
    """
    assert edge_tables.FILE.read_text(encoding="utf-8") == edge_tables.text()


@pytest.mark.parametrize("command", [("check",), ("lint",), ("fmt", "--check")], ids=" ".join)
def test_the_function_and_its_tests_are_in_order(command: tuple[str, ...]) -> None:
    """
    Types, habits and layout, as Deno sees them.
    """
    files = [str(file) for folder in (FUNCTION, RUNTIME) for file in sorted(folder.glob("*.ts"))]
    done = deno(*command, "--config", "deno.json", *files)
    assert done.returncode == 0, done.stdout + done.stderr


def test_its_parts_do_what_they_say() -> None:
    """
    Their own tests, without a network.
    """
    done = deno("test", "--config", "deno.json", "--no-prompt", str(RUNTIME / "parts_test.ts"))
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_part_of_the_function_comes_from_elsewhere() -> None:
    """
    It has no dependencies, so nothing has to be fetched to deploy it.
    """
    said = json.loads(deno("info", "--json", "index.ts").stdout)
    assert {module["specifier"] for module in said["modules"]} == {
        file.as_uri() for file in FUNCTION.glob("*.ts")
    }


# ------------------------------------------------------------------ of one mind


def cases() -> Iterator[dict[str, Any]]:
    """
    Answers of every kind that either side tells apart, and many that are made of their parts.
    """
    dice = random.Random(7)  # noqa: S311 (nothing secret)
    for of in ("dynamics", "token"):
        for status in (*range(200, 209), *range(300, 309), *range(400, 452), *range(500, 512)):
            yield case(of, status, "")
    for code in spellings_of_codes():
        yield case("dynamics", 400, json.dumps({"error": {"code": code, "message": "x"}}))
    for word in (*(row.word for row in OAUTH_ERRORS), "unheard_of", 7, None):
        for status in (400, 401, 403, 408, 429, 500):
            yield case("token", status, json.dumps({"error": word}))
    for wait in waits():
        yield case("dynamics", 429, "", wait)
        yield case("token", 429, "", wait)
    for body in BODIES:
        for status in (200, 400, 403, 404, 429, 500):
            yield case("dynamics", status, body)
            yield case("token", status, body)
    for _ in range(1000):
        body = json.dumps({dice.choice(["error", "Error", "err"]): random_error(dice)})
        pause = dice.choice([None, "3", "x"])
        yield case("dynamics", dice.choice([400, 403, 404, 412, 500, 503]), body, pause)


def case(of: str, status: int, body: str, wait: str | None = None) -> dict[str, Any]:
    """
    One answer.
    """
    headers = {} if wait is None else {"Retry-After": wait}
    return {
        "of": of,
        "status": status,
        "headers": headers,
        "body": body,
        "now": NOW.isoformat().replace("+00:00", "Z"),
    }


def spellings_of_codes() -> Iterator[object]:
    """
    Hexadecimal and decimal, signed and not, as text and as number; and nonsense.
    """
    for row in DATAVERSE_CODES:
        unsigned = int(row.hex, 16)
        signed = unsigned - 2**32
        yield from (row.hex, row.hex.lower(), f" {row.hex} ", unsigned, signed)
        yield from (str(unsigned), str(signed))
    yield from (
        "",
        "0",
        0,
        "0x0",
        "0x",
        "-",
        True,
        [],
        {},
        None,
        2**32,
        -(2**31) - 1,
        "0x123456789",
    )


def waits() -> Iterator[str]:
    """
    Seconds and dates, some of each out of bounds.
    """
    yield from ("0", "1", "30", "2.5", "600", "601", "99999999999", " 7 ")
    yield from ("", "-1", "+1", "soon", "1e3", "0x10", "2027", "Mon", "Mon, 01 Mar")
    for seconds in (-3600, 0, 90, 599, 601, 86_400):
        moment = NOW + timedelta(seconds=seconds)
        yield format_datetime(moment, usegmt=True)
        yield f"{moment:%A, %d-%b-%y %H:%M:%S} GMT"
        yield f"{moment:%a %b} {moment.day:2d} {moment:%H:%M:%S %Y}"


BODIES = (
    "",
    "{}",
    "[]",
    "null",
    "<html>Sign in</html>",
    '{"error": "text"}',
    '{"error": {"code": "", "message": "contact With Id = 1 Does Not Exist"}}',
    '{"error": {"message": "does not exist"}}',
    '{"error": {"code": "0x80040999", "message": "does not exist"}}',
    '{"Error": {"Code": "0x80040217", "Message": "gone"}}',
    '{"ErrorCode": -2147220969, "Message": "gone", "ExceptionMessage": "gone"}',
    '{"ErrorCode": "", "Message": "Does not exist"}',
    '{"error": {"code": "0x80040220", "message": "user is missing prvWriteContact privilege"}}',
    '{"error": {"code": "0x80040220", "message": "missing prvWritehlf_mentor, Full Name 7"}}',
    '{"error": {"code": "0x80040220", "message": "prvWrite9 and åprvWriteX and prv"}}',
    '{"error": {"code": "0x80040217", "message": "' + "x" * MAX_JSON_BYTES + '"}}',
)


def random_error(dice: random.Random) -> object:
    """
    An error made of likely parts.
    """
    codes: list[object] = [row.hex for row in DATAVERSE_CODES]
    parts: dict[str, list[object]] = {
        "code": [*codes, "", None, 0, "0x80041234", "abc"],
        "Code": [*codes, ""],
        "message": ["does not exist", "prvWriteContact", "", 7, None],
        "ErrorCode": codes,
    }
    return {name: dice.choice(some) for name, some in parts.items() if dice.random() < 0.5}


def by_the_worker(one: dict[str, Any]) -> dict[str, Any]:
    """
    What the worker makes of it, in the function's words.
    """
    classify = error_from_answer if one["of"] == "dynamics" else error_from_token_answer
    error = classify(one["status"], one["headers"], one["body"].encode(), now=NOW)
    return {
        "kind": next(name for name, kind in KINDS.items() if isinstance(error, kind)),
        "code": error.code,
        "message": error.message,
        "retryAfter": error.retry_after if isinstance(error, ThrottledError) else None,
        "doubtful": error.doubtful,
    }


def test_function_and_worker_make_the_same_of_every_answer() -> None:
    """
    Class, code, sentence, wait and doubt.
    """
    asked = list(cases())
    done = deno("run", "--no-prompt", str(RUNTIME / "classify.ts"), stdin=json.dumps(asked))
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    assert len(answers) == len(asked) > 1500
    for one, answer in zip(asked, answers, strict=True):
        assert answer == by_the_worker(one), one
