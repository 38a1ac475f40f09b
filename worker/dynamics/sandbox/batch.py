"""
$batch: many operations in one request.

Source: Microsoft Learn, "Execute batch operations using the Web API": multipart/mixed
with CRLF line ends, at most 1,000 operations, carried out one after the other, answered
in the same order; it stops at the first error and answers with that error's status,
unless `Prefer: odata.continue-on-error` is sent. Change sets are not built.
"""

from __future__ import annotations

import re
import urllib.parse
import uuid
from email.parser import BytesParser
from http import HTTPStatus
from typing import TYPE_CHECKING, cast

from worker.dynamics.sandbox.messages import Request, Response

if TYPE_CHECKING:
    from collections.abc import Sequence
    from email.message import Message

MAX_OPERATIONS = 1_000

_REQUEST_LINE = re.compile(r"(?P<method>[A-Z]+) (?P<target>\S+) HTTP/1\.1")
_BARE_LINE_END = re.compile(rb"(?<!\r)\n")


class BatchError(Exception):
    """
    Raised when a batch cannot be read; the text says why.
    """


def read_batch(envelope: Request) -> list[Request]:
    """
    The operations of a batch, as requests in their own right.

    Raises:
        BatchError: it is no batch, or one that Dataverse refuses as a whole.
    """
    content_type = envelope.headers.get("content-type", "")
    if not content_type.startswith("multipart/mixed") or "boundary=" not in content_type:
        raise BatchError("A batch is multipart/mixed and names its boundary.")
    if _BARE_LINE_END.search(envelope.body):
        raise BatchError("The line ends of a batch are CRLF.")
    head = f"Content-Type: {content_type}\r\n\r\n".encode("latin-1")
    message = BytesParser().parsebytes(head + envelope.body)
    parts = cast("list[Message]", message.get_payload() if message.is_multipart() else [])
    if not 1 <= len(parts) <= MAX_OPERATIONS:
        raise BatchError(f"A batch holds 1 to {MAX_OPERATIONS:,} operations.")
    return [_operation(envelope, part) for part in parts]


def _operation(envelope: Request, part: Message) -> Request:
    if part.get_content_type() != "application/http":
        raise BatchError("A part of a batch is application/http; change sets are not built.")
    content = part.get_payload(decode=True)
    raw = content if isinstance(content, bytes) else b""
    head, _, body = raw.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    line = _REQUEST_LINE.fullmatch(first)
    if not line or "$batch" in line["target"]:
        raise BatchError(f"This is no operation of a batch: {first!r}.")
    headers = {name.strip().lower(): value.strip() for name, _, value in map(_split, lines)}
    return Request(
        method=line["method"],
        target=_local(line["target"], envelope),
        headers={"host": envelope.headers.get("host", ""), **headers},
        body=body.removesuffix(b"\r\n"),
        scheme=envelope.scheme,
    )


def _split(line: str) -> tuple[str, str, str]:
    return line.partition(":")


def _local(target: str, envelope: Request) -> str:
    """
    The path of an operation, which may be written as a URL or relative to the service root.
    """
    service_root = envelope.path.removesuffix("$batch")
    url = urllib.parse.urlsplit(urllib.parse.urljoin(envelope.base_url + service_root, target))
    return f"{url.path}?{url.query}" if url.query else url.path


def continues_on_error(envelope: Request) -> bool:
    """
    Whether an operation that fails lets those after it run.
    """
    return "odata.continue-on-error" in envelope.headers.get("prefer", "")


def is_error(answer: Response) -> bool:
    """
    Whether an operation failed.
    """
    return answer.status >= HTTPStatus.BAD_REQUEST


def batch_answer(answers: Sequence[Response], *, continued: bool) -> Response:
    """
    The answers of the operations as one.

    Args:
        answers: in order; after an error only with `continued`.
        continued: an error did not stop the batch, so the whole is a success.
    """
    boundary = f"batchresponse_{uuid.uuid4()}"
    pieces = [_part(answer, boundary) for answer in answers]
    failed = is_error(answers[-1]) and not continued
    return Response(
        status=answers[-1].status if failed else HTTPStatus.OK,
        headers=(
            ("Content-Type", f"multipart/mixed; boundary={boundary}"),
            ("OData-Version", "4.0"),
            ("x-ms-service-request-id", str(uuid.uuid4())),
        ),
        body=b"".join(pieces) + f"--{boundary}--\r\n".encode(),
        code=answers[-1].code if failed else None,
    )


def _part(answer: Response, boundary: str) -> bytes:
    lines = [
        f"--{boundary}",
        "Content-Type: application/http",
        "Content-Transfer-Encoding: binary",
        "",
        f"HTTP/1.1 {answer.status} {HTTPStatus(answer.status).phrase}",
        *(f"{name}: {value}" for name, value in answer.headers),
        "",
        "",
    ]
    return "\r\n".join(lines).encode("latin-1") + answer.body + b"\r\n"
