"""
The house: who may import whom, who reads secrets, and what no file is called.
"""

from __future__ import annotations

import ast
import importlib
import re
import shutil
import subprocess
import sys
import tomllib
from typing import TYPE_CHECKING

import pytest

from tests.conftest import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PACKAGES = ("outbox", "worker")


def sources(*folders: str) -> Iterator[tuple[str, ast.Module]]:
    """
    Every module below these folders: its path in the project, and what is in it.
    """
    for folder in folders:
        for file in sorted((ROOT / folder).rglob("*.py")):
            path = file.relative_to(ROOT).as_posix()
            yield path, ast.parse(file.read_text(encoding="utf-8"))


def imported(module: ast.Module) -> set[str]:
    """
    Every name that a module imports, in full, wherever the import stands.
    """
    names: set[str] = set()
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def importers(name: str, *folders: str) -> set[str]:
    """
    The files that import a module or something in it.
    """
    return {
        path
        for path, module in sources(*folders)
        if any(f"{one}.".startswith(f"{name}.") for one in imported(module))
    }


def reads_the_environment(module: ast.Module) -> bool:
    """
    Whether it says `os.environ`, `os.getenv` or imports one of them.
    """
    return any(
        isinstance(node, ast.Attribute) and node.attr in {"environ", "environb", "getenv"}
        for node in ast.walk(module)
    ) or bool({"os.environ", "os.environb", "os.getenv"} & imported(module))


# --------------------------------------------------------------------------- secrets


def test_the_environment_is_read_in_one_place() -> None:
    """
    Credentials read secrets, a library reads settings, and the demo hides both from its own.
    """
    readers = {
        path for path, module in sources(*PACKAGES, "alembic") if reads_the_environment(module)
    }

    assert readers == {"worker/credentials.py", "worker/demo.py"}


def test_settings_are_read_from_the_environment_by_one_module() -> None:
    """
    One module says which variables there are.
    """
    assert importers("pydantic_settings", *PACKAGES, "alembic") == {"worker/settings.py"}


def test_only_the_composition_root_imports_the_credentials() -> None:
    """
    Also the migrations go through it.
    """
    assert importers("worker.credentials", *PACKAGES, "alembic") == {"worker/bootstrap.py"}


def test_one_module_imports_the_http_library() -> None:
    """
    Whatever else wants to send has to ask it.
    """
    assert importers("aiohttp", *PACKAGES, "alembic") == {"worker/http_client.py"}


def test_only_what_sends_asks_it() -> None:
    """
    And who makes one for them.
    """
    assert importers("worker.http_client", *PACKAGES, "alembic") == {
        "worker/coordinator/serving.py",
        "worker/coordinator/tokens.py",
        "worker/credentials.py",
        "worker/dynamics/client.py",
        "worker/dynamics/edge.py",
        "worker/dynamics/exchange.py",
        "worker/dynamics/token.py",
        "worker/ping.py",
        "worker/webhook.py",
    }


@pytest.mark.parametrize(
    "name",
    [
        "aiohttp",
        "worker.http_client",
        "worker.dynamics",
        "worker.credentials",
        "worker.bootstrap",
        "worker.cli",
    ],
)
def test_an_app_that_renews_a_certification_gets_no_part_of_dynamics(name: str) -> None:
    """
    What the app imports has neither HTTP nor secrets in it.
    """
    assert importers(name, "worker/certifications") == set()


def test_importing_certifications_loads_no_http_and_no_credentials() -> None:
    """
    Not even by a detour: what is loaded in a fresh interpreter says so.
    """
    program = "import sys, worker.certifications; print(*sorted(sys.modules))"
    loaded = run_python(program).split()

    assert "worker.certifications.transitions" in loaded
    unwanted = {"aiohttp", "worker.dynamics", "worker.credentials", "worker.bootstrap"}
    assert not unwanted & set(loaded)


WEB = {
    "starlette",
    "uvicorn",
    "jinja2",
    "authlib",
    "joserfc",
    "prometheus_client",
    "opentelemetry",
    "sentry_sdk",
}


def test_no_other_command_loads_a_web_server() -> None:
    """
    They start often, and it takes a fifth of their time.
    """
    loaded = run_python("import sys, worker.cli; print(*sorted(sys.modules))").split()

    assert "worker.cli.showing" in loaded
    assert not WEB & set(loaded)


def run_python(program: str) -> str:
    """
    What a fresh interpreter prints.
    """
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return done.stdout


def test_no_trace_shows_local_variables() -> None:
    """
    They hold tokens.
    """
    shown = {
        path
        for path, module in sources(*PACKAGES, "alembic", "tests")
        for node in ast.walk(module)
        if isinstance(node, ast.keyword)
        and node.arg == "show_locals"
        and not (isinstance(node.value, ast.Constant) and node.value.value is False)
    }

    assert shown == set()
    assert "showlocals" not in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


# ----------------------------------------------------------------------------- files


def test_the_folder_of_migrations_is_no_package() -> None:
    """
    It has the name of the library, which it would hide.
    """
    assert list((ROOT / "alembic").rglob("__init__.py")) == []
    assert not str(importlib.import_module("alembic").__file__).startswith(str(ROOT / "alembic"))


NAMES_THAT_SAY_NOTHING = {"base", "common", "helpers", "manager", "misc", "shared", "utils"}


def test_no_file_has_a_name_that_says_nothing() -> None:
    """
    Whatever goes in there belongs somewhere.
    """
    called = {
        path
        for path, _ in sources(*PACKAGES, "alembic", "tests")
        if NAMES_THAT_SAY_NOTHING & set(path.removesuffix(".py").split("/"))
    }

    assert called == set()


