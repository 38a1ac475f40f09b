"""
Who may: a person who logged in, an app with a token, or, on this machine alone, whoever is there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from starlette.requests import HTTPConnection
    from starlette.routing import BaseRoute

    from worker.coordinator.callers import Caller


class Access(Protocol):
    """
    How callers are told apart.
    """

    async def caller(self, request: HTTPConnection) -> Caller | None:
        """
        Whoever asks; None if that is not known.
        """

    def routes(self) -> list[BaseRoute]:
        """
        Of logging in and out.
        """

    @property
    def logs_in(self) -> bool:
        """
        Whether there is a login to send people to.
        """


class Local:
    """
    Without a login: whoever can reach the loopback address is this machine's coordinator.
    """

    logs_in = False

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    async def caller(self, request: HTTPConnection) -> Caller | None:  # noqa: ARG002
        """
        The one there is.
        """
        return self._caller

    def routes(self) -> list[BaseRoute]:
        """
        None: nobody logs in or out.
        """
        return []
