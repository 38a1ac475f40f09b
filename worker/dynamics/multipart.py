"""
The bytes of a $batch: several requests in one body, several answers in another.

Source: Microsoft Learn, "Execute batch operations using the Web API": multipart/mixed, parts
of application/http, CRLF line ends; the answers stand in the order of the requests.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from email.parser import BytesParser
from email.policy import HTTP
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from email.message import EmailMessage

CRLF = "\r\n"

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
    """
    head = f"Content-Type: {content_type}{CRLF}{CRLF}".encode("latin-1", errors="replace")
    message = BytesParser(policy=HTTP).parsebytes(head + body)
    if message.get_content_type() != "multipart/mixed" or not message.is_multipart():
        return []
    parts = cast("list[EmailMessage]", message.get_payload())
    if any("CloseBoundaryNotFound" in type(defect).__name__ for defect in message.defects):
        parts = parts[:-1]  # the last one may be cut
    answers: list[PartAnswer] = []
    for part in parts:
        answer = _decode(part)
        if answer is None:
            break
        answers.append(answer)
    return answers


def _decode(part: EmailMessage) -> PartAnswer | None:
    content = part.get_payload(decode=True)
    if part.get_content_type() != "application/http" or not isinstance(content, bytes):
        return None
    head, _, body = content.partition(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    if (line := _STATUS_LINE.fullmatch(first)) is None:
        return None
    pairs = (text.decode("latin-1").partition(":") for text in lines)
    return PartAnswer(
        status=int(line[1]),
        headers={name.strip().lower(): value.strip() for name, _, value in pairs},
        body=body.removesuffix(b"\r\n"),
    )
