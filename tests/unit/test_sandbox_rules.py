"""
The sandbox's rules without a socket: tables, addresses, limits, faults and history.
"""

from __future__ import annotations

from typing import Any

import pytest

from worker.dynamics.sandbox import (
    Entry,
    Fault,
    Late,
    Limits,
    Registration,
    Sandbox,
    SandboxError,
    Settings,
    Status,
    applied,
    fingerprint,
    overlaps,
    peak,
    reads,
    values,
)
from worker.dynamics.sandbox.faults import Faults, read_fault
from worker.dynamics.sandbox.limits import Limiter
from worker.dynamics.sandbox.messages import Request
from worker.dynamics.sandbox.rows import Catalogue, EntitySet, parse_address
from worker.dynamics.sandbox.rules import OPERATION_RULES, REQUEST_RULES, Rule
from worker.dynamics.sandbox.token_rules import TOKEN_RULES

ROW = "0a000000-0000-4000-8000-00000000000a"


@pytest.mark.parametrize("rule", REQUEST_RULES + OPERATION_RULES, ids=lambda rule: rule.name)
def test_every_rule_says_where_it_is_from(rule: Rule) -> None:
    """
    A rule is documented, or is marked as strict, assumed or the sandbox's own.
    """
    assert "Microsoft Learn" in rule.source
    assert 400 <= rule.status < 500
    assert not rule.code or rule.code.startswith("0x8")


def test_rules_have_names_of_their_own() -> None:
    """
    A name tells which rule was broken.
    """
    names = [rule.name for rule in (*REQUEST_RULES, *OPERATION_RULES)]
    token_names = [rule.name for rule in TOKEN_RULES]

    assert len(set(names)) == len(names)
    assert len(set(token_names)) == len(token_names)
    assert all(rule.source for rule in TOKEN_RULES)


@pytest.mark.parametrize(
    ("path", "segment", "key"),
    [
        (f"/api/data/v9.2/contacts({ROW.upper()})", "contacts", ROW),
        ("/api/data/v9.0/contacts", "contacts", None),
        ("/api/data/v9.2/contacts(hlf_no='O''Neil')", "contacts", "hlf_no=O'Neil"),
        ("/api/data/v9.2/contacts(hlf_no=%27a%2Fb%27)", "contacts", "hlf_no=a/b"),
        ("/api/data/v9.2/contacts(hlf_no='a)(b,c=d')", "contacts", "hlf_no=a)(b,c=d"),
        ("/api/data/v9.2/contacts(a='1',b=2)", "contacts", "a=1,b=2"),
        (f"/api/data/v9.2/contacts(a='{ROW.upper()}')", "contacts", f"a={ROW}"),
        ("/api/data/v9.2/contacts(nonsense)", "contacts", "nonsense"),
        ("/api/data/v9.2/contacts(a=1,)", "contacts", "a=1,"),
        ("/api/data/v9.2/contacts()", "contacts", ""),
        ("/api/data/v9.2/$batch", "$batch", None),
        (f"/api/data/v9.2/contacts({ROW})/name", f"contacts({ROW})/name", None),
    ],
)
def test_an_address_is_read(path: str, segment: str, key: str | None) -> None:
    """
    Quotes, percent signs and the case of GUIDs do not make two keys of one.
    """
    address = parse_address(path)

    assert address is not None
    assert (address.segment, address.canonical_key) == (segment, key)


@pytest.mark.parametrize(
    "path", ["/", "/api/data/v8.2/contacts", "/api/data/v9.2/", "/api/data/v9.2"]
)
def test_other_paths_are_no_address(path: str) -> None:
    """
    Only what is below v9.x of the Web API is one.
    """
    assert parse_address(path) is None


def test_a_key_may_be_defined_after_the_rows() -> None:
    """
    Rows that are there already are found by it.
    """
    table = EntitySet(name="contacts")
    table.replace({ROW: {"hlf_no": "7"}, ROW.replace("a", "b"): {}})
    table.define_key("hlf_no")

    assert table.find("hlf_no", "7") == ROW
    assert table.find("hlf_no", "8") is None


