"""
The words that a coordinator reads: every error has some, and every number agrees with them.
"""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING
from uuid import uuid4

import psycopg
import pytest
from sqlalchemy.exc import OperationalError

from outbox.gate import OPEN, Gate
from tests.conftest import ROOT
from worker import credentials, portal, reminding, webhook
from worker.cli.session import Session, _outcome, actor, many, one_line
from worker.cli.words import (
    gate_sentence,
    lasting,
    reminder_sentences,
    reminders_document,
    status_document,
    status_sentences,
)
from worker.coordinator import alerts
from worker.coordinator.alerts import CAUSES, Reminders, Status, reason
from worker.dynamics import client, edge_errors, errors, service, token

if TYPE_CHECKING:
    from collections.abc import Iterator

JARGON = re.compile(
    r"\b(event|queue|payload|http|gate|outbox|token|uuid|retry|dead|lease|version|sql)\b",
    re.IGNORECASE,
)

ALL_WELL = Status(
    in_order=7,
    waiting_to_hide=0,
    waiting_to_show=0,
    failed_to_hide=0,
    failed_to_show=0,
    by_hand=0,
    unaccounted=0,
    asserting_again=0,
    oldest_waiting_seconds=0,
    next_try_at=None,
    last_confirmed_at=None,
    gate=OPEN,
)


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> Session:
    """
    One run of a command, in Oslo.
    """
    monkeypatch.setenv("HLF_ORGANIZATION_ID", str(uuid4()))
    return Session(as_json=False)


def _codes_raised(source: str) -> Iterator[str]:
    """
    Error codes that are written out in a source: `…Error("code", …)` and `code="code"`.
    """
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call):
            continue
        named = [keyword.value for keyword in call.keywords if keyword.arg == "code"]
        name = call.func.id if isinstance(call.func, ast.Name) else ""
        if name.endswith("Error") and name != "OAuthError" and len(call.args) > 1:
            named.append(call.args[0])
        for value in named:
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield value.value


def _all_codes() -> set[str]:
    meanings = {value.code for value in vars(errors).values() if isinstance(value, errors.Meaning)}
    tables = {
        row.meaning.code
        for table in (errors.DATAVERSE_CODES, errors.STATUSES, errors.OAUTH_ERRORS)
        for row in table
    }
    modules = (
        errors,
        service,
        client,
        edge_errors,
        token,
        portal,
        credentials,
        webhook,
        reminding,
    )
    sources = [inspect.getsource(module) for module in modules]
    sources += [path.read_text(encoding="utf-8") for path in (ROOT / "outbox").glob("*.py")]
    return meanings | tables | {code for source in sources for code in _codes_raised(source)}


def test_every_error_code_has_words_and_no_words_are_left_over() -> None:
    """
    A code that is new, renamed or gone fails here, not in front of a coordinator.
    """
    assert {"throttled", "mentor_unknown", "secret_missing", "abandoned"} <= _all_codes()
    assert _all_codes() == set(CAUSES)


def test_reasons_are_plain_words() -> None:
    """
    A part of a sentence without any word of our trade.
    """
    for words in map(reason, [*CAUSES, "http_418", "KeyError", None]):
        assert not JARGON.search(words), words
        assert words[-1].isalpha()


def test_codes_that_nobody_foresaw_have_words_too() -> None:
    """
    An unlisted status is an answer of Dynamics; the name of a bug is none.
    """
    assert "Dynamics gave an unexpected answer" in reason("http_599")
    assert "Dynamics" not in reason("KeyError")
    assert "tell IT" in reason("KeyError")
    assert reason(None) == "not tried yet"


def test_dynamics_is_not_blamed_for_what_is_ours() -> None:
    """
    Our database, our computer and our settings have words of their own.
    """
    for code in ("database", "late", "abandoned", "interrupted", "certificate", "wrong_address"):
        assert not reason(code).startswith("Dynamics"), code


