"""
PgBouncer in transaction mode between the workers and PostgreSQL, and the worst of the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.chaos.ground import opened
from tests.chaos.pooler import PGBOUNCER
from tests.chaos.scenarios.bout import Bout, Result
from tests.chaos.scenarios.kills import kill_everywhere
from tests.chaos.scenarios.restarts import crash_under_load

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.chaos.ground import Ground

ABSENT = "PgBouncer is not installed (Debian's package pgbouncer)"


async def run_kills(bout: Bout) -> Result:
    """
    SIGKILL everywhere, behind the pooler.
    """
    return await _behind(bout, kill_everywhere)


async def run_restarts(bout: Bout) -> Result:
    """
    PostgreSQL crashes behind its pooler.
    """
    return await _behind(bout, crash_under_load)


async def _behind(bout: Bout, scenario: Callable[[Ground, Bout], Awaitable[Result]]) -> Result:
    if PGBOUNCER is None:
        return Result(skipped=ABSENT)
    async with opened(bout.seed, binaries=bout.binaries, pooler=True) as ground:
        return await scenario(ground, bout)