@pytest.mark.parametrize(
    ("column", "value", "fits"),
    [
        ("flag", True, True),
        ("flag", 1, False),
        ("name", "x", True),
        ("name", False, False),
        ("size", 1.5, True),
        ("size", True, False),
        ("size", None, False),
    ],
)
def test_a_value_has_the_type_of_its_column(
    column: str,
    value: object,
    fits: bool,  # noqa: FBT001
) -> None:
    """
    A boolean is no number, and a number no boolean.
    """
    table = EntitySet(name="contacts")
    table.replace({ROW: {"flag": True, "name": "x", "size": 1}})

    assert table.accepts(column, value) is fits


def test_bad_rows_change_nothing() -> None:
    """
    One wrong row among good ones leaves everything as it was.
    """
    catalogue = Catalogue()
    catalogue.replace({"contacts": {ROW: {"flag": True}}})

    with pytest.raises(SandboxError, match="no GUID"):
        catalogue.replace({"contacts": {ROW: {"flag": False}, "7": {}}})
    assert catalogue.snapshot() == {"contacts": {ROW: {"flag": True}}}


def test_names_in_messages_follow_the_entity_set() -> None:
    """
    Logical and schema name, for a standard and for a custom table.
    """
    names = [
        (table.logical_name, table.privilege_name)
        for table in (EntitySet(name="contacts"), EntitySet(name="hlf_mentors"))
    ]

    assert names == [("contact", "Contact"), ("hlf_mentor", "hlf_mentor")]


@pytest.mark.parametrize(
    ("arrivals", "now", "retry_after"),
    [
        ([0.0], 1.0, None),
        ([0.0, 1.0], 2.0, 299),
        ([0.0, 1.0, 2.0], 3.0, 299),
        ([0.0, 1.0], 300.0, None),
        ([0.0, 299.0], 299.5, 300),
    ],
)
def test_the_window_of_requests(arrivals: list[float], now: float, retry_after: int | None) -> None:
    """
    The wait lasts until so many have left the window that there is room for one more; the
    refused one counts.
    """
    limiter, limits = Limiter(), Limits(requests=2)
    for arrival in arrivals:
        limiter.enter("user", limits, now=arrival)
        limiter.leave("user", limits, started_at=arrival, now=arrival)

    excess = limiter.enter("user", limits, now=now)

    assert (excess.retry_after if excess else None) == retry_after


def test_refused_requests_lengthen_the_wait() -> None:
    """
    Pushing on makes it worse, as documented.
    """
    limiter, limits = Limiter(), Limits(requests=1)
    waits = []
    for now in (0.0, 1.0, 2.0, 3.0):
        excess = limiter.enter("user", limits, now=now)
        limiter.leave("user", limits, started_at=now, now=now)
        waits.append(now + excess.retry_after if excess else None)

    assert waits == [None, 301.0, 302.0, 303.0]


def test_the_sum_of_execution_times() -> None:
    """
    Enough of it has to leave the window; what is over does not come back.
    """
    limiter, limits = Limiter(), Limits(execution_seconds=10)
    for started_at in (0.0, 20.0, 40.0):
        limiter.enter("user", limits, now=started_at)
        limiter.leave("user", limits, started_at=started_at, now=started_at + 4)

    excess = limiter.enter("user", limits, now=50.0)
    limiter.leave("user", limits, started_at=50.0, now=50.0)

    assert excess is not None
    assert (excess.code, excess.retry_after) == ("0x80072321", 254)
    assert limiter.enter("user", limits, now=304.0) is None


def test_lifted_limits_limit_nothing() -> None:
    """
    For measuring a client, everything may be allowed.
    """
    limiter, limits = Limiter(), Limits.none()

    answers = [limiter.enter("user", limits, now=0.0) for _ in range(100_000)]

    assert not any(answers)


