"""
Alerts and the board: they ask for what is told, and each leads to what is to be done.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from typing import Any
from uuid import UUID

import pytest
import yaml
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import ROOT
from tests.unit.test_monitoring import FIGURES
from worker.monitoring.metrics import JOBS, Metrics
from worker.monitoring.telling import FiguresCollector

PROMETHEUS = ROOT / "deploy" / "prometheus"
BOARD = ROOT / "deploy" / "grafana" / "board.json"
RUNBOOK = ROOT / "docs" / "runbook.md"
HLF = UUID("00000000-0000-4000-8000-000000000001")

PROMTOOL = shutil.which("promtool") or ""
promtool = pytest.mark.skipif(not PROMTOOL, reason="there is no promtool on this machine")


def rules() -> list[dict[str, Any]]:
    """
    All alerts.
    """
    document = yaml.safe_load((PROMETHEUS / "alerts.yaml").read_text(encoding="utf-8"))
    return [rule for group in document["groups"] for rule in group["rules"]]


def expressions_of_the_board() -> list[str]:
    """
    What its panels ask for.
    """
    panels = json.loads(BOARD.read_text(encoding="utf-8"))["panels"]
    return [target["expr"] for panel in panels for target in panel["targets"]]


def told() -> dict[str, set[str]]:
    """
    The names of all that a worker tells, with their labels.
    """
    metrics = Metrics(organization_id=HLF, version="1.2.3", revision="0005")
    for name in ("dynamics", "reminders"):
        metrics.of(name)
    for job in JOBS:
        metrics.succeeded(job, at=0)
    names: dict[str, set[str]] = {}
    figures = FiguresCollector(FIGURES, ["dynamics", "reminders"], organization_id=HLF)
    for collector in (metrics.registry, figures):
        for family in text_string_to_metric_families(generate_latest(collector).decode()):
            for sample in family.samples:
                names.setdefault(sample.name, set()).update(sample.labels)
    return names


TOLD = told()
SELECTOR = re.compile(r"(hlf_sync_\w+)(?:\{([^}]*)\})?")


@pytest.mark.parametrize(
    "expression",
    [*(rule["expr"] for rule in rules()), *expressions_of_the_board()],
)
def test_only_what_is_told_is_asked_for(expression: str) -> None:
    """
    A name or a label that nobody exports would be silence, and silence looks like health.
    """
    selectors = SELECTOR.findall(expression)
    assert selectors
    for name, matchers in selectors:
        assert name in TOLD
        assert set(re.findall(r"(\w+)\s*(?:=|!=|=~|!~)\s*\"", matchers)) <= TOLD[name]


def test_every_metric_of_ours_has_a_name_and_a_unit_as_prometheus_wants_them() -> None:
    """
    And whose it is.
    """
    for name, labels in TOLD.items():
        if name.startswith("process_"):
            continue
        assert name.startswith("hlf_sync_")
        assert not re.search(r"_(ms|milliseconds|minutes|hours)\b", name)
        assert "organization_id" in labels
        # Prometheus has these for itself, and would rename ours.
        assert not labels & {"job", "instance"}


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_an_alert_says_what_it_means_and_what_to_do(rule: dict[str, Any]) -> None:
    """
    Its place in the runbook is there, whoever is woken.
    """
    assert rule["for"]
    assert rule["labels"]["severity"] in {"warning", "critical"}
    assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}
    page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    assert ROOT / page == RUNBOOK
    assert anchor in anchors()


def anchors() -> set[str]:
    """
    Of the runbook's headings, as a forge makes them.
    """
    headings = re.findall(r"^#+ (.+)$", RUNBOOK.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@promtool
@pytest.mark.parametrize(("verb", "file"), [("check", "alerts.yaml"), ("test", "alerts.test.yaml")])
def test_prometheus_own_tool_agrees(verb: str, file: str) -> None:
    """
    On the syntax, and on when some of them fire.
    """
    done = subprocess.run(
        [PROMTOOL, verb, "rules", file],
        cwd=PROMETHEUS,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
