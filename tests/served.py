"""
An ASGI application on a loopback port, in the test's own loop.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from tests.canaries import Searched
from tests.conftest import until
from worker.coordinator.app import Dashboard
from worker.coordinator.serving import Server, listening_socket
from worker.listening import address_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.applications import Starlette


@asynccontextmanager
async def served(app: Starlette, *, port: int = 0) -> AsyncIterator[str]:
    """
    Serve it as the command does; yields its address, without a slash at its end.

    No answer of the dashboard may hold a secret. What plays the other side hands them out.
    """
    listener = listening_socket("127.0.0.1", port, login=False)
    searched = Searched(app)
    if isinstance(app, Dashboard):
        server = Server(searched, on_end=app.end_streams)
    else:
        server = Server(app, on_end=_nothing)
    with listener:
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            await until(lambda: server.started or serving.done())
            yield address_of(listener)
        finally:
            server.should_exit = True
            await serving
    assert searched.found == []


def _nothing() -> None:
    """
    There are no streams.
    """
