"""
Every text in both languages: none missing, none left over, each with the same blanks to fill.
"""

from __future__ import annotations

import re
from datetime import UTC, date, datetime, timedelta
from string import Formatter
from typing import TYPE_CHECKING, get_args

import pytest

from tests.conftest import ROOT
from worker.coordinator import alerts, wording
from worker.coordinator.mentors import State
from worker.coordinator.wording import Words, texts

if TYPE_CHECKING:
    from collections.abc import Iterator

COORDINATOR = ROOT / "worker" / "coordinator"

NB = Words("nb", timezone="Europe/Oslo")
EN = Words("en", timezone="Europe/Oslo")

NOW = datetime(2026, 11, 24, 13, 31, 5, tzinfo=UTC)

LOGGED = re.compile(r'log\.\w+\(\s*"[^"]*"')
"""What is told to a log has names that look like keys."""

FORMS = ("one", "other", "most")

JARGON = re.compile(
    r"\b(event|queue|payload|http|gate|outbox|token|uuid|dead|lease|version|sql|kø|hendelse)\b",
    re.IGNORECASE,
)


def _sources() -> Iterator[str]:
    for pattern in ("*.py", "templates/*.html"):
        for path in COORDINATOR.glob(pattern):
            yield LOGGED.sub("", path.read_text(encoding="utf-8"))


def _mentioned(source: str) -> set[str]:
    """
    Keys, and beginnings of keys that are put together, as they stand in a source.
    """
    return set(re.findall(r"""["']([a-z_]+\.[a-z_.]*)["']""", source)) | {
        match.group(1) for match in re.finditer(r'f"([a-z_]+\.[a-z_]*)\{', source)
    }


def test_both_languages_say_the_same_things() -> None:
    """
    A text that is missing in one of them fails here, not in front of somebody.
    """
    assert set(texts("nb")) == set(texts("en"))
    assert all(value for language in wording.LANGUAGES for value in texts(language).values())


@pytest.mark.parametrize("key", sorted(texts("nb")))
def test_a_text_has_the_same_blanks_in_both_languages(key: str) -> None:
    """
    A form for one thing may leave its number out.
    """
    blanks = [
        {name for _, name, _, _ in Formatter().parse(texts(language)[key]) if name is not None}
        for language in wording.LANGUAGES
    ]
    if key.endswith(".one"):
        blanks = [one - {"number"} for one in blanks]
    assert blanks[0] == blanks[1]


def test_every_text_is_used_and_every_one_that_is_used_exists() -> None:
    """
    By its whole key, or by the beginning that a page puts an ending to.
    """
    mentioned = set().union(*map(_mentioned, _sources()))
    families = {name for name in mentioned if name.endswith((".", "_"))}
    known = set(texts("nb"))
    whole = {key.removesuffix(f".{form}") for key in known for form in FORMS if key.endswith(form)}
    areas = {key.split(".")[0] for key in known}

    unused = {
        key
        for key in known
        if not ({key, key.rpartition(".")[0]} & mentioned)
        and not any(key.startswith(family) for family in families)
    }
    missing = {
        name
        for name in mentioned
        if name.split(".")[0] in areas
        and not name.endswith((".html", ".css", ".js"))
        and name not in known | whole
        and not any(key.startswith(name) for key in known)
    }
    assert not unused
    assert not missing


def test_what_is_put_together_is_complete() -> None:
    """
    States, reasons and closings come from the code, their words from the files.
    """
    known = set(texts("nb"))
    assert {f"state.{state}" for state in get_args(State)} <= known
    assert {f"help.{state}" for state in get_args(State)} <= known
    causes = {*alerts.CAUSES.values(), "not_tried", "unforeseen"}
    assert {key for key in known if key.startswith("reason.")} == {
        f"reason.{one}" for one in causes
    }
    assert {f"banner.{reason}" for reason in ("outage", "throttled", "configuration")} <= known


