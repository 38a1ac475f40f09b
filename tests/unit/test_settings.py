"""
Settings: each has a default or has to be there, and what is wrong is one sentence.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from pydantic import ValidationError

from worker.errors import SettingsError
from worker.settings import DynamicsSettings, EdgeSettings, FromEnvironment, Settings

ORGANIZATION = "6a1f6f0e-4f0b-4f5e-9c55-0d8f0e9f2a10"

NEEDED = {"HLF_ORGANIZATION_ID": ORGANIZATION}

DYNAMICS_NEEDED = {
    "HLF_DYNAMICS_URL": "https://hlf.crm4.dynamics.example",
    "HLF_DYNAMICS_TENANT_ID": "hlf.example",
    "HLF_DYNAMICS_CLIENT_ID": "a-client",
}


@pytest.fixture
def patch(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """
    An environment in which everything that has to be there is there.
    """
    for name, value in (NEEDED | DYNAMICS_NEEDED).items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def refusal(kind: type[FromEnvironment] = Settings) -> str:
    """
    What reading the settings says.
    """
    with pytest.raises(SettingsError) as error:
        kind.load()
    assert error.value.exit_code == 78
    return str(error.value)


# --------------------------------------------------------------------------- defaults


@pytest.mark.usefixtures("patch")
def test_what_is_not_set_has_its_default() -> None:
    """
    Only the organisation has to be said.
    """
    settings = Settings.load()

    assert settings.model_dump() == {
        "organization_id": UUID(ORGANIZATION),
        "timezone": "Europe/Oslo",
        "concurrency": 8,
        "metrics_host": "127.0.0.1",
        "metrics_port": None,
        "batch": 1,
        "transport": "dynamics",
        "poll_seconds": 1.0,
        "lease_seconds": 60.0,
        "request_seconds": 5.0,
        "grace_seconds": 20.0,
        "reminder_days": (60, 30, 7),
        "reminder_url": "",
        "log_format": "console",
    }


@pytest.mark.usefixtures("patch")
def test_what_is_not_set_about_dynamics_has_its_default() -> None:
    """
    Address, tenant and client have to be said; the rest is Dataverse's usual.
    """
    settings = DynamicsSettings.load()

    assert settings.model_dump() == {
        "url": "https://hlf.crm4.dynamics.example",
        "authority": "https://login.microsoftonline.com",
        "tenant_id": "hlf.example",
        "client_id": "a-client",
        "entity_set": "contacts",
        "key": "",
        "column": "hlf_portalvisible",
        "operation": "patch",
        "action": "",
    }


@pytest.mark.parametrize(
    ("name", "value", "field", "read"),
    [
        ("HLF_TIMEZONE", "Pacific/Kiritimati", "timezone", "Pacific/Kiritimati"),
        ("HLF_SYNC_CONCURRENCY", "50", "concurrency", 50),
        ("HLF_SYNC_BATCH", "100", "batch", 100),
        ("HLF_SYNC_TRANSPORT", "edge", "transport", "edge"),
        ("HLF_SYNC_POLL_SECONDS", "0.1", "poll_seconds", 0.1),
        ("HLF_SYNC_LEASE_SECONDS", "3600", "lease_seconds", 3600.0),
        ("HLF_SYNC_REQUEST_SECONDS", "29.9", "request_seconds", 29.9),
        ("HLF_SYNC_GRACE_SECONDS", "0", "grace_seconds", 0.0),
        ("HLF_REMINDER_DAYS", " 7, 90,30,7,", "reminder_days", (90, 30, 7)),
        ("HLF_REMINDER_DAYS", "999", "reminder_days", (999,)),
        ("HLF_REMINDER_DAYS", "1", "reminder_days", (1,)),
        ("HLF_REMINDER_URL", "https://hooks.example/r", "reminder_url", "https://hooks.example/r"),
        ("HLF_LOG_FORMAT", "json", "log_format", "json"),
    ],
)
def test_what_is_set_is_read(
    patch: pytest.MonkeyPatch, name: str, value: str, field: str, read: object
) -> None:
    """
    Each under its own name, also at the edge of what is allowed.
    """
    patch.setenv(name, value)

    assert getattr(Settings.load(), field) == read


@pytest.mark.parametrize(
    ("name", "value", "field"),
    [
        ("HLF_DYNAMICS_URL", "https://other.example", "url"),
        ("HLF_DYNAMICS_AUTHORITY", "https://login.example", "authority"),
        ("HLF_DYNAMICS_TENANT_ID", "other.example", "tenant_id"),
        ("HLF_DYNAMICS_CLIENT_ID", "other-client", "client_id"),
        ("HLF_DYNAMICS_ENTITY_SET", "hlf_mentors", "entity_set"),
        ("HLF_DYNAMICS_KEY", "hlf_mentorid", "key"),
        ("HLF_DYNAMICS_COLUMN", "hlf_visible", "column"),
        ("HLF_DYNAMICS_OPERATION", "patch", "operation"),
        ("HLF_DYNAMICS_ACTION", "hlf_SetVisibility", "action"),
    ],
)
def test_what_is_set_about_dynamics_is_read(
    patch: pytest.MonkeyPatch, name: str, value: str, field: str
) -> None:
    """
    Each under its own name.
    """
    patch.setenv(name, value)

    assert getattr(DynamicsSettings.load(), field) == value


@pytest.mark.usefixtures("patch")
def test_settings_do_not_change_after_they_were_checked() -> None:
    """
    What was checked together stays together.
    """
    settings = Settings.load()

    with pytest.raises(ValidationError):
        settings.concurrency = 51


# ------------------------------------------------------------------- what is refused

# Setting, a value that is refused, and what the sentence says about it.
WRONG = [
    ("HLF_ORGANIZATION_ID", "geheim", "valid UUID"),
    ("HLF_TIMEZONE", "geheim", "time zone"),
    ("HLF_TIMEZONE", "../geheim", "time zone"),
    ("HLF_TIMEZONE", "", "time zone"),
    ("HLF_SYNC_CONCURRENCY", "0", "greater than or equal to 1"),
    ("HLF_SYNC_CONCURRENCY", "101", "less than or equal to 100"),
    ("HLF_SYNC_CONCURRENCY", "geheim", "valid integer"),
    ("HLF_SYNC_BATCH", "1001", "less than or equal to 1000"),
    ("HLF_SYNC_BATCH", "0", "greater than or equal to 1"),
    ("HLF_SYNC_BATCH", "geheim", "valid integer"),
    ("HLF_SYNC_TRANSPORT", "geheim", "should be 'dynamics' or 'edge'"),
    ("HLF_SYNC_TRANSPORT", "geheim", "should be 'dynamics'"),
    ("HLF_SYNC_POLL_SECONDS", "0", "greater than 0"),
    ("HLF_SYNC_POLL_SECONDS", "-1", "greater than 0"),
    ("HLF_SYNC_POLL_SECONDS", "nan", "less than or equal to 3600"),
    ("HLF_SYNC_POLL_SECONDS", "inf", "less than or equal to 3600"),
    ("HLF_SYNC_POLL_SECONDS", "geheim", "valid number"),
    ("HLF_SYNC_LEASE_SECONDS", "0", "greater than 0"),
    ("HLF_SYNC_LEASE_SECONDS", "3601", "less than or equal to 3600"),
    ("HLF_SYNC_REQUEST_SECONDS", "0", "greater than 0"),
    ("HLF_SYNC_REQUEST_SECONDS", "3601", "less than or equal to 3600"),
    ("HLF_SYNC_GRACE_SECONDS", "-1", "greater than or equal to 0"),
    ("HLF_SYNC_GRACE_SECONDS", "3601", "less than or equal to 3600"),
    ("HLF_LOG_FORMAT", "geheim", "'console' or 'json'"),
]


@pytest.mark.parametrize(("name", "value", "says"), WRONG)
def test_a_wrong_setting_is_named_with_what_it_should_be(
    patch: pytest.MonkeyPatch, name: str, value: str, says: str
) -> None:
    """
    One sentence, and the others are not mentioned.
    """
    patch.setenv(name, value)

    sentence = refusal()

    assert sentence.startswith(f"{name}: ")
    assert says in sentence
    assert sentence.count("HLF_") == 1
    assert sentence.endswith(".")
    assert "\n" not in sentence


@pytest.mark.parametrize("name", list(dict.fromkeys(name for name, *_ in WRONG)))
def test_a_wrong_value_is_never_repeated(patch: pytest.MonkeyPatch, name: str) -> None:
    """
    Somebody may have pasted a secret into the wrong variable.
    """
    patch.setenv(name, "geheim")

    assert "geheim" not in refusal()


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("HLF_DYNAMICS_TENANT_ID", "", "at least 1 character"),
        ("HLF_DYNAMICS_CLIENT_ID", "", "at least 1 character"),
        ("HLF_DYNAMICS_OPERATION", "geheim", "'patch' or 'action'"),
    ],
)
def test_a_wrong_setting_of_dynamics_is_named_with_what_it_should_be(
    patch: pytest.MonkeyPatch, name: str, value: str, says: str
) -> None:
    """
    As for the others.
    """
    patch.setenv(name, value)

    sentence = refusal(DynamicsSettings)

    assert sentence.startswith(f"{name}: ")
    assert says in sentence
    assert "geheim" not in sentence


@pytest.mark.parametrize("name", DYNAMICS_NEEDED)
def test_what_is_missing_about_dynamics_is_named(patch: pytest.MonkeyPatch, name: str) -> None:
    """
    Each of the three by itself.
    """
    patch.delenv(name)

    assert refusal(DynamicsSettings) == f"{name} is not set."


def test_all_that_is_missing_is_named_at_once() -> None:
    """
    Nobody mends one variable after the other.
    """
    assert refusal() == "HLF_ORGANIZATION_ID is not set."
    assert refusal(DynamicsSettings) == (
        "HLF_DYNAMICS_URL is not set; HLF_DYNAMICS_TENANT_ID is not set; "
        "HLF_DYNAMICS_CLIENT_ID is not set."
    )


def test_all_that_is_wrong_or_missing_is_said_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """
    Missing and wrong together.
    """
    monkeypatch.setenv("HLF_SYNC_CONCURRENCY", "many")
    monkeypatch.setenv("HLF_SYNC_TRANSPORT", "post")
    monkeypatch.setenv("HLF_LOG_FORMAT", "xml")

    sentence = refusal()

    assert sentence.count(";") == 3
    assert "HLF_ORGANIZATION_ID is not set" in sentence
    for name in ("HLF_SYNC_CONCURRENCY: ", "HLF_SYNC_TRANSPORT: ", "HLF_LOG_FORMAT: "):
        assert name in sentence


def test_a_refusal_has_no_trace_of_what_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    The library's own error holds every value, so it does not come along.
    """
    monkeypatch.setenv("HLF_ORGANIZATION_ID", "geheim")

    with pytest.raises(SettingsError) as error:
        Settings.load()

    assert error.value.__cause__ is None
    assert error.value.__suppress_context__


