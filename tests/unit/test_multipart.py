"""
A batch to the byte, and what can be read out of an answer to one.
"""

from __future__ import annotations

import pytest

from worker.dynamics.multipart import Part, content_type_of, decode, encode

ANSWER = (
    b"--batchresponse_1\r\n"
    b"Content-Type: application/http\r\n"
    b"Content-Transfer-Encoding: binary\r\n"
    b"\r\n"
    b"HTTP/1.1 204 No Content\r\n"
    b"OData-Version: 4.0\r\n"
    b"\r\n"
    b"\r\n"
    b"--batchresponse_1\r\n"
    b"Content-Type: application/http\r\n"
    b"Content-Transfer-Encoding: binary\r\n"
    b"\r\n"
    b"HTTP/1.1 429 Too Many Requests\r\n"
    b"Retry-After: 7\r\n"
    b"Content-Type: application/json\r\n"
    b"\r\n"
    b'{"error":{"code":"0x80072322","message":"Later."}}\r\n'
    b"--batchresponse_1--\r\n"
)
TYPE = "multipart/mixed; boundary=batchresponse_1"


def test_a_batch_is_exactly_these_bytes() -> None:
    """
    Line ends, boundaries, no change set: as on Microsoft's page about batches.
    """
    parts = [
        Part(
            method="PATCH",
            target="/api/data/v9.2/contacts(a)",
            headers={"If-Match": "*", "Content-Type": "application/json"},
            body=b'{"x":true}',
        ),
        Part(method="POST", target="/api/data/v9.2/do", headers={}, body=b"{}"),
    ]

    assert encode(parts, boundary="batch_1") == (
        b"--batch_1\r\n"
        b"Content-Type: application/http\r\n"
        b"Content-Transfer-Encoding: binary\r\n"
        b"\r\n"
        b"PATCH /api/data/v9.2/contacts(a) HTTP/1.1\r\n"
        b"If-Match: *\r\n"
        b"Content-Type: application/json\r\n"
        b"\r\n"
        b'{"x":true}\r\n'
        b"--batch_1\r\n"
        b"Content-Type: application/http\r\n"
        b"Content-Transfer-Encoding: binary\r\n"
        b"\r\n"
        b"POST /api/data/v9.2/do HTTP/1.1\r\n"
        b"\r\n"
        b"{}\r\n"
        b"--batch_1--\r\n"
    )
    assert content_type_of("batch_1") == 'multipart/mixed; boundary="batch_1"'


def test_each_answer_has_its_status_its_headers_and_its_body() -> None:
    """
    In the order of the requests.
    """
    first, second = decode(TYPE, ANSWER)

    assert (first.status, first.body) == (204, b"")
    assert first.headers["odata-version"] == "4.0"
    assert (second.status, second.headers["retry-after"]) == (429, "7")
    assert second.body == b'{"error":{"code":"0x80072322","message":"Later."}}'


@pytest.mark.parametrize("cut", range(len(ANSWER)))
def test_an_answer_that_is_cut_anywhere_says_nothing_untrue(cut: int) -> None:
    """
    Whatever can be read is what was sent; a later one is never taken for an earlier one.
    """
    whole = decode(TYPE, ANSWER)

    got = decode(TYPE, ANSWER[:cut])

    assert got == whole[: len(got)]


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("text/html", ANSWER),
        ("", ANSWER),
        ("multipart/mixed", ANSWER),
        ("multipart/mixed; boundary=another", ANSWER),
        (TYPE, b""),
        (TYPE, b"\xff\x00 nonsense"),
        ("multipart/mixed; boundary=\xe9\u2603", ANSWER),
    ],
)
def test_what_is_no_answer_to_a_batch_has_no_answers(content_type: str, body: bytes) -> None:
    """
    A login page, a proxy's words, nothing at all.
    """
    assert decode(content_type, body) == []


@pytest.mark.parametrize(
    "kind", ["application/http; msgtype=response", "Application/HTTP", "application/http ;x=y"]
)
def test_the_kind_of_a_part_may_have_parameters_and_capitals(kind: str) -> None:
    """
    A gateway may write it in its own way.
    """
    body = f"--b\r\nContent-Type: {kind}\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n\r\n--b--\r\n"
    [answer] = decode("multipart/mixed; boundary=b", body.encode())
    assert answer.status == 204


def test_what_follows_an_unreadable_answer_is_not_returned() -> None:
    """
    Its position would be a guess, and positions are all there is to tell whose it is.
    """
    broken = ANSWER.replace(b"HTTP/1.1 204 No Content", b"Surprise")

    assert decode(TYPE, broken) == []
