"""
What people see and do, broken on purpose; see `mutants`.
"""

from __future__ import annotations

from tests.chaos.mutants_model import Change, Mutant

ACCESS = "worker/coordinator/access.py"
ACTIONS = "worker/coordinator/actions.py"
CALLERS = "worker/coordinator/callers.py"
GUARD = "worker/coordinator/guard.py"
RETRY = "worker/coordinator/retry.py"
SERVING = "worker/coordinator/serving.py"

ACTING = "tests/integration/test_actions.py"

MUTANTS_OF_PEOPLE = (
    Mutant(
        name="people-are-the-owner",
        what="People's transactions keep the role of the tables' owner, who sees everybody.",
        invariant="S21",
        caught_by="tests/integration/test_callers.py"
        "::test_the_rows_of_another_organisation_are_not_there",
        changes=(
            Change(
                CALLERS,
                '"role": DATABASE_ROLE,\n            "claims"',
                '"role": "none",\n            "claims"',
            ),
        ),
    ),
    Mutant(
        name="looking-may-write",
        what="Pages and API read in transactions in which anything can be written.",
        invariant="S23",
        caught_by="tests/integration/test_callers.py::test_reading_is_read_only",
        changes=(Change(CALLERS, '"off" if writing else "on"', '"off" if writing else "off"'),),
    ),
    Mutant(
        name="a-viewer-is-not-refused",
        what="Whoever may only look gets an answer as if something had been done.",
        invariant="S17",
        caught_by=f"{ACTING}::test_a_viewer_is_refused_and_that_is_written_down",
        changes=(Change(CALLERS, 'if caller.role != "coordinator":', "if not caller.role:"),),
    ),
    Mutant(
        name="pressed-after-success-sends-again",
        what="A retry that waits while the worker delivers sends the same once more.",
        invariant="S17",
        caught_by=f"{ACTING}::test_pressing_while_the_worker_succeeds_sends_nothing_more",
        changes=(Change(RETRY, "        failing=True,\n", "        failing=False,\n"),),
    ),
    Mutant(
        name="done-and-not-written-down",
        what="A renewal leaves no row about who did it.",
        invariant="S17",
        caught_by=f"{ACTING}::test_a_renewal_says_whether_the_portal_follows",
        changes=(
            Change(ACTIONS, '            await audit.add(connection, "renew", [deed])\n', ""),
        ),
    ),
    Mutant(
        name="a-key-that-is-forgotten",
        what="A request that comes again with its key renews again.",
        invariant="S17",
        caught_by=f"{ACTING}::test_a_request_that_comes_again_renews_once",
        changes=(
            Change(
                ACTIONS,
                "            if key is not None:\n                await idempotency.remember",
                "            if key == request:\n                await idempotency.remember",
            ),
        ),
    ),
    Mutant(
        name="another-sites-form-is-ours",
        what="A page of another site can press a coordinator's buttons.",
        invariant="S17",
        caught_by="tests/integration/test_guard.py::test_another_sites_form_changes_nothing",
        changes=(
            Change(
                GUARD,
                'return site in {"same-origin", "none"}',
                'return site in {"same-origin", "none", "cross-site"}',
            ),
        ),
    ),
    Mutant(
        name="any-nonce-will-do",
        what="An ID token of another login logs its person in here.",
        invariant="S21",
        caught_by="tests/integration/test_access.py"
        "::test_an_id_token_with_something_wrong_logs_nobody_in",
        changes=(
            Change(ACCESS, "if not isinstance(nonce, str) or not", "if nonce is True and not"),
        ),
    ),
    Mutant(
        name="open-to-everybody-without-a-login",
        what="Without a login the dashboard listens wherever it is told to.",
        invariant="S21",
        caught_by="tests/integration/test_serving.py"
        "::test_without_a_login_it_listens_to_this_machine_alone",
        changes=(
            Change(SERVING, "    if not login and not is_loopback(host):", "    if not host:"),
        ),
    ),
)