def test_every_module_is_described() -> None:
    """
    A sentence at its top says what it is for.
    """
    silent = {path for path, module in sources(*PACKAGES) if not ast.get_docstring(module)}

    assert silent == set()


def test_the_map_of_the_worker_names_every_part() -> None:
    """
    What one reads first is complete.
    """
    parts = {
        entry.stem
        for entry in (ROOT / "worker").iterdir()
        if entry.suffix == ".py" or (entry / "__init__.py").exists()
    }
    described = importlib.import_module("worker").__doc__ or ""

    assert parts - {"__init__"} - set(re.findall(r"\w+", described)) == set()


def test_packages_say_that_they_are_typed() -> None:
    """
    Whoever imports them gets their types checked.
    """
    assert all((ROOT / package / "py.typed").exists() for package in PACKAGES)


# ------------------------------------------------------------------------- contracts


def copy(folder: Path) -> Path:
    """
    The packages and their contracts, to be spoilt.
    """
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def broken(folder: Path) -> set[str]:
    """
    The contracts that do not hold in a folder.
    """
    done = subprocess.run(
        [sys.executable, "-c", CHECK], cwd=folder, check=False, capture_output=True, text=True
    )
    assert "Contracts: " in done.stdout, done.stdout + done.stderr
    return {
        line.removesuffix(" BROKEN")
        for line in done.stdout.splitlines()
        if line.endswith(" BROKEN")
    }


CHECK = "from importlinter.cli import lint_imports_command as c; c(['--no-cache'])"


def contracts() -> list[str]:
    """
    The names of all contracts.
    """
    with (ROOT / "pyproject.toml").open("rb") as file:
        tool = tomllib.load(file)["tool"]["importlinter"]
    return [contract["name"] for contract in tool["contracts"]]


def test_every_import_contract_holds() -> None:
    """
    Here and now, in the real packages.
    """
    assert broken(ROOT) == set()


VIOLATIONS = [
    (
        "The outbox knows nothing of the application, of HTTP or of migrations",
        "outbox/event.py",
        "import worker.errors",
    ),
    (
        "The outbox knows nothing of the application, of HTTP or of migrations",
        "outbox/retry.py",
        "import aiohttp",
    ),
    ("Inside the outbox, imports point down", "outbox/errors.py", "import outbox.store"),
    ("Inside the outbox, imports point down", "outbox/utils.py", ""),
    ("Inside the worker, imports point down", "worker/errors.py", "import worker.settings"),
    ("Inside the worker, imports point down", "worker/utils.py", ""),
    (
        "Inside the worker, imports point down",
        "worker/certifications/pauses.py",
        "from worker.dynamics import errors",
    ),
    (
        "Inside the worker, imports point down",
        "worker/dynamics/service.py",
        "from worker.certifications import visibility",
    ),
    (
        "Inside certifications, imports point down",
        "worker/certifications/pauses.py",
        "from worker.certifications import visibility",
    ),
    (
        "Inside dynamics, imports point down",
        "worker/dynamics/errors.py",
        "from worker.dynamics import client",
    ),
    (
        "Only the composition root reaches the credentials",
        "worker/doctor/database.py",
        "from worker import credentials",
    ),
    (
        "Inside the doctor, imports point down",
        "worker/doctor/rights.py",
        "from worker.doctor import grants",
    ),
    (
        "Inside the coordinator's rooms, imports point down",
        "worker/coordinator/callers.py",
        "from worker.coordinator import retry",
    ),
    ("Inside the coordinator's rooms, imports point down", "worker/coordinator/utils.py", ""),
    ("Only one module speaks HTTP", "worker/portal.py", "import aiohttp"),
    ("Only the monitoring knows Prometheus", "worker/process.py", "import prometheus_client"),
    (
        "Only tracing and who sets it up know OpenTelemetry",
        "worker/process.py",
        "import opentelemetry",
    ),
    ("Only reporting knows Sentry", "worker/logs.py", "import sentry_sdk"),
    (
        "Inside the monitoring, imports point down",
        "worker/monitoring/metrics.py",
        "from worker.monitoring import watching",
    ),
    (
        "A web server is loaded by the coordinator's rooms and the monitoring alone",
        "worker/process.py",
        "import starlette",
    ),
    (
        "Whoever renews a certification needs neither Dynamics nor a secret",
        "worker/wakeup.py",
        "from worker.dynamics import token",
    ),
    (
        "The sandbox is nobody's dependency and depends on nobody",
        "worker/dynamics/sandbox/rows.py",
        "import outbox",
    ),
    (
        "Dynamics needs neither a database nor a setting",
        "worker/dynamics/service.py",
        "from worker import database",
    ),
]


@pytest.mark.parametrize(
    ("contract", "file", "line"),
    [pytest.param(*one, id=f"{one[1]} {one[2]}".strip()) for one in VIOLATIONS],
)
def test_a_violation_breaks_its_contract(
    tmp_path: Path, contract: str, file: str, line: str
) -> None:
    """
    The check is no decoration.
    """
    folder = copy(tmp_path)
    with (folder / file).open("a", encoding="utf-8") as module:
        module.write(f"\n{line}\n")

    assert contract in broken(folder)


def test_every_contract_was_seen_broken() -> None:
    """
    No contract is without a violation that shows what it forbids.
    """
    assert set(contracts()) == {contract for contract, *_ in VIOLATIONS}
