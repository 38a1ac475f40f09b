"""
A database that goes silent: connected, and nothing comes through any more.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url

from tests.chaos.proxy import Blackhole, HalfOpen, listening
from worker import credentials, database
from worker.database import reading, transaction

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sqlalchemy.ext.asyncio import AsyncEngine

    from tests.chaos.proxy import Fault

AT_MOST = 5.0
"""Of the deadlines below and a second for calling off, with room for a busy machine."""


@asynccontextmanager
async def silenced(database_url: str, fault: Fault) -> AsyncIterator[AsyncEngine]:
    """
    An engine with an idle connection in its pool, on a line that has gone silent since.
    """
    url = make_url(database_url)
    host = url.host or str(url.query.get("host"))
    async with listening(host, url.port or 5432) as proxy:
        near = url.set(host="127.0.0.1", port=proxy.port, query={})
        engine = database.connect(
            near.render_as_string(hide_password=False), application_name="test", pool_size=2
        )
        async with engine.connect() as connection:
            await connection.execute(text("SELECT 1"))
        proxy.order(fault)
        yield engine
        proxy.heal()
        await engine.dispose()


@pytest.mark.parametrize("fault", [Blackhole(), HalfOpen(lost="answers")])
async def test_a_transaction_on_a_silent_line_ends_at_its_deadline(
    database_url: str, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Also when the silence begins while a pooled connection is asked whether it still lives.
    """
    monkeypatch.setattr(database, "TRANSACTION_SECONDS", 0.5)
    async with silenced(database_url, fault) as engine:
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            async with transaction(engine):
                pass
        assert time.monotonic() - began < AT_MOST


async def test_looking_on_a_silent_line_ends_at_its_deadline(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    A person who asks for the status gets an answer, if only that there is none.
    """
    monkeypatch.setattr(database, "READING_SECONDS", 0.5)
    async with silenced(database_url, Blackhole()) as engine:
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            async with reading(engine):
                pass
        assert time.monotonic() - began < AT_MOST


async def test_a_slow_statement_is_called_off_on_the_server_too(
    engine: AsyncEngine,
) -> None:
    """
    Where the line is sound, nothing goes on after a deadline.
    """
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2), engine.connect() as connection:
            await connection.execute(text("SELECT pg_sleep(61)"))

    async with engine.connect() as connection:
        assert not await connection.scalar(
            text(
                "SELECT count(*) FROM pg_stat_activity"
                " WHERE state = 'active' AND query = 'SELECT pg_sleep(61)'"
            )
        )


async def test_the_listener_passes_on_options_with_spaces(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    `options=-c name=value` in the address means the same to the listener as to the pool.
    """
    sign = "&" if "?" in database_url else "?"
    monkeypatch.setenv("DATABASE_URL", f"{database_url}{sign}options=-c%20app.test%3Dheard")
    async with await credentials.listening_connection() as connection:
        row = await (await connection.execute("SELECT current_setting('app.test')")).fetchone()
    assert row == ("heard",)
