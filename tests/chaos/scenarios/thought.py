"""
What needs no processes: schedules on the store and on its model, and the mutants.
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

import psycopg
from alembic import command

from tests.chaos import mutants, schedules, server
from tests.chaos.scenarios.bout import Bout, Result
from tests.conftest import alembic_config, environment

if TYPE_CHECKING:
    from tests.chaos.mutants_model import Verdict

NO_CRASHES = {"fsync": "off", "synchronous_commit": "off"}
"""Nothing is crashed here, so nothing has to be on the disk."""

LOOKED_AT = ("S3", "S5", "S6", "S7", "S8", "S10", "S12", "S13", "S14", "S23")
"""After each step of a schedule."""

PACE = 1 << 20
"""Between the first seeds of two bouts on the model, each of which uses many."""


async def run_on_postgres(bout: Bout) -> Result:
    """
    `count` random schedules on the real store, each compared with the model after each step.
    """
    async with server.running(bout.binaries, settings=NO_CRASHES) as postgres:
        await asyncio.to_thread(_prepare, postgres.url(), postgres.url("hlf"))
        done = await asyncio.to_thread(
            schedules.run_on_postgres,
            postgres.url("hlf"),
            seed=bout.seed,
            count=bout.count,
            advance=bout.advance,
        )
    return Result(done=done, checked=[*LOOKED_AT])


async def run_on_model(bout: Bout) -> Result:
    """
    `count` random schedules of the model alone.
    """
    done = await asyncio.to_thread(
        schedules.run_on_model,
        first_seed=bout.seed * PACE,
        count=bout.count,
        advance=bout.advance,
    )
    return Result(done=done, checked=[*LOOKED_AT])


async def run_mutants(bout: Bout) -> Result:
    """
    So many mutants, chosen by the seed; each has to be caught.
    """
    result = Result()
    names = [mutant.name for mutant in mutants.MUTANTS]
    luck = random.Random(bout.seed)  # noqa: S311 (no secret)
    chosen = luck.sample(names, min(bout.count, len(names)))

    def judged(verdict: Verdict) -> None:
        result.done += verdict.caught
        bout.advance(1)
        if not verdict.caught:
            result.violate("every mutant is caught", f"{verdict.name}: {verdict.detail}")

    async with server.running(bout.binaries, settings=NO_CRASHES) as postgres:
        await mutants.hunt(postgres.url(), names=chosen, advance=judged)
    return result


def _prepare(url: str, new: str) -> None:
    with psycopg.connect(url, autocommit=True) as admin:
        admin.execute("CREATE DATABASE hlf")
    with environment(DATABASE_URL=new):
        command.upgrade(alembic_config(), "head")
