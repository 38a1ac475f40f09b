"""
A running sandbox and a client of it, for tests.
"""

from __future__ import annotations

import asyncio
import ssl
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx

from worker.dynamics.sandbox import (
    DEFAULT_ACTION,
    DEFAULT_CLIENT_ID,
    DEFAULT_CLIENT_SECRET,
    DEFAULT_TENANT,
    Sandbox,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

ROW = "0a000000-0000-4000-8000-00000000000a"
OTHER_ROW = "0b000000-0000-4000-8000-00000000000b"
NO_ROW = "0f000000-0000-4000-8000-00000000000f"
HIDE = {"hlf_portalvisible": False}
ODATA = {"OData-Version": "4.0", "OData-MaxVersion": "4.0", "Accept": "application/json"}
UPDATE_ONLY = {"If-Match": "*"}
NO_TRUST = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # plain http: loading certificates is slow


class SteppedClock:
    """
    A clock that moves when it is told to.
    """

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        """
        Seconds.
        """
        return self.now


@dataclass
class Api:
    """
    A client of a running sandbox.
    """

    http: httpx.AsyncClient
    url: str
    token: str = ""

    async def ask_token(
        self, *, tenant: str | None = DEFAULT_TENANT, **form: str | None
    ) -> httpx.Response:
        """
        Ask for a token; a field given as None is left out.
        """
        fields: dict[str, str | None] = {
            "grant_type": "client_credentials",
            "client_id": DEFAULT_CLIENT_ID,
            "client_secret": DEFAULT_CLIENT_SECRET,
            "scope": f"{self.url}/.default",
        }
        given = {name: value for name, value in (fields | form).items() if value is not None}
        return await self.http.post(f"/{tenant}/oauth2/v2.0/token", data=given)

    async def log_in(self) -> Api:
        """
        Fetch the token that all later calls carry.
        """
        answer = await self.ask_token()
        self.token = answer.json()["access_token"]
        return self

    def headers(self, **more: str | None) -> dict[str, str]:
        """
        What a good client sends; a header given as None is left out.
        """
        wanted = {"Authorization": f"Bearer {self.token}", **ODATA, **UPDATE_ONLY}
        changed = wanted | {name.replace("_", "-"): text for name, text in more.items()}
        return {name: text for name, text in changed.items() if text is not None}

    async def patch(
        self,
        row: str = ROW,
        body: object = HIDE,
        *,
        table: str | None = None,
        **headers: str | None,
    ) -> httpx.Response:
        """
        Change a row.
        """
        path = f"/api/data/v9.2/{table or 'contacts'}({row})"
        return await self.http.patch(path, json=body, headers=self.headers(**headers))

    async def act(self, body: object, *, action: str = DEFAULT_ACTION) -> httpx.Response:
        """
        Call the Custom API.
        """
        path = f"/api/data/v9.2/{action}"
        return await self.http.post(path, json=body, headers=self.headers(If_Match=None))


@asynccontextmanager
async def serving(
    sandbox: Sandbox | None = None,
    **options: Any,  # noqa: ANN401 - those of Sandbox
) -> AsyncIterator[tuple[Sandbox, Api]]:
    """
    A running sandbox with two rows, and a client that has a token.
    """
    sandbox = sandbox or Sandbox(rows=two_rows(), **options)
    async with (
        sandbox.serve() as running,
        httpx.AsyncClient(base_url=running.url, verify=NO_TRUST) as http,
    ):
        yield sandbox, await Api(http, running.url).log_in()


def two_rows() -> dict[str, dict[str, dict[str, Any]]]:
    """
    Two visible mentors.
    """
    return {"contacts": {row: {"hlf_portalvisible": True} for row in (ROW, OTHER_ROW)}}


def visible(sandbox: Sandbox, row: str = ROW) -> object:
    """
    What the portal shows.
    """
    return sandbox.rows["contacts"][row].get("hlf_portalvisible")


def code(answer: httpx.Response) -> str:
    """
    Dataverse's error code.
    """
    return str(answer.json()["error"]["code"])


async def raw_patch(api: Api) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """
    Send a good request over a socket of our own.
    """
    host, port = api.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    request = api.http.build_request(
        "PATCH", f"/api/data/v9.2/contacts({ROW})", json=HIDE, headers=api.headers()
    )
    lines = [
        f"PATCH {request.url.path} HTTP/1.1",
        *(f"{k}: {v}" for k, v in request.headers.items()),
    ]
    writer.write("\r\n".join([*lines, "", ""]).encode() + request.content)
    return reader, writer
