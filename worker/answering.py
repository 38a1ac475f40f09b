"""
A web server in a loop of ours: it says nothing about itself and believes nobody about addresses.

Loaded by what serves something, and by no other command.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import uvicorn
from typing_extensions import override
from uvicorn.protocols.http.h11_impl import H11Protocol

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterator

    from starlette.types import ASGIApp


class _Connection(H11Protocol):
    """
    uvicorn's, which closes what falls silent after an answer; this one closes, after the same
    time, also what never asked anything or falls silent in the middle of a request's head.
    """

    @override
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._limit_silence()

    @override
    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._limit_silence()

    def _limit_silence(self) -> None:
        is_answered = getattr(self.cycle, "response_complete", True)  # there is none at first
        is_limited = self.timeout_keep_alive_task is not None
        if is_answered and not is_limited and not self.transport.is_closing():
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )


class Server(uvicorn.Server):
    """
    uvicorn, which leaves signals to whoever runs the loop.

    Args:
        idle_seconds: of silence, after which a connection that waits for no answer is closed.
        grace_seconds: for answers under way when it is told to end.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        lifespan: Literal["on", "off"],
        idle_seconds: int,
        grace_seconds: int,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=_Connection,
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                ws="none",
                lifespan=lifespan,
                loop="none",
                timeout_keep_alive=idle_seconds,
                timeout_graceful_shutdown=grace_seconds,
            )
        )

    @override
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
