"""
Every answer has one meaning, and no word of a server gets into it.
"""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from outbox.errors import (
    ConfigurationError,
    DeliveryError,
    PermanentError,
    ThrottledError,
    TransientError,
)
from worker.dynamics.errors import (
    DATAVERSE_CODES,
    MAX_JSON_BYTES,
    OAUTH_ERRORS,
    STATUSES,
    DataverseCode,
    OAuthError,
    Status,
    error_from_answer,
    error_from_token_answer,
    retry_after_seconds,
)

NOW = datetime(2027, 3, 1, 12, 0, tzinfo=UTC)
CANARY = "Full Name 6f1c5d9e-canary"


def answer(
    status: int, error: object = None, *, body: bytes | None = None, **headers: str
) -> DeliveryError:
    """
    The error for an answer with this `error` object, or with exactly this body.
    """
    if body is None:
        body = json.dumps({"error": error}).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return error_from_answer(status, named, body, now=NOW)


def signed(row: DataverseCode) -> int:
    """
    The code as the signed decimal in which it also occurs.
    """
    return int(row.hex, 16) - 2**32


@pytest.mark.parametrize("row", DATAVERSE_CODES, ids=lambda row: row.hex)
def test_each_known_code_decides_before_the_status_does(row: DataverseCode) -> None:
    """
    Whatever the status says, apart from 429 and those below 400.
    """
    for status in (400, 404, 418, 500, 503):
        error = answer(status, {"code": row.hex, "message": CANARY})
        assert type(error) is row.meaning.kind
        assert error.code == row.meaning.code
        assert row.hex.lower() in error.message
        assert f"HTTP {status}" in error.message
        assert not error.doubtful


@pytest.mark.parametrize("row", DATAVERSE_CODES, ids=lambda row: row.hex)
def test_each_known_code_is_understood_in_every_spelling(row: DataverseCode) -> None:
    """
    Hexadecimal in any case, signed and unsigned decimal, as a number or a string.
    """
    spellings: list[Any] = [
        row.hex.lower(),
        row.hex.upper(),
        f" {row.hex} ",
        signed(row),
        str(signed(row)),
        int(row.hex, 16),
        str(int(row.hex, 16)),
    ]
    for code in spellings:
        assert answer(400, {"code": code, "message": ""}).code == row.meaning.code, code
        old = json.dumps({"ErrorCode": code, "Message": CANARY}).encode()
        assert answer(400, body=old).code == row.meaning.code, code
        capitals = json.dumps({"Error": {"Code": code, "Message": CANARY}}).encode()
        assert answer(400, body=capitals).code == row.meaning.code, code


@pytest.mark.parametrize("row", STATUSES, ids=lambda row: row.status)
def test_each_known_status_decides_where_no_code_does(row: Status) -> None:
    """
    With an empty code, an unknown one, HTML, and nothing at all.
    """
    bodies = [
        b'{"error":{"code":"","message":"x"}}',
        b'{"error":{"code":"0x0","message":"x"}}',
        b'{"error":{"code":"0x81234567","message":"x"}}',
        b"<html>Service Unavailable</html>",
        b"",
    ]
    for body in bodies:
        error = answer(row.status, body=body)
        assert type(error) is row.meaning.kind
        assert error.code == row.meaning.code


def test_the_tables_name_each_thing_once_and_its_source() -> None:
    """
    Two rows for one code would make the later one invisible.
    """
    names: list[list[object]] = [
        [code.hex.lower() for code in DATAVERSE_CODES],
        [status.status for status in STATUSES],
        [error.word for error in OAUTH_ERRORS],
    ]
    for keys in names:
        assert len(set(keys)) == len(keys)
    rows: list[DataverseCode | Status | OAuthError] = [*DATAVERSE_CODES, *STATUSES, *OAUTH_ERRORS]
    for row in rows:
        assert row.source
        assert re.fullmatch(r"[a-z][a-z0-9_]*", row.meaning.code)
        assert not row.meaning.says.endswith(".")
    for code in DATAVERSE_CODES:
        assert re.fullmatch(r"0x8[0-9A-F]{7}", code.hex)


