"""
The night's verdict and its words; and whom its ping is sent to.
"""

from __future__ import annotations

import itertools
from datetime import date
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.exc import OperationalError

from worker import credentials
from worker.cli.session import EXIT_CODES
from worker.errors import SettingsError
from worker.nightly import Night, Outcome, _alone
from worker.ping import Ping
from worker.process import WORST_FIRST

if TYPE_CHECKING:
    from pathlib import Path

    from worker.process import Verdict

PING = "HLF_NIGHTLY_PING_URL"


@given(st.lists(st.sampled_from(WORST_FIRST), min_size=1))
def test_a_night_is_as_bad_as_its_worst_part(verdicts: list[Verdict]) -> None:
    """
    78 before 69 before 75 before 3 before 1 before 0.
    """
    night = Night(
        today=date(2026, 11, 24), outcomes=[Outcome(part="a", verdict=one) for one in verdicts]
    )
    codes = [78, 69, 75, 3, 1, 0]

    worst = min((EXIT_CODES[one] for one in verdicts), key=codes.index)
    assert EXIT_CODES[night.verdict] == worst
    assert night.ok is (worst in {0, 3})
    assert set(EXIT_CODES) == set(WORST_FIRST)


async def test_a_part_that_found_no_free_connection_says_so() -> None:
    """
    Whoever reads it in the morning has to know that the database was there, and full.
    """
    full = psycopg.OperationalError("FATAL:  sorry, too many clients already")

    async def part(_tonight: object, _outcome: object) -> None:
        raise OperationalError("SELECT", {}, full)

    tonight: Any = SimpleNamespace(over=False)
    outcome = await _alone("drain", part, tonight)

    assert outcome.verdict == "unreachable"
    assert outcome.why is not None
    assert outcome.why.startswith("The database has no connection to spare: ")
    assert outcome.why.endswith("; what was committed stands.")


def test_a_part_says_in_one_line_what_it_did_and_what_is_left() -> None:
    """
    And nothing of what it did not do.
    """
    outcome = Outcome(part="reconcile", skipped=2, left=3, failed=1, why="It is night.")
    outcome.add(missing=1, visibility=0)
    outcome.add(missing=1)
    night = Night(today=date(2026, 11, 24), outcomes=[outcome, Outcome(part="drain")])

    assert night.sentences() == [
        "reconcile: 2 mentors nothing was noted about. Another organisation's: 2; nothing is sent"
        " for them. Left: 3. Failed: 1. It is night.",
        "drain: nothing to do.",
    ]


@pytest.mark.parametrize(
    "url",
    [
        "http://hc.example/a-token",
        "ftp://hc.example/a-token",
        "hc.example/a-token",
        "https://me:a-token@hc.example",
        "https://hc.example/x#a-token",
    ],
)
def test_an_address_that_others_could_read_is_refused_and_not_repeated(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    It holds a token.
    """
    monkeypatch.setenv(PING, url)

    with pytest.raises(SettingsError, match=PING) as refusal:
        credentials.nightly_ping()

    errors = itertools.takewhile(bool, [refusal.value, refusal.value.__context__])
    assert "a-token" not in str(refusal.value)
    assert "a-token" not in "".join(map(str, errors))


async def test_the_address_does_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Whoever prints a ping prints no token; from a file it is as good.
    """
    file = tmp_path / "ping"
    file.write_text("https://hc.example/a-token\n")
    monkeypatch.setenv(f"{PING}_FILE", str(file))

    async with credentials.nightly_ping() as ping:
        assert "a-token" not in repr(ping)


async def test_without_an_address_nothing_is_sent() -> None:
    """
    Nor is there anybody to send it.
    """
    async with Ping() as ping:
        await ping.start()
        await ping.end("All is well.", good=True)
