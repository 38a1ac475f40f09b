"""
What `deploy/` promises: closed units, manifests that Kubernetes takes, images that run as nobody.
"""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import kubernetes_validate
import pytest
import yaml

from tests.conftest import ROOT
from worker.cli import cli

if TYPE_CHECKING:
    from pathlib import Path

DEPLOY = ROOT / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
KUBERNETES = "1.31"

EXPOSURE = 15
"""Tenths: `systemd-analyze security` calls anything up to 2.0 well protected."""

ANALYZE = shutil.which("systemd-analyze") or ""
STOPS_WITHIN = {"worker": 30, "nightly": 30, "dashboard": 10}
"""Seconds, of commands with the default settings."""

systemd = pytest.mark.skipif(not ANALYZE, reason="there is no systemd-analyze on this machine")


def documents(path: Path) -> list[Any]:
    """
    The YAML documents of a file.
    """
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def containers(document: Any) -> list[Any]:  # noqa: ANN401 (YAML)
    """
    All containers, wherever a kind of object has them.
    """
    if isinstance(document, dict):
        found = list(document.get("containers", []))
        return found + [one for value in document.values() for one in containers(value)]
    if isinstance(document, list):
        return [one for value in document for one in containers(value)]
    return []


@systemd
@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_a_unit_gives_an_intruder_next_to_nothing(unit: Path) -> None:
    """
    Judged without systemd running, by its own tool.
    """
    judged = subprocess.run(
        [ANALYZE, "security", "--offline=true", f"--threshold={EXPOSURE}", str(unit)],
        check=False,
        capture_output=True,
        text=True,
    )
    assert judged.returncode == 0, judged.stdout[-300:] + judged.stderr


@systemd
@pytest.mark.parametrize(
    "timer", sorted((DEPLOY / "systemd").glob("*.timer")), ids=lambda path: path.name
)
def test_the_night_begins_in_the_organisations_zone_at_an_hour_every_day_has(timer: Path) -> None:
    """
    The hour from two to three is missing once a year, and comes twice once a year.
    """
    [when] = [
        line.removeprefix("OnCalendar=")
        for line in timer.read_text(encoding="utf-8").splitlines()
        if line.startswith("OnCalendar=")
    ]
    subprocess.run([ANALYZE, "calendar", when], check=True, capture_output=True)
    assert when.endswith("Europe/Oslo")
    assert not when.split()[1].startswith(("02", "03"))


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_a_unit_runs_a_command_there_is(unit: Path) -> None:
    """
    And stops it before systemd would kill it.
    """
    text = unit.read_text(encoding="utf-8")
    [command] = [line for line in text.splitlines() if line.startswith("ExecStart=")]
    assert command.split()[1] in cli.commands
    [seconds] = [line for line in text.splitlines() if line.startswith("TimeoutStopSec=")]
    assert int(seconds.partition("=")[2]) >= STOPS_WITHIN[command.split()[1]]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_kubernetes_knows_every_field(path: Path) -> None:
    """
    Strictly: a misspelt field would be left out in silence.
    """
    for document in documents(path):
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_a_container_may_write_nothing_and_become_nobody(path: Path) -> None:
    """
    And runs a command there is.
    """
    for container in [one for document in documents(path) for one in containers(document)]:
        assert container["args"][0] in cli.commands
        allowed = container["securityContext"]
        assert allowed["readOnlyRootFilesystem"] is True
        assert allowed["allowPrivilegeEscalation"] is False
        assert allowed["capabilities"] == {"drop": ["ALL"]}
        assert "memory" in container["resources"]["limits"]


def test_a_worker_is_asked_how_it_is_where_it_answers() -> None:
    """
    Whether it lives and whether it is ready are two questions: a database that is away is no
    reason to start a worker again.
    """
    [deployment] = documents(DEPLOY / "kubernetes" / "worker.yaml")
    [worker] = containers(deployment)
    settings = {one["name"]: one["value"] for one in worker["env"]}
    [port] = worker["ports"]
    assert settings == {"HLF_METRICS_HOST": "0.0.0.0", "HLF_METRICS_PORT": "9464"}  # noqa: S104
    assert str(port["containerPort"]) == settings["HLF_METRICS_PORT"]
    for probe, path in (("livenessProbe", "/live"), ("readinessProbe", "/ready")):
        assert worker[probe]["httpGet"] == {"path": path, "port": port["name"]}
    annotations = deployment["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == settings["HLF_METRICS_PORT"]


def test_the_night_runs_once_and_in_its_zone() -> None:
    """
    What a person has to see to is not tried again.
    """
    [night] = documents(DEPLOY / "kubernetes" / "nightly.yaml")
    spec = night["spec"]
    assert (spec["concurrencyPolicy"], spec["timeZone"]) == ("Forbid", "Europe/Oslo")
    [rule] = spec["jobTemplate"]["spec"]["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"]["values"] == [2, 3, 78]


def test_the_image_holds_what_is_locked_and_runs_as_nobody() -> None:
    """
    Secrets come as files when it runs, never when it is built.
    """
    lines = (DEPLOY / "Dockerfile").read_text(encoding="utf-8").splitlines()
    statements = [line for line in lines if line and not line.lstrip().startswith("#")]
    assert "USER 10001:10001" in statements
    assert statements.index("USER 10001:10001") > max(
        number for number, line in enumerate(statements) if line.startswith("FROM")
    )
    installs = [line for line in statements if "pip install" in line]
    assert all("--require-hashes" in line or "--no-deps" in line for line in installs)
    for words in ("SECRET", "PASSWORD", "DATABASE_URL"):
        assert not any(words in line for line in statements)
    copied = [
        line.split()[1] for line in statements if line.startswith("COPY") and "--" not in line
    ]
    assert all((ROOT / name).exists() for name in copied)


def test_compose_gives_its_services_nothing_to_write_on() -> None:
    """
    The database apart; secrets are files.
    """
    [document] = documents(DEPLOY / "compose.yaml")
    services = {name: one for name, one in document["services"].items() if name != "database"}
    assert services.keys() >= {"migrate", "worker"}
    for service in services.values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert not any("PASSWORD" in name for name in service["environment"])
