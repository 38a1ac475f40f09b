"""
A webhook on loopback that checks signatures, keeps what it got, and answers as it is told.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from standardwebhooks import Webhook

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator

SECRET = "whsec_Y2FuYXJ5LTE3YjItcmVtaW5kZXItc2VjcmV0"  # noqa: S105 (of this receiver)


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """
    One request as it arrived.
    """

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def id(self) -> str:
        """
        Of the message, the same at each attempt.
        """
        return self.headers["webhook-id"]

    @property
    def data(self) -> dict[str, Any]:
        """
        The reminder, if the signature is right.
        """
        document = Webhook(SECRET).verify(self.body, self.headers)
        assert document["type"] == "certification.reminder"
        data: dict[str, Any] = document["data"]
        return data


@dataclass(slots=True)
class Receiver:
    """
    Attributes:
        answers: raw answers for the next requests; None says nothing at all; 204 afterwards.
        messages: what arrived, in order.
    """

    url: str = ""
    answers: deque[bytes | None] = field(default_factory=deque)
    usual: bytes | None = b"HTTP/1.1 204 No Content\r\n\r\n"
    messages: list[Message] = field(default_factory=list)

    def answer(self, *statuses: int, **headers: str) -> None:
        """
        Answer the next requests with these statuses.
        """
        lines = "".join(f"{name.replace('_', '-')}: {text}\r\n" for name, text in headers.items())
        for status in statuses:
            self.answers.append(f"HTTP/1.1 {status} X\r\nContent-Length: 0\r\n{lines}\r\n".encode())

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """
        One connection.
        """
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                first, *lines = head.splitlines()
                headers = dict(line.lower().split(": ", 1) for line in lines if line)
                # Signatures have capital letters.
                headers |= {
                    line.split(": ", 1)[0].lower(): line.split(": ", 1)[1] for line in lines if line
                }
                body = await reader.readexactly(int(headers.get("content-length", "0")))
                self.messages.append(Message(path=first.split(" ")[1], headers=headers, body=body))
                answer = self.answers.popleft() if self.answers else self.usual
                if answer is None:
                    break
                writer.write(answer)
                await writer.drain()
        writer.close()


@asynccontextmanager
async def receiving(tls: ssl.SSLContext | None = None) -> AsyncIterator[Receiver]:
    """
    A receiver on a port of its own.
    """
    receiver = Receiver()
    server = await asyncio.start_server(receiver.serve, "127.0.0.1", 0, ssl=tls)
    port = server.sockets[0].getsockname()[1]
    receiver.url = f"{'https' if tls else 'http'}://127.0.0.1:{port}/hooks/reminders"
    async with server:
        yield receiver


def as_json(message: Message) -> dict[str, Any]:
    """
    The whole document of a message.
    """
    document: dict[str, Any] = json.loads(message.body)
    return document