# ------------------------------------------------------------- rules between settings


@pytest.mark.parametrize(("lease", "request_"), [("10", "5"), ("9", "5"), ("60", "30")])
def test_a_lease_that_an_attempt_could_outlive_is_refused(
    patch: pytest.MonkeyPatch, lease: str, request_: str
) -> None:
    """
    More than twice the request, not just as much; the sentence names both.
    """
    patch.setenv("HLF_SYNC_LEASE_SECONDS", lease)
    patch.setenv("HLF_SYNC_REQUEST_SECONDS", request_)

    assert refusal() == ("HLF_SYNC_LEASE_SECONDS must be more than twice HLF_SYNC_REQUEST_SECONDS.")


def test_a_lease_just_long_enough_is_accepted(patch: pytest.MonkeyPatch) -> None:
    """
    A little more than twice is more than twice.
    """
    patch.setenv("HLF_SYNC_LEASE_SECONDS", "10.01")

    assert Settings.load().lease_seconds == 10.01


def test_an_action_needs_its_name(patch: pytest.MonkeyPatch) -> None:
    """
    With a name it is accepted.
    """
    patch.setenv("HLF_DYNAMICS_OPERATION", "action")
    assert refusal(DynamicsSettings) == "HLF_DYNAMICS_OPERATION=action needs HLF_DYNAMICS_ACTION."

    patch.setenv("HLF_DYNAMICS_ACTION", "hlf_SetVisibility")
    assert DynamicsSettings.load().operation == "action"