@pytest.mark.parametrize(
    ("fields", "names", "fits"),
    [
        ({}, {"kind": "data"}, True),
        ({}, {"kind": "other"}, True),
        ({"target": "data"}, {"kind": "token"}, False),
        ({"target": "data"}, {"kind": "batch"}, True),
        ({"target": "token"}, {"kind": "discovery"}, True),
        ({"key": "A"}, {"kind": "data", "key": "a"}, True),
        ({"key": "a"}, {"kind": "data", "key": "no=a"}, True),
        ({"key": "no=a"}, {"kind": "data", "key": "no=a"}, True),
        ({"key": "a"}, {"kind": "data", "key": "no=b", "row": "a"}, True),
        ({"key": "a"}, {"kind": "data"}, False),
        ({"method": "patch"}, {"kind": "data", "method": "PATCH"}, True),
        ({"method": "POST"}, {"kind": "data", "method": "PATCH"}, False),
    ],
)
def test_where_a_fault_applies(
    fields: dict[str, Any],
    names: dict[str, Any],
    fits: bool,  # noqa: FBT001
) -> None:
    """
    What is not said does not matter; what is said must hold.
    """
    fault = read_fault({"what": "hang", **fields})

    assert fault.fits(Entry(**names)) is fits


def test_faults_are_taken_in_the_order_they_were_given() -> None:
    """
    The first that fits, until it is used up.
    """
    faults = Faults()
    faults.add(Status(status=500, key="other", times=None))
    faults.add(Status(status=501))
    faults.add(Status(status=502, times=2))
    entry = Entry(kind="data")

    taken = [faults.take(entry) for _ in range(4)]

    assert [getattr(fault, "status", None) for fault in taken] == [501, 502, 502, None]
    assert [(each.id, each.used, each.left) for each in faults.standing] == [(1, 0, None)]


@pytest.mark.parametrize("what", [kind.model_fields["what"].default for kind in Fault.__args__])
def test_every_fault_survives_the_way_through_json(what: str) -> None:
    """
    What the control endpoint shows can be ordered again.
    """
    needed: dict[str, Any] = {"status": 503} if what == "status" else {}
    needed |= {"seconds": 1} if what in {"slow", "drip", "late"} else {}
    needed |= {"location": "http://127.0.0.1/"} if what == "redirect" else {}

    fault = read_fault({"what": what, **needed})

    assert read_fault(fault.model_dump()) == fault


@pytest.mark.parametrize(
    "fields",
    [
        {"what": "reset_before", "applied": True},
        {"what": "reset_after", "applied": False},
        {"what": "late", "seconds": 1, "applied": False},
        {"what": "late", "seconds": 0},
        {"what": "expire_token", "target": "token"},
        {"what": "redirect", "location": "http://a\r\nX: y"},
        {"what": "redirect", "status": 300, "location": "/"},
        {"what": "status", "status": 600},
        {"what": "status", "status": 503, "retry_after": "7\r\nX: y"},
        {},
    ],
)
def test_an_impossible_fault_is_refused(fields: dict[str, Any]) -> None:
    """
    An order that contradicts itself is a mistake of whoever gave it.
    """
    with pytest.raises(SandboxError, match=r"^Wrong fault.*\.$"):
        read_fault(fields)


def test_changing_one_limit_leaves_the_others() -> None:
    """
    A change goes one level down.
    """
    before = Settings(token_seconds=60, limits=Limits(concurrency=7))

    changed = before.changed({"limits": {"requests": None}})

    assert changed == Settings(token_seconds=60, limits=Limits(concurrency=7, requests=None))