@pytest.mark.parametrize(
    ("decimal", "code"),
    [
        (-2147015902, "throttled"),
        (-2147220969, "record_not_found"),
        (-2147088246, "wrong_address"),
        (-2147220960, "forbidden"),
        (-2147187962, "record_access_denied"),
        (-2147094271, "unauthorized"),
        (-2147220685, "duplicate"),
    ],
)
def test_decimals_are_those_of_microsofts_own_list(decimal: int, code: str) -> None:
    """
    Written out, because a wrong conversion would be wrong on both sides of a comparison.
    """
    assert answer(400, {"code": str(decimal), "message": ""}).code == code


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        ({"code": "", "message": "contact With Id = 1 Does Not Exist"}, PermanentError, "record"),
        ({"message": "contact With Id = 1 does not exist"}, PermanentError, "record"),
        ({"code": None, "message": "Does Not Exist"}, PermanentError, "record"),
        ({"code": "0x80040217", "message": "finnes ikke"}, PermanentError, "record"),
        ({"code": "0x80060891", "message": ""}, PermanentError, "record"),
        ({"code": "0x8006088a", "message": "Resource not found"}, ConfigurationError, "address"),
        ({"code": "", "message": "Resource not found for 'x'"}, ConfigurationError, "address"),
        ({"code": "NotFound", "message": "Does Not Exist"}, ConfigurationError, "address"),
        ({"code": "0x81234567", "message": "Does Not Exist"}, ConfigurationError, "address"),
        ({"code": "", "message": ["Does Not Exist"]}, ConfigurationError, "address"),
        ("Does Not Exist", ConfigurationError, "address"),
        (None, ConfigurationError, "address"),
    ],
)
def test_a_404_is_about_the_record_only_where_dataverse_says_so(
    error: object, kind: type[DeliveryError], code: str
) -> None:
    """
    A wrong address must not give up every mentor, nor a missing record stop them all.
    """
    raised = answer(404, error)
    assert type(raised) is kind
    assert raised.code == {"record": "record_not_found", "address": "wrong_address"}[code]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html><body>404 - File or directory not found.</body></html>",
        b'{"Message":"No HTTP resource was found that matches the request URI"}',
        b'{"statusCode":404,"message":"Resource not found"}',
        b'["Does Not Exist"]',
        b'{"error":{"code":"","message":"Does Not Exist"',
        b"\xff\xfe\x00",
        b"[" * 60_000,
    ],
)
def test_a_404_that_is_not_dataverses_means_a_wrong_address(body: bytes) -> None:
    """
    A gateway or another service answered.
    """
    error = answer(404, body=body)
    assert isinstance(error, ConfigurationError)
    assert error.code == "wrong_address"


@pytest.mark.parametrize(
    ("message", "kept"),
    [
        ("Principal user (Id=1, type=8) is missing prvWriteContact privilege", "prvWriteContact"),
        ("is missing prvWritehlf_mentor privilege (Id=...)", "prvWritehlf_mentor"),
        ("no privilege named", None),
        ("xprvWriteContact and prv1234 and prvWrite6f1c5d9e", None),
        ("prv" + "a" * 5000, None),
    ],
)
def test_of_a_403_only_the_name_of_the_privilege_is_kept(message: str, kept: str | None) -> None:
    """
    It is what the person who mends it needs; the rest may hold ids and names.
    """
    error = answer(403, {"code": "0x80040220", "message": f"{CANARY} {message}"})
    assert isinstance(error, ConfigurationError)
    assert error.code == "forbidden"
    assert CANARY not in error.message
    assert ("prv" in error.message) is (kept is not None)
    assert kept is None or f"missing {kept}" in error.message


def test_a_record_that_may_not_be_written_stops_no_other_mentor() -> None:
    """
    The permission is there, the record belongs to somebody else.
    """
    error = answer(403, {"code": "0x80048306", "message": "does not have WriteAccess"})
    assert isinstance(error, PermanentError)
    assert error.code == "record_access_denied"


@pytest.mark.parametrize("status", [300, 301, 302, 303, 304, 307, 308, 399])
def test_every_redirect_is_a_wrong_set_up(status: int) -> None:
    """
    Even with an error code in it.
    """
    error = answer(status, {"code": "0x80040217", "message": ""})
    assert isinstance(error, ConfigurationError)
    assert error.code == "redirect_refused"


