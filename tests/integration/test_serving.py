"""
The dashboard as a process: where it may listen, how it starts and how it ends.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import httpx
import pytest

from worker.coordinator.serving import listening_socket
from worker.errors import SettingsError
from worker.http_client import is_loopback
from worker.listening import address_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.factories import World


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", "127.0.0.1.nip.io"])  # noqa: S104
def test_without_a_login_it_listens_to_this_machine_alone(host: str) -> None:
    """
    Whatever is asked for; the refusal says what to set.
    """
    with pytest.raises(SettingsError, match="HLF_OIDC_ISSUER") as refused:
        listening_socket(host, 0, login=False)
    assert refused.value.exit_code == 78


def test_this_machine_has_three_names() -> None:
    """
    And a network of its own.
    """
    assert all(is_loopback(host) for host in ("localhost", "127.0.0.1", "127.9.9.9", "::1"))


def test_an_address_that_is_taken_is_said() -> None:
    """
    In a sentence that names the settings.
    """
    with listening_socket("127.0.0.1", 0, login=False) as first:
        port = first.getsockname()[1]
        assert address_of(first) == f"http://127.0.0.1:{port}"
        with pytest.raises(SettingsError, match="HLF_DASHBOARD_PORT"):
            listening_socket("127.0.0.1", port, login=False)


@pytest.fixture
def environment(world: World, database_url: str) -> dict[str, str]:
    """
    Of the command.
    """
    return {
        "PATH": os.environ["PATH"],
        "DATABASE_URL": database_url,
        "HLF_ORGANIZATION_ID": str(world.hlf),
        "HLF_DASHBOARD_PORT": "0",
        "PYTHONWARNINGS": "error",
    }


async def start(environment: dict[str, str]) -> asyncio.subprocess.Process:
    """
    Start the command.
    """
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "worker", "dashboard"),
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


@asynccontextmanager
async def running(
    environment: dict[str, str],
) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """
    The command and where its page is; it is killed if the test has not ended it.
    """
    process = await start(environment)
    assert process.stdout is not None
    try:
        async with asyncio.timeout(60):
            line = (await process.stdout.readline()).decode()
        found = re.search(r"http://\S+", line)
        assert found, line + (await process.communicate())[1].decode()
        yield process, found[0].rstrip("/")
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_it_ends_within_five_seconds_with_streams_open(
    environment: dict[str, str], number: signal.Signals
) -> None:
    """
    As told, with exit code 0; whoever watches is let go.
    """
    async with (
        running(environment) as (process, url),
        httpx.AsyncClient(base_url=url, timeout=60) as viewer,
    ):
        assert (await viewer.get("/")).status_code == 200
        heard = asyncio.Event()

        async def watch() -> None:
            async with viewer.stream("GET", "/stream") as stream:
                async for _ in stream.aiter_raw():
                    heard.set()

        watching = [asyncio.create_task(watch()) for _ in range(5)]
        await heard.wait()
        told = time.monotonic()
        process.send_signal(number)
        async with asyncio.timeout(30):
            _, errors = await process.communicate()
        took = time.monotonic() - told
        await asyncio.gather(*watching, return_exceptions=True)
    assert process.returncode == 0, errors.decode()
    assert took < 5, errors.decode()
    assert "Traceback" not in errors.decode()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"HLF_DASHBOARD_HOST": "0.0.0.0"}, "no login is set up"),  # noqa: S104
        ({"HLF_OIDC_ISSUER": "https://id.example"}, "belong together"),
        (
            {"HLF_OIDC_ISSUER": "https://id.example", "HLF_OIDC_CLIENT_ID": "x"},
            "needs HLF_DASHBOARD_URL",
        ),
        (
            {
                "HLF_OIDC_ISSUER": "https://id.example",
                "HLF_OIDC_CLIENT_ID": "x",
                "HLF_DASHBOARD_URL": "http://sync.example",
            },
            "HLF_DASHBOARD_URL must start with https://",
        ),
        (
            {
                "HLF_OIDC_ISSUER": "http://id.example",
                "HLF_OIDC_CLIENT_ID": "x",
                "HLF_DASHBOARD_URL": "https://sync.example",
            },
            "HLF_OIDC_ISSUER must start with https://",
        ),
        (
            {
                "HLF_OIDC_ISSUER": "https://id.example",
                "HLF_OIDC_CLIENT_ID": "x",
                "HLF_DASHBOARD_URL": "https://sync.example",
                "HLF_OIDC_CLIENT_SECRET_FILE": "/nowhere/at-all",
            },
            "HLF_OIDC_CLIENT_SECRET_FILE: cannot read",
        ),
    ],
)
async def test_what_is_not_safe_is_refused_with_a_sentence(
    environment: dict[str, str], settings: dict[str, str], sentence: str
) -> None:
    """
    Exit code 78, and nothing listens.
    """
    process = await start(environment | settings)
    async with asyncio.timeout(60):
        _, errors = await process.communicate()
    assert process.returncode == 78, errors.decode()
    assert sentence in errors.decode()
    assert "Traceback" not in errors.decode()
