"""
The bytes of a $batch: several requests in one body, several answers in another.

Source: Microsoft Learn, "Execute batch operations using the Web API": multipart/mixed, parts
of application/http, CRLF line ends; the answers stand in the order of the requests.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from email.message import Message
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

CRLF = "\r\n"
_CRLF = b"\r\n"

_STATUS_LINE = re.compile(rb"HTTP/1\.1 ([0-9]{3})(?: [^\r\n]*)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """
    One request of a batch.

    Args:
        target: path from the root of the host.
        headers: its own; those of the batch are not repeated.
    """

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PartAnswer:
    """
    One answer in the answer to a batch.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes = field(repr=False)


def content_type_of(boundary: str) -> str:
    """
    The Content-Type of a batch.
    """
    return f'multipart/mixed; boundary="{boundary}"'


def encode(parts: Sequence[Part], *, boundary: str) -> bytes:
    """
    The body of a batch. No change set: each request stands for itself.
    """
    pieces = [_encode(part, boundary) for part in parts]
    return b"".join([*pieces, f"--{boundary}--{CRLF}".encode("ascii")])


def _encode(part: Part, boundary: str) -> bytes:
    lines = [
        f"--{boundary}",
        "Content-Type: application/http",
        "Content-Transfer-Encoding: binary",
        "",
        f"{part.method} {part.target} HTTP/1.1",
        *(f"{name}: {value}" for name, value in part.headers.items()),
        "",
        "",
    ]
    return CRLF.join(lines).encode("ascii") + part.body + CRLF.encode("ascii")


def decode(content_type: str, body: bytes) -> list[PartAnswer]:
    """
    The answers in the answer to a batch, as many as can be read from its beginning on.

    What is no multipart, or is cut short, gives fewer; what follows something unreadable is
    not returned, because its position would be a guess.

    Source of the delimiters: RFC 2046, section 5.1.1.
    """
    answers: list[PartAnswer] = []
    if (boundary := _boundary(content_type)) is None:
        return answers
    _, *parts = (_CRLF + body).split(_CRLF + b"--" + boundary)
    # What follows the last delimiter is the end, or may be cut.
    for part in parts[:-1]:
        answer = _decode(part)
        if answer is None:
            break
        answers.append(answer)
    return answers


def _boundary(content_type: str) -> bytes | None:
    message = Message()
    message["Content-Type"] = content_type
    boundary = message.get_boundary()
    if message.get_content_type() != "multipart/mixed" or boundary is None:
        return None
    return boundary.encode("latin-1", errors="replace")


def _decode(part: bytes) -> PartAnswer | None:
    """
    One answer: white space to the end of the delimiter's line, headers of its own, the rest.
    """
    padding, _, rest = part.partition(_CRLF)
    about, _, content = rest.partition(_CRLF + _CRLF)
    kind, _, _ = _headers(about).get("content-type", "").partition(";")
    if padding.strip() or kind.strip().lower() != "application/http":
        return None
    head, _, body = content.partition(_CRLF + _CRLF)
    first, _, fields = head.partition(_CRLF)
    if (line := _STATUS_LINE.fullmatch(first)) is None:
        return None
    return PartAnswer(status=int(line[1]), headers=_headers(fields), body=body.removesuffix(_CRLF))


def _headers(fields: bytes) -> dict[str, str]:
    pairs = (field.partition(":") for field in fields.decode("latin-1").split(CRLF))
    return {name.strip().lower(): value.strip() for name, _, value in pairs if name}
