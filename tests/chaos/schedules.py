"""
Random schedules: whatever happens to workers, people, requests and the clock, in any order.

    model       a seed is a schedule; the outbox is a model in memory, a thousand in a second
    postgres    Hypothesis chooses; the outbox is real, and every row is compared to the model's

In both the same watch looks on after each transaction, and in the end everything has to heal.

    python -m tests.chaos.schedules model --seed 1 --count 1000
    python -m tests.chaos.schedules postgres --seed 1 --count 100 --url postgresql://…
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, get_args

import click
from hypothesis import HealthCheck, Phase, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    precondition,
    rule,
    run_state_machine_as_test,
)
from typing_extensions import override

from tests.chaos.schedule_mirror import Database, DifferenceError, Mirror, connected
from tests.chaos.schedule_random import DELAYS, ENDINGS, FATES, WAITS, run_schedule
from tests.chaos.schedule_watch import ViolationError
from tests.chaos.schedule_world import CONCURRENCY, KEYS, WORKERS, Manner, World

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

STEPS = 30

SCHEDULES_PER_VACUUM = 100


def run_on_model(
    *, first_seed: int, count: int, steps: int = STEPS, advance: Callable[[int], None]
) -> int:
    """
    Run so many schedules on the model, with the seeds from the first one on.

    Args:
        advance: told how many schedules have run since the last time.

    Returns:
        How many were run.

    Raises:
        ViolationError: an invariant does not hold.
    """
    for seed in range(first_seed, first_seed + count):
        run_schedule(seed, steps=steps)
        advance(1)
    return count


def run_on_postgres(
    url: str, *, seed: int, count: int, steps: int = STEPS, advance: Callable[[int], None]
) -> int:
    """
    Run so many schedules on a real database, whose events are deleted for each.

    Args:
        url: of a migrated database that is nobody else's, without the name of a driver.
        seed: the same seed gives the same schedules.
        advance: told how many schedules have run since the last time.

    Returns:
        How many were run.

    Raises:
        ViolationError: an invariant does not hold.
        DifferenceError: the database did not do what the model did.
    """
    done = 0

    def over(_: World) -> None:
        nonlocal done
        done += 1
        advance(1)
        if done % SCHEDULES_PER_VACUUM == 0:
            database.vacuum()

    with connected(url) as database:
        run_machines(database, seed=seed, count=count, steps=steps, over=over)
    return done


def run_machines(
    database: Database, *, seed: int, count: int, steps: int, over: Callable[[World], None]
) -> None:
    """
    Let Hypothesis run so many schedules; some of them in vain, which it makes up for.

    Args:
        over: told how each ended.
    """

    class Here(Schedule):
        def __init__(self) -> None:
            super().__init__(Mirror(database), over)

    run_state_machine_as_test(
        seeded(seed)(Here),
        settings=settings(
            max_examples=count,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )


def a_step(name: str) -> Callable[..., None]:
    """
    A rule that takes one step in the world.
    """

    def take(self: Schedule, **arguments: object) -> None:
        self.take(name, arguments)

    take.__name__ = name
    return take


def somebody(has: str) -> Callable[[Schedule], bool]:
    """
    Whether a worker has any of these: flights, or something settled.
    """
    return lambda self: any(getattr(worker, has) for worker in self.world.workers)


def somebody_has_work(self: Schedule) -> bool:
    """
    Whether any worker could find anything to do.
    """
    return any(map(self.world.has_work, self.world.workers))


a_worker = st.integers(0, WORKERS - 1)
a_limit = st.integers(1, CONCURRENCY)
a_key = st.sampled_from(KEYS)
a_fate = st.sampled_from(FATES)
a_delay = st.sampled_from(DELAYS)
a_manner = st.sampled_from(get_args(Manner))
some_wishes = st.lists(st.tuples(a_key, st.integers(0, 1)), min_size=1, max_size=4)
some_endings = st.lists(st.sampled_from(ENDINGS), unique=True)


class Schedule(RuleBasedStateMachine):
    """
    A schedule on a mirror, chosen by Hypothesis.
    """

    def __init__(self, mirror: Mirror, over: Callable[[World], None]) -> None:
        super().__init__()
        self.world = World(mirror)
        self._over = over
        self._failed = False

    def take(self, name: str, arguments: Mapping[str, object]) -> None:
        """
        Take a step; after one that failed there is nothing to heal.
        """
        try:
            getattr(self.world, name)(**arguments)
        except Exception:
            self._failed = True
            raise

    change_minds = rule(wishes=some_wishes)(a_step("change_minds"))
    enqueue_late = rule(key=a_key, back=st.integers(0, 2))(a_step("enqueue_late"))
    turn = precondition(somebody_has_work)(rule(number=a_worker, limit=a_limit)(a_step("turn")))
    all_turn = precondition(somebody_has_work)(rule(limit=a_limit)(a_step("all_turn")))
    all_work = precondition(somebody_has_work)(
        rule(limit=a_limit, fate=a_fate, delay=a_delay)(a_step("all_work"))
    )
    fly = precondition(somebody("flights"))(
        rule(number=a_worker, fate=a_fate, delay=a_delay, manner=a_manner)(a_step("fly"))
    )
    all_fly = precondition(somebody("flights"))(rule(fate=a_fate, delay=a_delay)(a_step("all_fly")))
    crash = rule(number=a_worker, delay=st.none() | a_delay)(a_step("crash"))
    settle_again = precondition(somebody("settled"))(rule(number=a_worker)(a_step("settle_again")))
    wait = rule(seconds=st.sampled_from(WAITS))(a_step("wait"))
    pause = precondition(lambda self: len(self.world.outbox.rows) > 1)(rule()(a_step("pause")))
    resume = precondition(lambda self: self.world.outbox.gate_state() != "open")(
        rule()(a_step("resume"))
    )
    retry_by_hand = precondition(lambda self: bool(self.world.failures))(
        rule()(a_step("retry_by_hand"))
    )
    prune = precondition(lambda self: bool(self.world.outbox.history or self.world.outbox.doubts))(
        rule(outcomes=some_endings)(a_step("prune"))
    )

    @override
    def teardown(self) -> None:
        if not self._failed:
            self.world.heal()
            self._over(self.world)


# ----------------------------------------------------------------------------- command line


@click.group()
def main() -> None:
    """
    Run random schedules, or one of them again.
    """


@main.command()
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--count", type=int, default=1000, show_default=True)
@click.option("--steps", type=int, default=STEPS, show_default=True)
def model(seed: int, count: int, steps: int) -> None:
    """
    On the model: one schedule for each seed from this one on.
    """
    _report(partial(run_on_model, first_seed=seed, count=count, steps=steps))


@main.command()
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--count", type=int, default=100, show_default=True)
@click.option("--steps", type=int, default=STEPS, show_default=True)
@click.option("--url", required=True, help="Of a migrated database; its events are deleted.")
def postgres(seed: int, count: int, steps: int, url: str) -> None:
    """
    On a real database: as many schedules as Hypothesis makes of this seed.
    """
    _report(partial(run_on_postgres, url, seed=seed, count=count, steps=steps))


def _report(run: Callable[..., int]) -> None:
    started = time.monotonic()
    try:
        count = run(advance=lambda _: None)
    except (ViolationError, DifferenceError) as error:
        notes = getattr(error, "__notes__", ())
        raise click.ClickException("\n".join([str(error), *notes])) from None
    seconds = time.monotonic() - started
    click.echo(f"{count} schedules in {seconds:.1f} s, {1000 * seconds / count:.2f} ms each.")


if __name__ == "__main__":
    main()
