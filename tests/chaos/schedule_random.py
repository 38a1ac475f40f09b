"""
A schedule from a seed: the same steps, with the same arguments, every time.
"""

from __future__ import annotations

import random
from bisect import bisect
from itertools import accumulate
from typing import TYPE_CHECKING, Any, get_args

from outbox.outcome import Ending
from tests.chaos.model import Outbox
from tests.chaos.schedule_watch import ViolationError
from tests.chaos.schedule_world import KEYS, WORKERS, Fate, World

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Step = tuple[Any, ...]
"""The name of a method of `World`, and its arguments."""

FATES: Sequence[Fate] = ("delivered", "busy", "no answer", *get_args(Fate))
ENDINGS: Sequence[Ending] = get_args(Ending)
WAITS = (10.0, 10.0, 20.0, 30.0, 60.0, 70.0, 150.0)
DELAYS = (0.0, 10.0, 30.0, 60.0, 70.0, 100.0, 140.0, 150.0)


def _change_minds(luck: random.Random) -> Step:
    wishes = [(luck.choice(KEYS), int(luck.random() < 0.5))]
    while luck.random() < 0.2:
        wishes.append((luck.choice(KEYS), int(luck.random() < 0.5)))
    return "change_minds", wishes


def _enqueue_late(luck: random.Random) -> Step:
    return "enqueue_late", luck.choice(KEYS), int(3 * luck.random())


def _turn(luck: random.Random) -> Step:
    return "turn", int(WORKERS * luck.random()), 1 + int(3 * luck.random())


def _fly(luck: random.Random) -> Step:
    number = int(WORKERS * luck.random())
    manner = "in time" if luck.random() < 0.5 else "stalled"
    return "fly", number, luck.choice(FATES), luck.choice(DELAYS), manner


def _crash(luck: random.Random) -> Step:
    delay = luck.choice(DELAYS) if luck.random() < 0.7 else None
    return "crash", int(WORKERS * luck.random()), delay


def _settle_again(luck: random.Random) -> Step:
    return "settle_again", int(WORKERS * luck.random())


def _wait(luck: random.Random) -> Step:
    return "wait", luck.choice(WAITS)


def _prune(luck: random.Random) -> Step:
    return "prune", tuple(one for one in ENDINGS if luck.random() < 0.5)


WEIGHTS: dict[Callable[[random.Random], Step], int] = {
    _change_minds: 14,
    _enqueue_late: 3,
    _turn: 34,
    _fly: 28,
    _crash: 4,
    _settle_again: 2,
    _wait: 14,
    _prune: 1,
    lambda _: ("pause",): 1,
    lambda _: ("resume",): 2,
    lambda _: ("retry_by_hand",): 1,
}
KINDS = list(WEIGHTS)
SUMS = list(accumulate(WEIGHTS.values()))


def a_step(luck: random.Random) -> Step:
    """
    Anything that may happen.
    """
    return KINDS[bisect(SUMS, luck.random() * SUMS[-1])](luck)


def run_schedule(
    seed: int, *, steps: int, outbox: Callable[[], Outbox] = Outbox
) -> tuple[World, list[Step]]:
    """
    Run one schedule to its end, faults first, then healing; the world as it was left.

    Raises:
        ViolationError: an invariant does not hold; says which, and how to see it again.
    """
    luck = random.Random(seed)  # noqa: S311 (no secret)
    world = World(outbox())
    taken: list[Step] = []
    try:
        for _ in range(steps):
            taken.append(a_step(luck))
            take_step(world, taken[-1])
        taken.append(("heal",))
        world.heal()
    except ViolationError as violation:
        raise ViolationError(violation.invariant, violation.what, seed=seed, steps=taken) from None
    except Exception as error:
        error.add_note(f"in schedule {seed}, after {len(taken)} steps")
        raise
    return world, taken


def take_step(world: World, step: Step) -> None:
    """
    Let it happen.
    """
    name, *arguments = step
    getattr(world, name)(*arguments)