@pytest.mark.parametrize("status", [100, 101, 200, 201, 202, 203, 206, 299])
def test_a_success_of_another_kind_is_no_success(status: int) -> None:
    """
    It may have taken effect, so it is doubtful, and it is tried again.
    """
    error = answer(status, body=b"<html>Signing in</html>")
    assert isinstance(error, TransientError)
    assert error.code == "unexpected_answer"
    assert error.doubtful


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (402, PermanentError),
        (409, PermanentError),
        (418, PermanentError),
        (499, PermanentError),
        (501, TransientError),
        (520, TransientError),
        (599, TransientError),
        (777, TransientError),
    ],
)
def test_an_unlisted_status_counts_as_its_hundred(status: int, kind: type[DeliveryError]) -> None:
    """
    And is named by its number.
    """
    error = answer(status, body=b"")
    assert type(error) is kind
    assert error.code == f"http_{status}"


@pytest.mark.parametrize("status", [400, 401, 403, 404, 408, 412, 429, 500, 502, 503, 504])
def test_only_what_may_still_take_effect_is_doubtful(status: int) -> None:
    """
    408, 502 and 504 say that somebody gave up waiting, not that nothing happened.
    """
    for code in ("", "0x80040216"):
        assert answer(status, {"code": code, "message": ""}).doubtful is (status in {408, 502, 504})


def test_429_means_wait_whatever_the_code() -> None:
    """
    Keeping away is what is asked for, and it burns no attempt.
    """
    for code in ("", "0x80040217", "0x80040216", "nonsense"):
        error = answer(429, {"code": code, "message": ""}, retry_after="17")
        assert isinstance(error, ThrottledError)
        assert error.code == "throttled"
        assert error.retry_after == 17


def test_a_throttling_code_means_wait_whatever_the_status() -> None:
    """
    The header counts there too.
    """
    error = answer(503, {"code": "0x80072321", "message": ""}, Retry_After="3.5")
    assert isinstance(error, ThrottledError)
    assert error.retry_after == 3.5


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("", None),
        ("  ", None),
        ("0", 0.0),
        ("5", 5.0),
        (" 5 ", 5.0),
        ("1.25", 1.25),
        ("600", 600.0),
        ("601", 600.0),
        ("9" * 5000, 600.0),
        ("-5", None),
        ("+5", None),
        ("1e3", None),
        ("nan", None),
        ("inf", None),
        ("5, 7", None),
        ("٥", None),
        ("soon", None),
        ("Mon, 01 Mar 2027 12:00:30 GMT", 30.0),
        ("Monday, 01-Mar-27 12:00:30 GMT", 30.0),
        ("Mon, 01 Mar 2027 13:00:30 +0100", 30.0),
        ("Mon, 01 Mar 2027 12:00:30 -0000", 30.0),
        ("Mon, 01 Mar 2027 11:59:30 GMT", 0.0),
        ("Mon, 01 Mar 2032 12:00:00 GMT", 600.0),
        ("Mon, 01 Mar 99999 12:00:00 GMT", None),
        ("Mon, 41 Mar 2027 12:00:00 GMT", None),
        ("Fri, 31 Dec 9999 23:59:59 -2300", None),
    ],
)
def test_retry_after_is_read_as_seconds_or_a_date(value: str | None, seconds: float | None) -> None:
    """
    Never less than nothing, never more than 10 minutes.
    """
    assert retry_after_seconds(value, now=NOW) == seconds


@given(st.text(max_size=80))
def test_any_retry_after_is_survived(value: str) -> None:
    """
    The result is None or within the limits.
    """
    seconds = retry_after_seconds(value, now=NOW)
    assert seconds is None or 0 <= seconds <= 600


@pytest.mark.parametrize("row", OAUTH_ERRORS, ids=lambda row: row.word)
def test_each_oauth_word_means_what_its_row_says(row: OAuthError) -> None:
    """
    With any refusing status, and whatever AADSTS numbers come with it.
    """
    body = json.dumps(
        {
            "error": row.word,
            "error_description": f"AADSTS50196: {CANARY}",
            "error_codes": [50196],
        }
    ).encode()
    for status in (400, 401, 403):
        error = error_from_token_answer(status, {}, body, now=NOW)
        assert type(error) is row.meaning.kind
        assert error.code == row.meaning.code
        assert row.word in error.message
        assert CANARY not in error.message
        assert "AADSTS" not in error.message


