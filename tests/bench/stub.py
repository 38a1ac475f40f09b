"""
The far side of every measurement: answers at once, or after a fixed time, and counts.

    PATCH …(key)      204, one update
    POST …/$batch     200, a multipart answer with a 204 for each PATCH in it
    POST …/token      200, a bearer token that any client takes
    GET /counted      {"patches", "batches", "updates", "first_ns", "last_ns"}
    GET /arrivals     [[nanoseconds, key], …] since the last reset, if they are kept
    POST /reset       {"latency_ms": 50, "keep": true}: begin to count anew

It parses no more of HTTP than its contenders send, so that it is never the slowest part: one
process, no framework. Times are CLOCK_MONOTONIC, which all processes of a machine share.

    python -m tests.bench.stub       prints {"port": …} and runs until it is ended
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from functools import cache
from typing import Any, cast

from typing_extensions import override

LENGTH = re.compile(rb"\r\ncontent-length: *([0-9]+)", re.IGNORECASE)
KEY = re.compile(rb"\(([^)]*)\)")

NO_CONTENT = b"HTTP/1.1 204 No Content\r\nOData-Version: 4.0\r\n\r\n"
TOKEN = json.dumps({"token_type": "Bearer", "expires_in": 3599, "access_token": "t" * 1200})


class Counted:
    """
    What arrived since the last reset.
    """

    def __init__(self, *, latency_ms: float = 0.0, keep: bool = False) -> None:
        self.latency_seconds = latency_ms / 1000
        self.patches = 0
        self.batches = 0
        self.updates = 0
        self.first_ns = 0
        self.last_ns = 0
        self.arrivals: list[tuple[int, str]] | None = [] if keep else None

    def count(self, updates: int, head: bytes) -> None:
        """
        One request, with so many updates in it.
        """
        now = time.monotonic_ns()
        self.first_ns = self.first_ns or now
        self.last_ns = now
        self.updates += updates
        if self.arrivals is not None and (key := KEY.search(head)):
            self.arrivals.append((now, key[1].decode()))

    def document(self) -> dict[str, int]:
        """
        For `/counted`.
        """
        names = ("patches", "batches", "updates", "first_ns", "last_ns")
        return {name: getattr(self, name) for name in names}


counted = Counted()


class Stub(asyncio.Protocol):
    """
    One connection.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    @override
    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = bytes(self._buffer[:end])
            length = LENGTH.search(head)
            whole = end + 4 + (int(length[1]) if length else 0)
            if len(self._buffer) < whole:
                return
            body = bytes(self._buffer[end + 4 : whole])
            del self._buffer[:whole]
            self._answer(head, body)

    def _answer(self, head: bytes, body: bytes) -> None:
        if head.startswith(b"PATCH "):
            counted.patches += 1
            counted.count(1, head)
            self._write(NO_CONTENT, counted.latency_seconds)
        elif b"/$batch " in head[:200]:
            updates = body.count(b"\r\nPATCH ")
            counted.batches += 1
            counted.count(updates, head)
            self._write(_batch_answer(updates), counted.latency_seconds)
        else:
            self._write(_control(head, body), 0)

    def _write(self, answer: bytes, seconds: float) -> None:
        assert self._transport is not None
        if seconds:
            asyncio.get_running_loop().call_later(seconds, self._transport.write, answer)
        else:
            self._transport.write(answer)


@cache
def _batch_answer(updates: int) -> bytes:
    part = (
        b"--batchresponse_1\r\nContent-Type: application/http\r\n"
        b"Content-Transfer-Encoding: binary\r\n\r\n" + NO_CONTENT + b"\r\n"
    )
    body = part * updates + b"--batchresponse_1--\r\n"
    return _ok("multipart/mixed; boundary=batchresponse_1", body)


def _ok(content_type: str, body: bytes) -> bytes:
    head = f"HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def _control(head: bytes, body: bytes) -> bytes:
    global counted  # noqa: PLW0603 (the one thing this process is about)
    path = head.split(b" ", 2)[1]
    answer: Any = {}
    if path == b"/reset":
        counted = Counted(**json.loads(body or b"{}"))
    elif path == b"/counted":
        answer = counted.document()
    elif path == b"/arrivals":
        answer = counted.arrivals or []
    elif path.endswith(b"/token"):
        return _ok("application/json", TOKEN.encode())
    return _ok("application/json", json.dumps(answer).encode())


async def serve() -> None:
    """
    Serve on a free port of this machine for ever.
    """
    server = await asyncio.get_running_loop().create_server(Stub, "127.0.0.1", 0, backlog=512)
    sys.stdout.write(json.dumps({"port": server.sockets[0].getsockname()[1]}) + "\n")
    sys.stdout.flush()
    await server.serve_forever()


if __name__ == "__main__":
    import uvloop

    uvloop.run(serve())
