"""
What people read, in bokmål and English: every text, number and time of the page.

The texts are in `locales`, one file to a language, with the same keys in both.
"""

from __future__ import annotations

import tomllib
from datetime import UTC, datetime, timedelta
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Literal, get_args
from zoneinfo import ZoneInfo

if TYPE_CHECKING:
    from datetime import date

Language = Literal["nb", "en"]

LANGUAGES: tuple[Language, ...] = get_args(Language)

DEFAULT: Language = "nb"

ALIASES: dict[str, Language] = {"nb": "nb", "no": "nb", "nn": "nb", "en": "en"}
"""What a browser may ask for. Whoever reads nynorsk reads bokmål rather than English."""


@cache
def texts(language: Language) -> dict[str, str]:
    """
    Every text of a language, by its key with dots.
    """
    source = files("worker.coordinator").joinpath("locales", f"{language}.toml")
    return dict(_flat(tomllib.loads(source.read_text(encoding="utf-8")), ""))


def _flat(table: dict[str, Any], before: str) -> list[tuple[str, str]]:
    found = []
    for name, value in table.items():
        if isinstance(value, dict):
            found += _flat(value, f"{before}{name}.")
        else:
            found.append((before + name, value))
    return found


class Words:
    """
    The texts of one language, with times as the clocks of one zone show them.
    """

    def __init__(self, language: Language, *, timezone: str) -> None:
        self.language = language
        self._zone = ZoneInfo(timezone)
        self._texts = texts(language)

    def __call__(self, key: str, /, **values: object) -> str:
        """
        The text of a key.
        """
        return self._texts[key].format(**values)

    def many(self, key: str, number: int, /, *, most: int | None = None, **values: object) -> str:
        """
        A text that agrees with its number.

        Args:
            most: what was counted up to; from there on it is "more than".
        """
        form = "one" if number == 1 else "other"
        if most is not None and number >= most:
            form = "most"
        return self(f"{key}.{form}", number=self.number(number), **values)

    def number(self, number: int) -> str:
        """
        With its thousands apart, from five digits on.
        """
        if number < 10_000:  # noqa: PLR2004 (four digits are read at a glance)
            return str(number)
        return f"{number:,}".replace(",", self("time.thousands"))

    def clock(self, moment: datetime | None, *, now: datetime, seconds: bool = False) -> str:
        """
        A moment by the clock, with the day unless it is today: "kl. 14.31".
        """
        if moment is None:
            return self("time.never")
        local, today = moment.astimezone(self._zone), now.astimezone(self._zone).date()
        digits = self("time.digits_with_seconds" if seconds else "time.digits")
        time = local.strftime(digits)
        if local.date() == today:
            return self("time.clock", time=time)
        if local.date() == today - timedelta(days=1):
            return self("time.yesterday", time=time)
        return self("time.date_clock", day=self.day(local.date()), time=time)

    def day(self, day: date) -> str:
        """
        A day with its month in words: "23. november 2026".
        """
        months = self("time.months").split()
        return self("time.day", day=day.day, month=months[day.month - 1], year=day.year)

    def ago(self, moment: datetime, *, now: datetime) -> str:
        """
        How long ago: "for 12 minutter siden".
        """
        seconds = (now - moment).total_seconds()
        for length, key in ((86400, "time.days"), (3600, "time.hours"), (60, "time.minutes")):
            if seconds >= length:
                return self.many(key, int(seconds // length))
        return self("time.now")


def now() -> datetime:
    """
    The moment, by this machine's clock.
    """
    return datetime.now(UTC)


ENGLISH = Words("en", timezone="UTC")
"""For whoever needs no times."""


def language(asked: str | None, remembered: str | None, accepted: str | None) -> Language:
    """
    The language for a reader: asked for now, else chosen before, else what the browser says.

    Args:
        accepted: an `Accept-Language` header.
    """
    for choice in (asked, remembered):
        if choice in LANGUAGES:
            return ALIASES[choice]
    ranked = sorted(_preferences(accepted or ""), key=lambda one: -one[1])
    return next((ALIASES[name] for name, weight in ranked if weight and name in ALIASES), DEFAULT)


def _preferences(header: str) -> list[tuple[str, float]]:
    found = []
    for part in header.split(",")[:20]:
        name, _, weight = part.partition(";")
        try:
            quality = float(weight.strip().removeprefix("q=") or 1)
        except ValueError:
            continue
        found.append((name.strip().lower().split("-")[0], quality))
    return found
