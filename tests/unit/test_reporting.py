"""
Sentry hears what the log tells, and nothing else.
"""

from __future__ import annotations

from typing import Any

import pytest
import sentry_sdk
from typing_extensions import override

from tests.unit.test_architecture import run_python
from worker import credentials, logs, redaction
from worker.errors import SettingsError
from worker.reporting import Reports, event_of

RELEASE = "hlf-dynamics-sync@1.2.3"


def failing(canary: str) -> dict[str, Any]:
    """
    A line of the log about an exception with two causes, as it was made harmless.
    """
    secret = canary
    try:
        try:
            raise LookupError(secret)  # noqa: TRY301 (this is what it is about)
        except LookupError as cause:
            raise SettingsError("Set it.") from cause
    except SettingsError as error:
        return redaction.known_only(
            {"event": "failed", "level": "error", "code": "x", "attempt": 2, "full_name": secret}
        ) | {"exception": redaction.told(error)}


def test_an_error_is_told_with_its_causes_and_no_value() -> None:
    """
    The first cause first, and only our own sentences.
    """
    event: Any = event_of(failing("canary"))

    assert [(one["type"], one["value"]) for one in event["exception"]["values"]] == [
        ("LookupError", ""),
        ("SettingsError", "Set it."),
    ]
    assert event["exception"]["values"][1]["module"] == "worker.errors"
    assert event["tags"] == {"code": "x"}
    assert event["extra"] == {"attempt": 2, "full_name": "[redacted]"}
    assert "canary" not in repr(event)


def test_what_the_library_adds_by_itself_does_not_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    No host, no request, no user, no modules; whatever its next release collects.
    """
    sent: list[Any] = []

    class Caught(sentry_sdk.Transport):
        @override
        def capture_envelope(self, envelope: Any) -> None:
            sent.append(envelope.get_event())

    monkeypatch.setattr("sentry_sdk.client.make_transport", Caught)
    reports = Reports("https://key@sentry.example/1", release=RELEASE)
    reports(failing("canary"))
    reports.close()

    [event] = sent
    assert event["release"] == RELEASE
    assert not {"server_name", "request", "user", "modules", "breadcrumbs", "contexts"} & set(event)
    assert "canary" not in repr(event)


@pytest.mark.parametrize("level", ["info", "warning"])
def test_only_errors_are_reported(level: str, capsys: pytest.CaptureFixture[str]) -> None:
    """
    What is expected to go wrong, now and then, is a warning.
    """
    reported: list[Any] = []
    process = logs._report
    process(reported.append, None, level, {"event": "x", "level": level})
    assert reported == []
    process(reported.append, None, "error", {"event": "x", "level": "error"})
    assert len(reported) == 1


def test_lost_traces_are_not_reported() -> None:
    """
    A collector that is away for a night would fill the place where errors are looked for.
    """
    reported: list[Any] = []
    name = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
    lost = {"event": "Failed to export span batch", "level": "error", "logger": name}

    logs._report(reported.append, None, "error", lost)

    assert reported == []


@pytest.mark.parametrize(
    ("dsn", "says"),
    [
        ("https://canary", "no address of a Sentry project"),
        ("http://canary@sentry.example/1", "https://"),
        ("canary", "https://"),
    ],
)
def test_an_address_that_cannot_be_used_is_one_sentence_without_it(
    monkeypatch: pytest.MonkeyPatch, dsn: str, says: str
) -> None:
    """
    Told at the start.
    """
    monkeypatch.setenv("SENTRY_DSN", dsn)
    with pytest.raises(SettingsError, match=says) as refused:
        credentials.error_reports(release=RELEASE)
    assert "canary" not in str(refused.value)


def test_without_the_extra_an_address_is_a_wrong_setting() -> None:
    """
    Somebody expects to hear of errors, and would not.
    """
    told = run_python(
        "import sys, os; sys.modules['sentry_sdk'] = None; from worker import credentials;"
        "print(credentials.error_reports(release='x'));"
        "os.environ['SENTRY_DSN'] = 'https://key@sentry.example/1'\n"
        "try: credentials.error_reports(release='x')\n"
        "except Exception as error: print(error)"
    )
    assert told.splitlines() == [
        "None",
        "SENTRY_DSN is set, and sentry-sdk is not installed: install "
        "`hlf-dynamics-sync[sentry]`, or unset it.",
    ]