@pytest.mark.parametrize(
    ("status", "kind", "code"),
    [
        (200, TransientError, "token_unusable"),
        (204, TransientError, "token_unusable"),
        (302, ConfigurationError, "redirect_refused"),
        (400, ConfigurationError, "token_refused"),
        (401, ConfigurationError, "token_refused"),
        (404, ConfigurationError, "token_refused"),
        (408, TransientError, "token_unavailable"),
        (418, ConfigurationError, "token_refused"),
        (429, ThrottledError, "token_throttled"),
        (500, TransientError, "token_unavailable"),
        (503, TransientError, "token_unavailable"),
        (777, TransientError, "token_unavailable"),
    ],
)
@pytest.mark.parametrize("body", [b"", b"<html>", b'{"error":"sesame"}', b'{"error":{"a":1}}'])
def test_the_token_endpoints_status_decides_without_a_known_word(
    status: int, kind: type[DeliveryError], code: str, body: bytes
) -> None:
    """
    No data was sent, so it is never doubtful.
    """
    error = error_from_token_answer(status, {"Retry-After": "9"}, body, now=NOW)
    assert type(error) is kind
    assert error.code == code
    assert not error.doubtful
    assert "sesame" not in error.message
    if isinstance(error, ThrottledError):
        assert error.retry_after == 9


def test_an_outage_of_entra_is_no_wrong_secret() -> None:
    """
    A 503 stays transient even if its body blames the client.
    """
    error = error_from_token_answer(503, {}, b'{"error":"invalid_client"}', now=NOW)
    assert isinstance(error, TransientError)


def test_a_body_that_is_too_long_is_not_parsed() -> None:
    """
    The status alone decides then.
    """
    padded = b'{"error":{"code":"0x80040217","message":"' + b" " * MAX_JSON_BYTES + b'"}}'
    assert answer(500, body=padded).code == "server_error"


statuses = st.integers(min_value=100, max_value=999)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
codes = json_values | st.sampled_from([row.hex for row in DATAVERSE_CODES])
error_objects = st.fixed_dictionaries({}, optional={"code": codes, "message": json_values})
bodies = (
    st.binary(max_size=200)
    | st.builds(lambda value: json.dumps(value).encode(), json_values)
    | st.builds(lambda value: json.dumps({"error": value}).encode(), error_objects)
    | st.builds(
        lambda code: json.dumps({"ErrorCode": code, "Message": CANARY}).encode(),
        codes,
    )
)


@given(
    status=statuses,
    headers=st.dictionaries(st.text(), st.text(), max_size=4),
    body=bodies,
    retry_after=st.text(max_size=40) | st.none(),
)
@example(status=404, headers={}, body=b"\xef\xbb\xbf{}", retry_after=None)
@example(status=400, headers={}, body=b'{"error":{"code":' + b"9" * 5000 + b"}}", retry_after=None)
def test_any_answer_at_all_becomes_one_of_the_four_errors(
    status: int, headers: dict[str, str], body: bytes, retry_after: str | None
) -> None:
    """
    With a stable code and one sentence.
    """
    if retry_after is not None:
        headers = {**headers, "Retry-After": retry_after}
    for classify in (error_from_answer, error_from_token_answer):
        error = classify(status, headers, body, now=NOW)
        assert type(error) in {TransientError, ThrottledError, PermanentError, ConfigurationError}
        assert re.fullmatch(r"[a-z][a-z0-9_]*", error.code)
        assert re.fullmatch(r"[A-Z][^.]*\.", error.message)


@given(
    status=statuses,
    code=st.sampled_from(["", "0x0", CANARY, *(row.hex for row in DATAVERSE_CODES)]),
    key=st.sampled_from(["message", "code", "innererror", CANARY, "error_description"]),
    header=st.sampled_from(["Retry-After", "x-ms-service-request-id", "Location", "Set-Cookie"]),
)
def test_no_word_of_a_server_gets_into_an_error(
    status: int, code: str, key: str, header: str
) -> None:
    """
    Neither its text nor its headers, in any attribute.
    """
    inner = {"code": code, "message": CANARY, key: CANARY}
    for document in ({"error": inner}, {"error": CANARY, **inner}, inner, [CANARY]):
        body = json.dumps(document).encode()
        for classify in (error_from_answer, error_from_token_answer):
            error = classify(status, {header: CANARY}, body, now=NOW)
            said = f"{error} {error!r} {error.args} {vars(error)}"
            assert CANARY not in said
            assert "Full Name" not in said
