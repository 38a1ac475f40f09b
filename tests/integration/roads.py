"""
The two ways to Dynamics, for tests of what holds on both.

    direct   the worker's own client                            ──► Dynamics
    edge     the worker's client of the function ──► Deno ──► Dynamics
"""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Protocol
from uuid import UUID

from tests.integration import edge_function
from worker.dynamics import EdgeKey, EntraAuth, dynamics_client, edge_client
from worker.dynamics.sandbox import DEFAULT_CLIENT_ID, DEFAULT_TENANT
from worker.http_client import HttpClient

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping
    from contextlib import AbstractAsyncContextManager

    from worker.dynamics import DynamicsClient, DynamicsTarget, EdgeClient

HLF = UUID("00000000-0000-4000-8000-000000000001")


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """
    What tokens are asked for with.

    Args:
        resource: the URL that they are for.
    """

    authority: str
    resource: str
    secret: str = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class OpenRoad:
    """
    A road that leads to Dynamics.

    Args:
        overheard: all that has been written down along it, so that secrets can be looked for.
    """

    client: DynamicsClient | EdgeClient
    overheard: Callable[[], str]


class Road(Protocol):
    """
    A way to Dynamics.
    """

    name: str

    def open(
        self, target: DynamicsTarget, credentials: Credentials
    ) -> AbstractAsyncContextManager[OpenRoad]:
        """
        A client with tokens.
        """

    def deadline(self, seconds: float) -> float:
        """
        A deadline that is met by whoever does not answer, and by nothing else.
        """


class Direct:
    """
    The worker has the credentials.
    """

    name = "direct"

    @asynccontextmanager
    async def open(
        self, target: DynamicsTarget, credentials: Credentials
    ) -> AsyncIterator[OpenRoad]:
        """
        A client with tokens.
        """
        auth = EntraAuth(
            authority=credentials.authority,
            tenant_id=DEFAULT_TENANT,
            client_id=DEFAULT_CLIENT_ID,
            secret=lambda: credentials.secret,
            resource=credentials.resource,
            http=HttpClient(),
        )
        async with AsyncExitStack() as stack:
            stack.push_async_callback(auth.aclose)
            client = await stack.enter_async_context(dynamics_client(target, auth=auth))
            yield OpenRoad(client=client, overheard=lambda: f"{auth!r} {client!r}")

    def deadline(self, seconds: float) -> float:
        """
        As it is.
        """
        return seconds


class Edge:
    """
    The function has the credentials.
    """

    name = "edge"

    @asynccontextmanager
    async def open(
        self, target: DynamicsTarget, credentials: Credentials
    ) -> AsyncIterator[OpenRoad]:
        """
        A client of a function of its own, which is given its settings.
        """
        settings = settings_of_function(target, credentials)
        async with edge_function.running(settings) as function:
            key = EdgeKey(function.url, lambda: edge_function.KEY)
            async with edge_client(
                target, organization_id=HLF, url=function.url, key=key
            ) as client:
                yield OpenRoad(
                    client=client,
                    overheard=lambda: f"{key!r} {client!r} {''.join(function.lines)}",
                )

    def deadline(self, seconds: float) -> float:
        """
        Long enough for the function to say what it knows before ours has passed.
        """
        return seconds + 2


ROADS: Mapping[str, Road] = {"direct": Direct(), "edge": Edge()}


def settings_of_function(target: DynamicsTarget, credentials: Credentials) -> dict[str, str]:
    """
    What is told to the function as its secrets.
    """
    where = {f"HLF_DYNAMICS_{name.upper()}": value for name, value in asdict(target).items()}
    return {
        **where,
        "HLF_DYNAMICS_URL": credentials.resource,
        "HLF_DYNAMICS_AUTHORITY": credentials.authority,
        "HLF_DYNAMICS_TENANT_ID": DEFAULT_TENANT,
        "HLF_DYNAMICS_CLIENT_ID": DEFAULT_CLIENT_ID,
        "HLF_DYNAMICS_CLIENT_SECRET": credentials.secret,
        "HLF_EDGE_KEY": edge_function.KEY,
        "HLF_ORGANIZATION_ID": str(HLF),
    }
