"""
A web server in a loop of ours: it says nothing about itself and believes nobody about addresses.

Loaded by what serves something, and by no other command.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import uvicorn
from typing_extensions import override

if TYPE_CHECKING:
    from collections.abc import Iterator

    from starlette.types import ASGIApp


class Server(uvicorn.Server):
    """
    uvicorn, which leaves signals to whoever runs the loop.

    Args:
        idle_seconds: before a connection on which nothing is asked is closed.
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
