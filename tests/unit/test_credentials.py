"""
Credentials: read from a variable or a file, handed out as capabilities, shown to nobody.
"""

from __future__ import annotations

import base64
import pickle
import traceback
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo

import pytest
from standardwebhooks import Webhook

from outbox.errors import ConfigurationError
from worker import credentials
from worker.bootstrap import open_authentication, open_edge, open_portal
from worker.database import connect
from worker.errors import SettingsError
from worker.settings import DynamicsSettings, EdgeSettings, Settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from worker.dynamics import EntraAuth

ADDRESS = "postgresql://anna:geheim@db.example:5432/hlf"
SECRET = "HLF_DYNAMICS_CLIENT_SECRET"  # noqa: S105 (the name of a variable)


@pytest.fixture(autouse=True)
def patch(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """
    Everything about Dynamics but the secret; no database.
    """
    for name in ("DATABASE_URL", "DATABASE_URL_FILE", "LISTEN_DATABASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HLF_ORGANIZATION_ID", "6a1f6f0e-4f0b-4f5e-9c55-0d8f0e9f2a10")
    monkeypatch.setenv("HLF_DYNAMICS_URL", "https://hlf.crm4.dynamics.example")
    monkeypatch.setenv("HLF_DYNAMICS_TENANT_ID", "hlf.example")
    monkeypatch.setenv("HLF_DYNAMICS_CLIENT_ID", "a-client")
    return monkeypatch


@asynccontextmanager
async def authentication() -> AsyncIterator[EntraAuth]:
    """
    What adds tokens to requests, closed at the end.
    """
    auth = credentials.dynamics_auth(DynamicsSettings.load())
    try:
        yield auth
    finally:
        await auth.aclose()


def read() -> str:
    """
    The client secret as the next token request would have it.
    """
    return credentials._current(SECRET)


# ----------------------------------------------------------------- where secrets are


def test_a_secret_is_read_from_its_variable(patch: pytest.MonkeyPatch) -> None:
    """
    The plain way.
    """
    patch.setenv(SECRET, "geheim")

    assert read() == "geheim"


def test_a_secret_is_read_from_a_file(patch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """
    As containers and systemd hand them over; the line break at its end is no part of it.
    """
    file = tmp_path / "secret"
    file.write_text("geheim\n", encoding="utf-8")
    patch.setenv(f"{SECRET}_FILE", str(file))

    assert read() == "geheim"


def test_a_file_goes_before_the_variable(patch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """
    A file can be rotated, a variable cannot.
    """
    file = tmp_path / "secret"
    file.write_text("from the file", encoding="utf-8")
    patch.setenv(SECRET, "from the variable")
    patch.setenv(f"{SECRET}_FILE", str(file))

    assert read() == "from the file"


def test_an_empty_name_of_a_file_is_none(patch: pytest.MonkeyPatch) -> None:
    """
    Compose files set variables to nothing.
    """
    patch.setenv(SECRET, "geheim")
    patch.setenv(f"{SECRET}_FILE", "")

    assert read() == "geheim"


async def test_a_rotated_secret_is_picked_up_without_a_restart(
    patch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """
    The file is read anew for each token request.
    """
    file = tmp_path / "secret"
    file.write_text("old", encoding="utf-8")
    patch.setenv(f"{SECRET}_FILE", str(file))
    async with authentication() as auth:
        assert auth._secret() == "old"

        file.write_text("new", encoding="utf-8")
        assert auth._secret() == "new"


async def test_a_secret_that_vanishes_while_running_is_a_matter_of_configuration(
    patch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """
    The gate closes until somebody mends it; no event is burnt.
    """
    file = tmp_path / "secret"
    file.write_text("old", encoding="utf-8")
    patch.setenv(f"{SECRET}_FILE", str(file))
    async with authentication() as auth:
        file.unlink()
        with pytest.raises(ConfigurationError, match="cannot read") as error:
            auth._secret()

    assert error.value.code == "secret_missing"


async def test_the_key_to_the_edge_function_may_be_in_a_file_that_is_rotated(
    patch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """
    It is read anew when it is refused; the client secret is not asked for.
    """
    file = tmp_path / "key"
    file.write_text("old\n", encoding="utf-8")
    patch.setenv("HLF_EDGE_URL", "https://hlf.functions.example/hlf-dynamics-sync")
    patch.setenv("HLF_EDGE_KEY_FILE", str(file))
    key = credentials.edge_key(EdgeSettings.load())
    assert key._current() == "old"

    file.write_text("new\n", encoding="utf-8")
    assert key._current() == "new"
    assert "new" not in f"{key!r} {vars(key)!r}"

    file.unlink()
    with pytest.raises(ConfigurationError, match="cannot read") as error:
        key._current()
    assert error.value.code == "secret_missing"


# --------------------------------------------------------------------- when they are not


async def start() -> None:
    """
    Ask for what every sending command needs.
    """
    async with authentication():
        pass


@pytest.mark.parametrize(
    ("name", "ask"),
    [
        ("DATABASE_URL", credentials.database_engine),
        ("DATABASE_URL", credentials.migration_url),
    ],
)
def test_a_missing_address_is_a_sentence_with_both_ways_to_set_it(
    name: str, ask: Callable[[], object]
) -> None:
    """
    The variable, and the file that may hold it instead.
    """
    with pytest.raises(SettingsError) as error:
        ask()

    assert str(error.value) == (
        f"{name} is not set; set it, or {name}_FILE to a file that holds it."
    )


async def test_a_missing_secret_is_said_before_anything_is_sent() -> None:
    """
    At the start, not at the first mentor.
    """
    with pytest.raises(SettingsError, match=f"{SECRET} is not set; set it, or {SECRET}_FILE"):
        await start()


async def test_a_missing_key_to_the_edge_function_is_said_before_anything_is_sent(
    patch: pytest.MonkeyPatch,
) -> None:
    """
    At the start, as the client secret.
    """
    patch.setenv("HLF_EDGE_URL", "https://hlf.functions.example/hlf-dynamics-sync")

    with pytest.raises(
        SettingsError, match="HLF_EDGE_KEY is not set; set it, or HLF_EDGE_KEY_FILE"
    ):
        async with open_edge(Settings.load()):
            pass


async def test_the_key_to_the_edge_function_goes_nowhere_without_https(
    patch: pytest.MonkeyPatch,
) -> None:
    """
    One sentence and the end, as for the client secret.
    """
    patch.setenv("HLF_EDGE_KEY", "geheim")
    patch.setenv("HLF_EDGE_URL", "http://hlf.functions.example/hlf-dynamics-sync")

    with pytest.raises(SettingsError, match="The Edge Function's URL must") as error:
        async with open_edge(Settings.load()):
            pass

    assert "geheim" not in str(error.value)


async def test_an_empty_secret_is_a_missing_secret(
    patch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """
    In a variable as in a file.
    """
    patch.setenv(SECRET, "")
    with pytest.raises(SettingsError, match="is not set"):
        await start()

    file = tmp_path / "secret"
    file.write_text(" \n", encoding="utf-8")
    patch.setenv(f"{SECRET}_FILE", str(file))
    with pytest.raises(SettingsError, match="is not set"):
        await start()


def no_file(folder: Path) -> Path:
    """
    Nothing there.
    """
    return folder / "nothing"


def a_folder(folder: Path) -> Path:
    """
    Something else than a file.
    """
    return folder


def no_text(folder: Path) -> Path:
    """
    A file whose bytes are no text.
    """
    file = folder / "bytes"
    file.write_bytes(b"geheim \xff\xfe")
    return file


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (no_file, "No such file or directory"),
        (a_folder, "Is a directory"),
        (no_text, "it is no text"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_reason(
    patch: pytest.MonkeyPatch, tmp_path: Path, make: Callable[[Path], Path], reason: str
) -> None:
    """
    Which variable, which file, why; and nothing of what is in it.
    """
    file = make(tmp_path)
    patch.setenv("DATABASE_URL_FILE", str(file))
    patch.setenv("DATABASE_URL", ADDRESS)

    with pytest.raises(SettingsError) as error:
        credentials.database_engine()

    assert str(error.value) == f"DATABASE_URL_FILE: cannot read {file}: {reason}."
    assert "geheim" not in "".join(traceback.format_exception(error.value))


# ------------------------------------------------------------------ nothing is shown


async def test_an_engine_shows_no_password(patch: pytest.MonkeyPatch) -> None:
    """
    Not in a log, a debugger or a pickle of its address.
    """
    patch.setenv("DATABASE_URL", ADDRESS)
    engine = credentials.database_engine()

    assert "geheim" not in f"{engine!r} {engine.url} {engine.url!r} {engine.pool!r}"
    await engine.dispose()


def test_the_address_for_migrations_shows_no_password(patch: pytest.MonkeyPatch) -> None:
    """
    Alembic prints what it is given.
    """
    patch.setenv("DATABASE_URL", ADDRESS)
    url = credentials.migration_url()

    assert "geheim" not in f"{url} {url!r}"
    assert url.password == "geheim"  # noqa: S105 (made up)


async def test_the_authentication_shows_no_secret(patch: pytest.MonkeyPatch) -> None:
    """
    Neither itself nor what it is made of holds the secret as a value.
    """
    patch.setenv(SECRET, "geheim")
    async with authentication() as auth:
        assert "geheim" not in f"{auth!r} {vars(auth)!r}"
        with pytest.raises((TypeError, AttributeError, pickle.PicklingError)):
            pickle.dumps(auth)


async def test_a_wrong_address_is_refused_without_being_repeated(
    patch: pytest.MonkeyPatch,
) -> None:
    """
    A password was part of it.
    """
    patch.setenv("DATABASE_URL", ADDRESS.replace("postgresql", "mysql"))

    with pytest.raises(SettingsError) as error:
        credentials.database_engine()

    assert "geheim" not in "".join(traceback.format_exception(error.value))


async def test_a_wrong_address_to_listen_at_is_named_by_its_own_variable(
    patch: pytest.MonkeyPatch,
) -> None:
    """
    Two variables hold addresses, and only one of them is wrong.
    """
    patch.setenv("DATABASE_URL", ADDRESS)
    patch.setenv("LISTEN_DATABASE_URL", "https://db.example")

    with pytest.raises(SettingsError) as error:
        await credentials.listening_connection()

    assert str(error.value).startswith("LISTEN_DATABASE_URL: ")


# ------------------------------------------------------------------ where they go to


@pytest.mark.parametrize("name", ["HLF_DYNAMICS_URL", "HLF_DYNAMICS_AUTHORITY"])
@pytest.mark.parametrize(
    "address",
    [
        "http://hlf.crm4.dynamics.example",
        "http://127.0.0.1.example",
        "http://localhost.example",
        "http://10.0.0.1",
        "http://[2001:db8::1]",
        "ftp://hlf.example",
        "hlf.example",
        "",
        "https://anna:geheim@hlf.example",
        "https://hlf.example/path",
        "https://hlf.example?geheim",
    ],
)
async def test_a_secret_goes_nowhere_without_https(
    patch: pytest.MonkeyPatch, name: str, address: str
) -> None:
    """
    Plain http, half an address or more than an address is one sentence and the end.
    """
    patch.setenv(SECRET, "geheim")
    patch.setenv(name, address)
    engine = connect(ADDRESS, application_name="test")

    with pytest.raises(SettingsError) as error:
        await open_portal(engine, Settings.load()).__aenter__()

    assert "must" in str(error.value)
    assert "geheim" not in str(error.value)
    await engine.dispose()


@pytest.mark.parametrize("host", ["127.0.0.1:8080", "localhost:8080", "[::1]:8080", "127.1.2.3"])
async def test_plain_http_is_for_this_machine_only(patch: pytest.MonkeyPatch, host: str) -> None:
    """
    The sandbox listens there.
    """
    patch.setenv(SECRET, "geheim")
    patch.setenv("HLF_DYNAMICS_URL", f"http://{host}")
    patch.setenv("HLF_DYNAMICS_AUTHORITY", f"http://{host}")

    async with open_authentication() as auth:
        assert host.partition(":")[0].strip("[") in repr(auth)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HLF_DYNAMICS_TENANT_ID", "../geheim"),
        ("HLF_DYNAMICS_ENTITY_SET", "contacts(geheim)"),
        ("HLF_DYNAMICS_COLUMN", "geheim/column"),
        ("HLF_DYNAMICS_KEY", "geheim key"),
        ("HLF_DYNAMICS_ACTION", "geheim?"),
    ],
)
async def test_a_name_that_would_change_the_address_is_refused(
    patch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    """
    Names become parts of a URL, so they are letters, digits and underscores.
    """
    patch.setenv(SECRET, "secret")
    patch.setenv(name, value)
    engine = connect(ADDRESS, application_name="test")

    with pytest.raises(SettingsError) as error:
        await open_portal(engine, Settings.load()).__aenter__()

    assert "must be" in str(error.value)
    assert "geheim" not in str(error.value)
    await engine.dispose()


# ------------------------------------------------------------------------ the reminders'


REMINDERS = "HLF_REMINDER_SECRET"
KEY = base64.b64encode(b"a key of the webhook, 30 bytes").decode()


@pytest.mark.parametrize("secret", [KEY, f"whsec_{KEY}", f"whsec_{KEY.rstrip('=')}"])
def test_a_signature_is_that_of_the_standard(patch: pytest.MonkeyPatch, secret: str) -> None:
    """
    With and without the prefix; what is handed out holds no secret itself.
    """
    patch.setenv(REMINDERS, secret)
    sign = credentials.reminder_signature()
    now = datetime.now(UTC)
    value = sign("id", now.astimezone(ZoneInfo("Asia/Tokyo")), "{}")

    Webhook(secret).verify(
        "{}",
        {
            "webhook-id": "id",
            "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": value,
        },
    )
    assert KEY not in repr(sign)
    assert sign.__closure__ is None


@pytest.mark.parametrize(
    "secret",
    [
        "",
        "whsec_",
        "geheim",
        "whsec_geheim!",
        "whsec_" + base64.b64encode(b"x" * 23).decode(),
        "whsec_" + base64.b64encode(b"x" * 65).decode(),
        "Ærlig",
    ],
)
def test_a_secret_that_signs_nothing_is_refused_without_repeating_it(
    patch: pytest.MonkeyPatch, secret: str
) -> None:
    """
    At the start; the library would take it, and the receiver refuse every reminder.
    """
    patch.setenv(REMINDERS, secret)

    with pytest.raises(SettingsError) as error:
        credentials.reminder_signature()

    assert REMINDERS in str(error.value)
    assert not secret.removeprefix("whsec_") or secret.removeprefix("whsec_") not in str(
        error.value
    )
