"""
Microsoft's own library as a judge: MSAL must get along with the pretend Entra ID.
"""

from __future__ import annotations

import asyncio
import ssl
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import msal  # type: ignore[import-untyped]
import pytest
import trustme

from worker.dynamics.sandbox import (
    DEFAULT_CLIENT_ID,
    DEFAULT_CLIENT_SECRET,
    DEFAULT_TENANT,
    Sandbox,
    Status,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@pytest.fixture
def authority() -> trustme.CA:
    """
    A certificate authority of our own.
    """
    return trustme.CA()


@pytest.fixture
def ca_file(authority: trustme.CA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """
    Its certificate as a file, and nothing in the environment that would override it.
    """
    for variable in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(variable, raising=False)
    path = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(path)
    return str(path)


@asynccontextmanager
async def serving(authority: trustme.CA) -> AsyncIterator[tuple[Sandbox, str]]:
    """
    A sandbox under TLS, as MSAL insists, and its URL.
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    sandbox = Sandbox()
    async with sandbox.serve(host="localhost", ssl_context=context) as running:
        yield sandbox, running.url


async def acquire(
    url: str, ca_file: str, *, credential: str = DEFAULT_CLIENT_SECRET
) -> dict[str, Any]:
    """
    What MSAL returns for client credentials; it is not asynchronous, so in a thread.
    """

    def ask() -> dict[str, Any]:
        app = msal.ConfidentialClientApplication(
            DEFAULT_CLIENT_ID,
            client_credential=credential,
            authority=f"{url}/{DEFAULT_TENANT}",
            instance_discovery=False,
            verify=ca_file,
        )
        answer: dict[str, Any] = app.acquire_token_for_client(scopes=[f"{url}/.default"])
        return answer

    return await asyncio.to_thread(ask)


async def test_msal_gets_a_token(authority: trustme.CA, ca_file: str) -> None:
    """
    Discovery and token endpoint speak Entra's dialect.
    """
    async with serving(authority) as (sandbox, url):
        answer = await acquire(url, ca_file)

        expected = {"token_type": "Bearer", "expires_in": 3599, "token_source": "identity_provider"}
        assert answer.items() >= expected.items()
        assert [entry.kind for entry in sandbox.ledger.entries] == ["discovery", "token"]


async def test_msal_understands_a_wrong_secret(authority: trustme.CA, ca_file: str) -> None:
    """
    MSAL hands on the error as it came.
    """
    async with serving(authority) as (_, url):
        answer = await acquire(url, ca_file, credential="wrong")

        assert answer["error"] == "invalid_client"
        assert answer["error_codes"] == [7000215]
        assert answer["error_description"].startswith("AADSTS7000215: Invalid client secret")


async def test_msal_meets_an_outage(authority: trustme.CA, ca_file: str) -> None:
    """
    An ordered 503 at the token endpoint is what MSAL calls a service error.
    """
    async with serving(authority) as (sandbox, url):
        sandbox.order(Status(target="token", method="POST", status=503, times=None))

        with pytest.raises(msal.exceptions.MsalServiceError, match="503"):
            await acquire(url, ca_file)
