"""
Our own contenders do what the others are measured by.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING
from uuid import uuid4

import psycopg
import pytest

from tests.bench.contenders import all_contenders
from tests.bench.contenders.bare import BareClaim
from tests.bench.contenders.bare_ours import BareOurs
from tests.bench.contenders.ours import Ours
from tests.bench.postgres import BUSINESS
from tests.bench.processes import running
from tests.conftest import new_database

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.bench.contender import Contender

Place = tuple["Contender", str]


@pytest.fixture(
    params=[
        Ours(name="ours"),
        BareOurs(name="bare:ours"),
        BareClaim(name="bare:claim100", library="httpx"),
    ],
    ids=lambda one: one.name,
)
def place(request: pytest.FixtureRequest, server_url: str) -> Iterator[Place]:
    """
    A contender, and a database that is prepared for it.
    """
    contender: Contender = request.param
    with new_database(server_url) as url:
        contender.prepare(url)
        with psycopg.connect(url) as connection:
            connection.execute(BUSINESS.read_bytes())
        yield contender, url


def test_ours_and_the_limits_take_part_everywhere() -> None:
    """
    Whatever is not installed.
    """
    present, _ = all_contenders()

    assert {"ours", "ours:batch100", "bare:httpx", "bare:claim100"} <= {one.name for one in present}


def test_what_is_filled_in_is_left_to_do(place: Place) -> None:
    """
    One event for each key, in today's tables.
    """
    contender, url = place

    contender.fill(url, [str(uuid4()) for _ in range(3)])

    assert contender.left(url) == 3


async def test_a_producer_tells_what_an_event_costs(place: Place) -> None:
    """
    Transactions per second with and without, and events that are there afterwards.
    """
    contender, url = place

    command = contender.producer(clients=2, seconds=0.2, slice_seconds=0.02)
    async with running(command, {"BENCH_DATABASE_URL": url}) as producer:
        said = json.loads(await producer.everything())

    assert set(said) == {"without", "with", "milliseconds_without", "milliseconds_with"}
    assert contender.left(url) > 0


async def test_a_ticker_tells_what_was_committed(place: Place) -> None:
    """
    In the order of their commits, each event that is there afterwards.
    """
    contender, url = place

    command = contender.ticker(per_second=100, seconds=0.1)
    async with running(command, {"BENCH_DATABASE_URL": url}) as ticker:
        committed = json.loads(await ticker.everything())

    assert len(committed) == contender.left(url) == 10
    assert committed == sorted(committed)