def test_numbers_agree_with_their_nouns() -> None:
    """
    No "1 mentors".
    """
    assert [many(number, "mentor") for number in (0, 1, 2)] == [
        "0 mentors",
        "1 mentor",
        "2 mentors",
    ]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (-3, "0 s"),
        (0, "0 s"),
        (119.4, "119 s"),
        (120, "2 min"),
        (7199, "119 min"),
        (7200, "2 h"),
        (172_799, "47 h"),
        (172_800, "2 days"),
    ],
)
def test_durations_are_short_and_never_negative(seconds: float, words: str) -> None:
    """
    Nobody has to divide by 60.
    """
    assert lasting(seconds) == words


def test_when_all_is_well_there_is_one_sentence(session: Session) -> None:
    """
    The answer and nothing else.
    """
    assert status_sentences(session, ALL_WELL) == ["Everything is in order: 7 mentors."]


@pytest.mark.parametrize("number", [1, 2])
def test_the_answer_comes_first_and_each_trouble_has_its_sentence(
    session: Session, number: int
) -> None:
    """
    Who may be visible, who may not be, who is forgotten; then how it goes on.
    """
    now = replace(
        ALL_WELL,
        waiting_to_hide=number,
        failed_to_show=number,
        unaccounted=number,
        oldest_waiting_seconds=600,
    )
    mentors, need = ("1 mentor", "needs") if number == 1 else ("2 mentors", "need")
    assert status_sentences(session, now) == [
        f"{mentors} may still be visible on the portal.",
        f"{mentors} may not be visible on the portal yet.",
        f"{mentors} may be wrong on the portal and nothing is on its way: run `hlf-sync resync`.",
        f"{number} on the way, the oldest for 10 min.",
        f"{number} {need} a person: see `hlf-sync failures`.",
    ]


@pytest.mark.parametrize(
    "trouble",
    ["waiting_to_hide", "waiting_to_show", "failed_to_hide", "failed_to_show", "unaccounted"],
)
def test_no_trouble_passes_for_order(session: Session, trouble: str) -> None:
    """
    One mentor that may be wrong is enough.
    """
    now = replace(ALL_WELL, **{trouble: 1})  # type: ignore[arg-type] # a count, by its name
    assert not any("in order" in sentence for sentence in status_sentences(session, now))


def test_what_was_done_by_hand_is_in_order_and_told(session: Session) -> None:
    """
    Nobody has to do anything, and nobody is misled about who did it.
    """
    assert status_sentences(session, replace(ALL_WELL, by_hand=1)) == [
        "Everything is in order: 7 mentors.",
        "1 mentor done by hand in Dynamics, as people said.",
    ]


def test_an_open_gate_is_not_worth_a_word(session: Session) -> None:
    """
    Nothing is said about what is as it should be.
    """
    assert gate_sentence(session, OPEN) == ""


def test_each_closed_gate_says_why_and_until_when(session: Session) -> None:
    """
    A pause says who and how it ends; the others say when it goes on by itself.
    """
    until = datetime.now(UTC) + timedelta(seconds=30)
    at = session.clock(until)
    closed = Gate(state="closed", message="Because.", closed_by="Someone", closed_until=until)

    assert gate_sentence(session, replace(closed, reason="operator", closed_until=None)) == (
        "Sending was paused by Someone: Because. Run `hlf-sync resume`."
    )
    throttled = gate_sentence(session, replace(closed, reason="throttled"))
    assert throttled == f"Dynamics asked us to wait; sending goes on at {at}."
    outage = gate_sentence(session, replace(closed, reason="outage"))
    assert outage == f"Dynamics does not answer; it is tried again at {at}. Nothing is lost."
    refused = gate_sentence(session, replace(closed, reason="configuration"))
    assert refused.startswith("Dynamics refuses us. Because. Mend it")
    assert refused.endswith(f"it is tried again at {at}.")
    assert "one mentor" in gate_sentence(session, replace(closed, state="half-open"))


def test_a_gate_closed_for_good_is_null_in_json() -> None:
    """
    JSON has no infinity.
    """
    gate = Gate(state="closed", reason="operator", seconds=float("inf"))
    assert status_document(replace(ALL_WELL, gate=gate))["gate"]["seconds"] is None


ALL_SENT = Reminders(
    waiting=0,
    given_up=0,
    last_error_code=None,
    oldest_waiting_seconds=0,
    next_try_at=None,
    gate=OPEN,
)