def test_batches_do_not_go_through_the_edge_function(patch: pytest.MonkeyPatch) -> None:
    """
    It sends single values; whoever asks for both is told.
    """
    patch.setenv("HLF_SYNC_TRANSPORT", "edge")
    assert Settings.load().batch == 1

    patch.setenv("HLF_SYNC_BATCH", "2")
    assert refusal() == (
        "HLF_SYNC_BATCH must be 1 with HLF_SYNC_TRANSPORT=edge, which sends single values."
    )


def test_with_the_edge_function_no_tenant_and_no_client_is_needed(
    patch: pytest.MonkeyPatch,
) -> None:
    """
    It has them; we need its address.
    """
    for name in ("HLF_DYNAMICS_TENANT_ID", "HLF_DYNAMICS_CLIENT_ID"):
        patch.delenv(name)
    assert refusal(EdgeSettings) == "HLF_EDGE_URL is not set."

    patch.setenv("HLF_EDGE_URL", "https://hlf.functions.example/hlf-dynamics-sync")
    assert EdgeSettings.load().edge_url == "https://hlf.functions.example/hlf-dynamics-sync"


def test_variables_of_others_are_left_alone(patch: pytest.MonkeyPatch) -> None:
    """
    What a later release will know does not stop this one.
    """
    patch.setenv("HLF_METRICS_PORT", "9000")

    assert Settings.load().concurrency == 8