def test_a_registration_does_not_show_its_secret() -> None:
    """
    Not even in a traceback.
    """
    text = repr(Registration(tenant="t", client_id="c", client_secret="hush"))

    assert "hush" not in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"latency_seconds": -1}, "Wrong settings at 'latency_seconds'"),
        ({"typo": 1}, "Wrong settings at 'typo'"),
        ({"registrations": [{"tenant": "t"}]}, "Wrong registration at 'client_id'"),
        ({"rows": {"contacts": {"1": {}}}}, "Wrong rows at 'contacts'"),
        ({"rows": {"a b": {}}}, "'a b' is no name"),
        ({"rows": {"contacts": {ROW: {"å": 1}}}}, "'å' is no name"),
        ({"keys": ["a-b"]}, "'a-b' is no name"),
    ],
)
def test_a_wrong_argument_is_one_sentence(arguments: dict[str, Any], words: str) -> None:
    """
    The constructor complains as the control endpoints do.
    """
    with pytest.raises(SandboxError, match=words):
        Sandbox(**arguments)


def test_a_fingerprint_tells_apart_and_gives_nothing_away() -> None:
    """
    Twelve hexadecimal digits, always the same for the same secret.
    """
    assert fingerprint("a") == fingerprint("a") != fingerprint("b")
    assert len(fingerprint("a")) == 12


# History


def entry(start: float, end: float | None, **fields: Any) -> Entry:  # noqa: ANN401
    """
    A data request for one row, under way from `start` to `end`.
    """
    usual: dict[str, Any] = {
        "kind": "data",
        "entity_set": "contacts",
        "row": ROW,
        "exchange": int(start * 10),
    }
    return Entry(started_at=start, finished_at=end, **(usual | fields))


@pytest.mark.parametrize(
    ("others", "pairs"),
    [
        ([entry(2, 3)], 0),
        ([entry(1.5, 3)], 1),
        ([entry(1.2, 1.3), entry(1.5, 1.6)], 2),
        ([entry(1.2, 3), entry(1.5, 4)], 3),
        ([entry(1.5, 3, row="another")], 0),
        ([entry(1.5, 3, entity_set="accounts")], 0),
        ([entry(1.5, 3, kind="token")], 0),
        ([entry(1.5, 3, row=None, key=ROW)], 1),
        ([entry(1.5, 3, exchange=10)], 0),
        ([entry(0.5, None)], 1),
    ],
)
def test_overlaps_are_pairs_for_one_row(others: list[Entry], pairs: int) -> None:
    """
    One that begins when another ends does not overlap it; one without end overlaps all.
    """
    requests = [entry(1, 2, exchange=10), *others]

    assert len(overlaps(requests)) == len(overlaps(requests[::-1])) == pairs


def test_values_follow_the_order_in_which_changes_took_effect() -> None:
    """
    Not the order in which requests were sent or ended.
    """
    entries = [
        entry(1, 2, applied=True, applied_at=9.0, change={"hlf_portalvisible": False}),
        entry(3, 4, applied=True, applied_at=3.5, change={"hlf_portalvisible": True}),
        entry(5, 6, applied=False),
        entry(7, 8, applied=True, applied_at=7.5, change={"other": 1}),
    ]

    assert values(entries) == {ROW: [True, False]}
    assert values(entries, column="other") == {ROW: [1]}
    assert len(applied(entries)) == 3


def test_reads_and_peak() -> None:
    """
    Reads are found by kind, and a batch counts as one request.
    """
    batch = [entry(1, 5, exchange=7, kind="batch"), entry(1, 5, exchange=7), entry(5, 6)]
    read = entry(2, 3, kind="read")

    assert reads([*batch, read]) == [read]
    assert peak([*batch, read]) == 2
    assert peak([]) == 0


def test_an_entry_survives_the_way_through_json() -> None:
    """
    Entries that were fetched can be asked the same questions.
    """
    original = entry(1, 2, body={"a": [1]}, fault=Late(seconds=1).what)

    assert Entry.from_json(original.to_json()) == original


def test_the_host_of_a_request_is_known_in_lower_case() -> None:
    """
    As audiences are compared.
    """
    request = Request(method="GET", target="/a?b=1&b=2", headers={"host": "LocalHost:1"})

    assert (request.base_url, request.path, request.query) == (
        "http://localhost:1",
        "/a",
        {"b": "2"},
    )
