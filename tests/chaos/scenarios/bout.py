"""
A bout: one scenario, one seed, so many faults; what it came to, as plain values.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tests.chaos.ground import LEASE_SECONDS, POLL_SECONDS
from tests.chaos.invariants import WINDOW_SECONDS
from tests.chaos.producer import AFTERWARDS, FAR
from tests.conftest import until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.chaos.checker import Findings
    from tests.chaos.ground import Ground
    from tests.factories import Mentor


@dataclass(frozen=True, slots=True, kw_only=True)
class Bout:
    """
    What to run.

    Args:
        count: of faults; what one is, the scenario says.
        advance: told after each.
    """

    seed: int
    count: int
    advance: Callable[[int], None]
    binaries: Path | None = None


@dataclass(slots=True, kw_only=True)
class Result:
    """
    What a bout came to.

    Args:
        done: faults that really happened.
        measured: figures, by name.
        recoveries: seconds until work went on, by what had happened.
        timeline: the journal of a mentor about whom something is wrong.
        skipped: why nothing was run, or "".
    """

    done: int = 0
    lost: int = 0
    unexpected: int = 0
    duplicated: int = 0
    recovered: int = 0
    violations: dict[str, list[str]] = field(default_factory=dict)
    checked: list[str] = field(default_factory=list)
    measured: dict[str, float] = field(default_factory=dict)
    recoveries: dict[str, list[float]] = field(default_factory=dict)
    tally: dict[str, int] = field(default_factory=dict)
    timeline: list[str] = field(default_factory=list)
    skipped: str = ""

    def violate(self, name: str, evidence: str) -> None:
        """
        Note what contradicts a claim.
        """
        self.violations.setdefault(name, []).append(evidence)


def result_of(ground: Ground, findings: Findings, *, done: int) -> Result:
    """
    A bout's result, from what the checker found and what the scenario measured.
    """
    result = Result(
        done=done,
        lost=findings.lost,
        unexpected=findings.unexpected,
        duplicated=findings.duplicated,
        recovered=findings.recovered,
        violations=findings.violations,
        checked=findings.checked,
        measured=dict(ground.measured),
        recoveries=dict(ground.recoveries),
        tally=dict(findings.figures),
        timeline=findings.timeline,
    )
    # A doubt that stands has its state said once more, when it is over.
    bound = LEASE_SECONDS + POLL_SECONDS + WINDOW_SECONDS + 5 + ground.scale.doubt_seconds
    rest = max(ground.recoveries.get("at rest", [0.0]))
    result.checked.append("L1")
    if rest > bound:
        result.violate("L1", f"at rest after {rest:.1f} s, not {bound:.0f}")
    return result


class Marker:
    """
    A mentor of the harness's own, with whom it asks: does work go on?
    """

    def __init__(self, ground: Ground, mentor: Mentor) -> None:
        self._ground = ground
        self._mentor = mentor
        self._visible = True

    async def delivered(self, what: str, *, seconds: float = 60.0) -> float:
        """
        Change the marker's state and wait until Dynamics shows it; note how long that took.

        Args:
            what: had happened.

        Returns:
            Seconds, from the call on: it is made when the fault is over.
        """
        began = time.monotonic()
        service = self._ground.world.certifications
        self._visible = not self._visible
        if self._visible:
            await service.renew(self._mentor.certification_id, FAR)
        else:
            await service.expire(self._mentor.certification_id, today=AFTERWARDS)
        await until(lambda: self._shown() is self._visible, seconds=seconds)
        took = time.monotonic() - began
        self._ground.recoveries.setdefault(what, []).append(took)
        return took

    def _shown(self) -> Any:  # noqa: ANN401 (what the portal holds)
        row = self._ground.sandbox.rows["contacts"][str(self._mentor.dynamics_id)]
        return row["hlf_portalvisible"]


def percentile(values: list[float], share: float) -> float:
    """
    The value that this share of them does not exceed.
    """
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