def test_today_is_the_date_in_the_zone(patch: pytest.MonkeyPatch) -> None:
    """
    In the far east it is a later date than in the far west, at any moment.
    """
    dates = []
    for zone in ("Pacific/Kiritimati", "Etc/GMT+12"):
        patch.setenv("HLF_TIMEZONE", zone)
        dates.append(Settings.load().today())

    east, west = dates
    assert east > west
    assert abs(east - datetime.now(UTC).date()) <= timedelta(days=1)


def test_no_secret_is_among_the_settings() -> None:
    """
    Secrets are read elsewhere, so that nobody prints them with the settings.
    """
    names = {
        str(field.alias)
        for kind in (Settings, DynamicsSettings, EdgeSettings)
        for field in kind.model_fields.values()
    }

    assert "HLF_EDGE_KEY" not in names
    assert not {name for name in names if "SECRET" in name or "DATABASE" in name}


@pytest.mark.parametrize("days", ["0", "-7", "1000", "60;30", "a month", "", ",", "7.5"])
def test_thresholds_are_days_from_1_to_999(patch: pytest.MonkeyPatch, days: str) -> None:
    """
    At least one; anything else is one sentence that names the setting.
    """
    patch.setenv("HLF_REMINDER_DAYS", days)

    assert "HLF_REMINDER_DAYS" in refusal()


# ---------------------------------------------------------------------------- metrics


@pytest.mark.parametrize(("value", "port"), [("", None), ("0", 0), ("9464", 9464)])
def test_a_port_for_metrics_is_a_number_or_nothing(
    patch: pytest.MonkeyPatch, value: str, port: int | None
) -> None:
    """
    Empty, as a manifest may leave it, is nothing.
    """
    patch.setenv("HLF_METRICS_PORT", value)
    assert Settings.load().metrics_port == port


@pytest.mark.parametrize("value", ["-1", "65536", "http"])
def test_what_is_no_port_is_refused(patch: pytest.MonkeyPatch, value: str) -> None:
    """
    By its name.
    """
    patch.setenv("HLF_METRICS_PORT", value)
    assert "HLF_METRICS_PORT" in refusal()
