"""
Canaries: every secret of the tests begins with the same word, and whatever a test leaves behind
is searched for it when the test ends: rows, what was printed and logged, pages and documents.

    CLIENT_SECRET = "canary-4b7e-login-secret"

The word is found as it is and in base64, as which it stands in a token or a header.
"""

from __future__ import annotations

import base64
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

WORD = "canary-"


def _in_base64(word: str) -> Iterable[str]:
    """
    What stands for a word in base64, wherever in the text it begins.
    """
    for before in range(3):
        encoded = base64.b64encode(b"\0" * before + word.encode()).decode().rstrip("=")
        first = -(-before * 8 // 6)
        last = (before + len(word)) * 8 // 6
        yield encoded[first:last]


PATTERN = "|".join(map(re.escape, (WORD, *_in_base64(WORD))))
_CANARY = re.compile(f"(?:{PATTERN})[^\\s\"']{{0,40}}")


def found(text: str) -> list[str]:
    """
    The canaries in a text.
    """
    return _CANARY.findall(text)


class Searched:
    """
    An ASGI application whose answers are searched on their way out.

    What was found is in `found`, each with the path that was asked.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.found: list[str] = []
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """
        Let it answer.
        """

        async def searched(message: Message) -> None:
            if message["type"] == "http.response.body":
                body = message.get("body", b"").decode(errors="replace")
                self.found += [f"{scope['path']}: {one}" for one in found(body)]
            await send(message)

        await self._app(scope, receive, searched)