def test_reminders_that_all_went_out_are_not_worth_a_word(session: Session) -> None:
    """
    Not even without a webhook.
    """
    assert reminder_sentences(session, ALL_SENT) == []


def test_reminders_that_wait_say_what_for(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    For an address that was never set, or for their turn.
    """
    assert reminder_sentences(session, replace(ALL_SENT, waiting=2)) == [
        "2 reminders wait to be sent.",
        "HLF_REMINDER_URL is not set: no reminder is sent before it is.",
    ]
    monkeypatch.setenv("HLF_REMINDER_URL", "https://hooks.example")
    assert reminder_sentences(Session(as_json=False), replace(ALL_SENT, waiting=1)) == [
        "1 reminder waits to be sent."
    ]


def test_reminders_that_were_given_up_say_why(session: Session) -> None:
    """
    In words, and for how long that is told.
    """
    given_up = replace(ALL_SENT, given_up=1, last_error_code="webhook_unreachable")
    assert reminder_sentences(session, given_up) == [
        "1 reminder was given up in the last 30 days; the last because: "
        "the service that sends reminders did not answer."
    ]


def test_a_closed_gate_of_reminders_says_until_when(session: Session) -> None:
    """
    And what to mend, where there is something.
    """
    until = datetime.now(UTC) + timedelta(seconds=30)
    gate = Gate(state="closed", reason="configuration", message="Mend it.", closed_until=until)
    [sentence] = reminder_sentences(session, replace(ALL_SENT, gate=gate))
    assert sentence == (
        "The webhook of reminders does not take them. Mend it. It is tried again at "
        f"{session.clock(until)}; nothing is lost."
    )
    closed = replace(gate, reason="operator", seconds=float("inf"))
    assert reminders_document(replace(ALL_SENT, gate=closed))["gate"]["seconds"] is None


def test_times_of_today_have_no_date_and_others_have(session: Session) -> None:
    """
    By the clock of the organisation.
    """
    now = datetime.now(UTC)
    assert re.fullmatch(r"\d\d:\d\d:\d\d", session.clock(now))
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d", session.clock(now - timedelta(days=2)))
    assert session.clock(datetime(2026, 7, 1, 22, 30, tzinfo=UTC)) == "2026-07-02 00:30"
    assert session.clock(None) == "unknown"


def test_what_is_printed_stays_on_its_line() -> None:
    """
    Line breaks, terminal codes and broken characters of names and reasons do no harm.
    """
    assert one_line(" two\nlines\x1b[31m \udcff ") == "two lines[31m"
    assert one_line("Ærlig [/Øst] :smile:") == "Ærlig [/Øst] :smile:"


def test_a_user_without_a_name_is_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    As in a container that runs under an id of its own.
    """

    def nobody(_: int) -> None:
        raise KeyError

    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    assert re.fullmatch(r"user \d+", actor())


def test_consequences_say_what_may_be_wrong() -> None:
    """
    Hiding and showing have different words, and what is resolved is in order.
    """
    failure = alerts.Failure(
        id=uuid4(),
        mentor_id=uuid4(),
        mentor_name="",
        certification_id=None,
        visible=False,
        version=1,
        attempted_at=datetime.now(UTC),
        error_code="timeout",
        error_message="",
        retry_count=3,
        recoverable=False,
        created_at=datetime.now(UTC),
        resolved_at=None,
        resolution=None,
        resolved_by=None,
        trying_again=False,
    )
    assert failure.consequence == "may still be visible"
    assert replace(failure, visible=True).consequence == "may not be visible yet"
    assert replace(failure, resolved_at=datetime.now(UTC)).consequence == "in order"


def test_a_command_that_loses_its_place_midway_says_what_stands(
    session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    """
    The database is full and not gone, and what was committed before is kept.
    """

    async def crowded_out() -> int:
        full = psycopg.OperationalError("FATAL:  sorry, too many clients already")
        raise OperationalError("SELECT", {}, full)

    assert _outcome(session, crowded_out()) == 69
    said = capsys.readouterr().err
    assert said.startswith("Error: The database has no connection to spare: ")
    assert said.endswith(" What was committed stands; run the command again.\n")