@pytest.mark.parametrize("language", wording.LANGUAGES)
def test_people_are_spoken_to_in_plain_words(language: wording.Language) -> None:
    """
    No word of our trade, and nobody is begged.
    """
    allowed = {"page.version"}
    for key, text in texts(language).items():
        if key not in allowed:
            assert not JARGON.search(text), key
            assert not re.search(r"vennligst|\bplease\b", text, re.IGNORECASE), key


def test_times_are_written_as_people_write_them() -> None:
    """
    Today by the clock alone, yesterday by name, others by their date.
    """
    assert NB.clock(NOW, now=NOW) == "kl. 14.31"
    assert NB.clock(NOW, now=NOW, seconds=True) == "kl. 14.31.05"
    assert NB.clock(NOW - timedelta(days=1), now=NOW) == "i går kl. 14.31"
    assert NB.clock(NOW - timedelta(days=2), now=NOW) == "22. november 2026 kl. 14.31"
    assert NB.clock(None, now=NOW) == "ukjent tid"
    assert EN.clock(NOW, now=NOW) == "at 14:31"
    assert EN.clock(NOW - timedelta(days=2), now=NOW) == "22 November 2026 at 14:31"
    # Half past eleven in the evening here is half past ten in the world's time.
    assert NB.clock(datetime(2026, 11, 23, 23, 30, tzinfo=UTC), now=NOW) == "kl. 00.30"
    assert NB.day(date(2026, 5, 1)) == "1. mai 2026"


@pytest.mark.parametrize(
    ("ago", "nb", "en"),
    [
        (timedelta(seconds=-5), "akkurat nå", "just now"),
        (timedelta(seconds=59), "akkurat nå", "just now"),
        (timedelta(minutes=1), "for 1 minutt siden", "1 minute ago"),
        (timedelta(minutes=12), "for 12 minutter siden", "12 minutes ago"),
        (timedelta(hours=1), "for 1 time siden", "1 hour ago"),
        (timedelta(hours=23, minutes=59), "for 23 timer siden", "23 hours ago"),
        (timedelta(days=3), "for 3 dager siden", "3 days ago"),
    ],
)
def test_how_long_ago_is_rounded_down(ago: timedelta, nb: str, en: str) -> None:
    """
    And nothing was ever in the future.
    """
    assert NB.ago(NOW - ago, now=NOW) == nb
    assert EN.ago(NOW - ago, now=NOW) == en


def test_numbers_agree_with_their_nouns_and_can_be_read() -> None:
    """
    One, many, and more than were counted.
    """
    assert NB.many("answer.visible", 1) == "1 mentor kan fortsatt være synlig i portalen"
    assert NB.many("answer.visible", 3) == "3 mentorer kan fortsatt være synlige i portalen"
    most = NB.many("answer.visible", 10_000, most=10_000)
    assert most == "Over 10 000 mentorer kan fortsatt være synlige i portalen"
    assert EN.number(9999) == "9999"
    assert EN.number(1_234_567) == "1,234,567"


@pytest.mark.parametrize(
    ("asked", "remembered", "accepted", "language"),
    [
        (None, None, None, "nb"),
        (None, None, "en-GB,en;q=0.9", "en"),
        (None, None, "no", "nb"),
        (None, None, "nn-NO,nn;q=0.9,en;q=0.8", "nb"),
        (None, None, "de,fr;q=0.5", "nb"),
        (None, None, "en;q=0, nb;q=0.1", "nb"),
        (None, None, "en;q=high,,;", "nb"),
        (None, "en", "nb", "en"),
        ("nb", "en", "en", "nb"),
        ("xx", "yy", "en", "en"),
    ],
)
def test_the_language_is_that_of_the_reader(
    asked: str | None, remembered: str | None, accepted: str | None, language: str
) -> None:
    """
    What was asked for, else chosen before, else what the browser prefers, else bokmål.
    """
    assert wording.language(asked, remembered, accepted) == language
