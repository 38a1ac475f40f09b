"""
The service, broken on purpose; see `mutants`.
"""

from __future__ import annotations

from tests.chaos.mutants_model import Change, Mutant

ALERTS = "worker/coordinator/alerts.py"
CLIENT = "worker/dynamics/client.py"
CONFIRMATIONS = "worker/certifications/confirmations.py"
DATABASE = "worker/database.py"
DYNAMICS_ERRORS = "worker/dynamics/errors.py"
EDGE = "worker/dynamics/edge.py"
EDGE_ERRORS = "worker/dynamics/edge_errors.py"
EXCHANGE = "worker/dynamics/exchange.py"
HTTP_CLIENT = "worker/http_client.py"
NIGHTLY = "worker/nightly.py"
PORTAL = "worker/portal.py"
PROCESS = "worker/process.py"
RECONCILIATION = "worker/certifications/reconciliation.py"
REMINDERS = "worker/certifications/reminders.py"
REMINDING = "worker/reminding.py"
SERVICE = "worker/dynamics/service.py"
TOKEN = "worker/dynamics/token.py"  # noqa: S105 (a file)
TRANSITIONS = "worker/certifications/transitions.py"
VISIBILITY = "worker/certifications/visibility.py"
WEBHOOK = "worker/webhook.py"

ASKING = "tests/integration/test_dynamics_client.py"
CONFIRMING = "tests/integration/test_confirmations.py"
CONNECTING = "tests/integration/test_database.py"
COORDINATING = "tests/integration/test_coordinator.py"
CHANGING = "tests/integration/test_transitions.py"
RECONCILING = "tests/integration/test_reconciliation.py"
WAITING = "tests/integration/test_waiting.py"

_CERTIFICATIONS = (
    Mutant(
        name="announced-in-a-second-transaction",
        what="An expiry is committed first, and its event enqueued in the next transaction.",
        invariant="S1",
        caught_by=f"{CHANGING}::test_an_expiry_that_fails_anywhere_leaves_everything_as_it_was",
        changes=(
            Change(
                TRANSITIONS,
                "                done = await self._follow_up("
                "connection, certification_id, mentor_id, today)\n"
                "        except _AlreadyExpiredError:\n            return None\n",
                "        except _AlreadyExpiredError:\n            return None\n"
                "        async with transaction(self._engine) as connection:\n"
                "            done = await self._follow_up("
                "connection, certification_id, mentor_id, today)\n",
            ),
        ),
    ),
    Mutant(
        name="version-drawn-after-reading",
        what="Certifications are read first and the version drawn then, so the last may be stale.",
        invariant="S12",
        caught_by="tests/chaos/test_held.py"
        "::test_the_later_of_two_transitions_decides_on_what_both_changed",
        changes=(
            Change(
                TRANSITIONS,
                "    if not await visibility.draw_versions(connection, [mentor_id]):",
                "    if False:",
            ),
            Change(
                VISIBILITY,
                "  FROM (SELECT mentor_id, bool_and(status = 'valid' AND expires_on >= :today)"
                " AS visible\n"
                "          FROM public.certifications\n"
                "         WHERE mentor_id = ANY (:mentor_ids)\n"
                "         GROUP BY mentor_id) AS decision\n",
                "  FROM unnest(CAST(:read_ids AS uuid[]), CAST(:read AS boolean[]))"
                " AS decision (mentor_id, visible)\n",
            ),
            Change(
                VISIBILITY,
                "    rows = await connection.execute("
                'DECIDE, {"mentor_ids": list(mentor_ids), "today": today})\n',
                "    read = (\n"
                "        await connection.execute(\n"
                "            text(\n"
                "                \"SELECT mentor_id, bool_and(status = 'valid'"
                ' AND expires_on >= :today)"\n'
                '                " FROM public.certifications"\n'
                '                " WHERE mentor_id = ANY (:mentor_ids) GROUP BY mentor_id"\n'
                "            ),\n"
                '            {"mentor_ids": list(mentor_ids), "today": today},\n'
                "        )\n"
                "    ).all()\n"
                "    await draw_versions(connection, mentor_ids)\n"
                "    rows = await connection.execute(\n"
                "        DECIDE,\n"
                '        {"read_ids": [row[0] for row in read],'
                ' "read": [row[1] for row in read]},\n'
                "    )\n",
            ),
        ),
    ),
    Mutant(
        name="mentors-locked-in-any-order",
        what="Two transitions of several mentors can wait for each other in a circle.",
        invariant="L4",
        caught_by=f"{CHANGING}::test_mentors_of_a_page_are_locked_in_ascending_order",
        changes=(
            Change(
                VISIBILITY,
                " WHERE id = ANY (:mentor_ids)\n ORDER BY id\n",
                " WHERE id = ANY (:mentor_ids)\n ORDER BY id DESC\n",
            ),
        ),
    ),
    Mutant(
        name="showing-goes-first",
        what="Showing a mentor has priority over hiding one.",
        invariant="S14",
        caught_by=f"{CHANGING}::test_hiding_goes_before_showing",
        changes=(Change(VISIBILITY, "{False: 0, True: 1}", "{False: 1, True: 0}"),),
    ),
    Mutant(
        name="expired-twice",
        what="A certification that has expired already expires once more.",
        invariant="S18",
        caught_by=f"{CHANGING}::test_a_second_expiry_changes_nothing_and_draws_no_version",
        changes=(
            Change(
                TRANSITIONS,
                "   AND status = 'valid'\n   AND expires_on < :today\n",
                "   AND expires_on < :today\n",
            ),
        ),
    ),
    Mutant(
        name="the-night-run-wakes-nobody",
        what="What expires at night is hidden only at the next poll.",
        invariant="L1",
        caught_by="tests/chaos/test_held.py::test_the_night_run_wakes_the_worker_after_each_page",
        changes=(
            Change(
                TRANSITIONS,
                "            self._notify()\n            yield",
                "            yield",
            ),
        ),
    ),
    Mutant(
        name="todays-date-in-greenwich",
        what="Whether the last valid day is over is judged in UTC, not in the organisation's zone.",
        invariant="S19",
        caught_by=f"{CHANGING}::test_today_is_the_date_on_the_wall_of_the_organisation",
        changes=(
            Change(
                TRANSITIONS, "AT TIME ZONE :timezone", "AT TIME ZONE coalesce('UTC', :timezone)"
            ),
        ),
    ),
    Mutant(
        name="announced-for-another-organisation",
        what="A mentor of another organisation gets an event as well.",
        invariant="S21",
        caught_by=f"{CHANGING}::test_another_organisations_mentor_gets_everything_but_an_event",
        changes=(
            Change(VISIBILITY, "if one.organization_id == organization_id]", "if organization_id]"),
        ),
    ),
    Mutant(
        name="asserted-twice",
        what="Trying again adds a send although one is on its way.",
        invariant="S17",
        caught_by=f"{COORDINATING}::test_two_coordinators_at_once_cause_one_send",
        changes=(
            Change(
                VISIBILITY,
                "   AND CAST(mentor_id AS text) <> ALL (ARRAY (\n"
                "           SELECT live.key FROM outbox.events AS live\n"
                "            WHERE live.destination = 'dynamics' AND live.key = ANY (:keys)))\n",
                "",
            ),
        ),
    ),
    Mutant(
        name="retry-replays-what-failed",
        what="Trying again sends the state that failed, not the one that is wanted now.",
        invariant="S12",
        caught_by=f"{COORDINATING}::test_a_retry_sends_what_is_to_be_shown_now",
        changes=(
            Change(
                VISIBILITY,
                "RETURNING mentor_id, organization_id, visible, version\n",
                "RETURNING mentor_id, organization_id, version,\n"
                "          coalesce((SELECT failure.visible\n"
                "                      FROM public.dynamics_sync_failures AS failure\n"
                "                     WHERE failure.mentor_id = desired.mentor_id\n"
                "                       AND failure.resolved_at IS NULL), visible) AS visible\n",
            ),
        ),
    ),
)

_NIGHT = (
    Mutant(
        name="a-lost-row-begins-at-one",
        what="A row that somebody deleted is made again with a version that is long past.",
        invariant="S12",
        caught_by=f"{RECONCILING}::test_a_lost_row_is_made_again_above_every_version_that_is_known",
        changes=(
            Change(
                VISIBILITY,
                "SELECT mentor.id, mentor.organization_id, false, {_NEXT_VERSION}",
                "SELECT mentor.id, mentor.organization_id, false, 1",
            ),
        ),
    ),
    Mutant(
        name="said-again-below-what-was-confirmed",
        what="Whatever is not confirmed is said again with a version that never will be.",
        invariant="S12",
        caught_by=f"{RECONCILING}::test_whatever_is_not_confirmed_as_it_is_wanted_is_said_again",
        changes=(
            Change(
                VISIBILITY,
                "greatest(desired.version + 1, {_NEXT_VERSION})",
                "desired.version + 1",
            ),
        ),
    ),
    Mutant(
        name="reconciled-without-a-second-look",
        what="What was found astray is not looked at again under the lock.",
        invariant="S18",
        caught_by=f"{RECONCILING}::test_several_at_once_are_as_good_as_one",
        changes=(
            Change(
                RECONCILIATION,
                "        return rows.all()\n",
                "        seen = rows.all()\n"
                "        missed = {*mentor_ids} - {row.mentor_id for row in seen}\n"
                "        again = await connection.execute(\n"
                "            text(\n"
                '                "SELECT id AS mentor_id, true AS visibility, false AS pauses"\n'
                '                " FROM public.mentors WHERE id = ANY (:missed)"\n'
                "            ),\n"
                '            {"missed": list(missed)},\n'
                "        )\n"
                "        return [*seen, *again.all()]\n",
            ),
        ),
    ),
    Mutant(
        name="one-part-ends-the-night",
        what="What one part of the night meets keeps all the later ones from their work.",
        invariant="S18",
        caught_by="tests/acceptance/test_nightly.py::test_a_part_that_breaks_stops_no_other",
        changes=(
            Change(
                NIGHTLY,
                "            _unexpected(outcome, error)\n        else:",
                "            raise\n        else:",
            ),
        ),
    ),
)

_REMINDERS = (
    Mutant(
        name="reminder-allowed-twice",
        what="The upsert returns a row also to whoever comes second.",
        invariant="S18",
        caught_by="tests/integration/test_reminders.py"
        "::test_eight_runs_at_once_enqueue_each_reminder_once",
        changes=(
            Change(
                REMINDERS,
                "     WHERE noted.expires_on IS DISTINCT FROM excluded.expires_on\n",
                "",
            ),
        ),
    ),
    Mutant(
        name="reminder-not-withdrawn",
        what="What is not wanted any more is sent all the same.",
        invariant="S18",
        caught_by="tests/integration/test_reminding.py"
        "::test_what_is_not_wanted_any_more_is_withdrawn",
        changes=(Change(REMINDING, "        if not event.found:\n", "        if False:\n"),),
    ),
    Mutant(
        name="reminder-under-a-new-id",
        what="Each attempt has an id of its own, so that the receiver cannot drop a repeat.",
        invariant="S18",
        caught_by="tests/integration/test_reminding.py"
        "::test_what_fails_for_a_while_is_tried_again_under_the_same_id",
        changes=(
            Change(
                WEBHOOK,
                '    return uuid5(NAMESPACE_URL, f"reminder:',
                '    return uuid5(UUID(int=id(object())), f"{datetime.now(UTC)}:',
            ),
        ),
    ),
)

_CONFIRMATIONS = (
    Mutant(
        name="confirmed-backwards",
        what="An older version overwrites a newer confirmation.",
        invariant="S15",
        caught_by=f"{CONFIRMING}::test_a_confirmation_only_goes_forward",
        changes=(Change(CONFIRMATIONS, " WHERE confirmed.version <= excluded.version\n", ""),),
    ),
    Mutant(
        name="resolves-failures-of-others",
        what="One mentor's delivery closes the failures of all mentors, of all organisations.",
        invariant="S15",
        caught_by=f"{CONFIRMING}::test_a_delivery_leaves_other_mentors_failures_open",
        changes=(
            Change(
                CONFIRMATIONS,
                " WHERE failure.mentor_id = ANY (ARRAY (SELECT mentor_id FROM delivered))\n"
                "   AND failure.mentor_id = delivered.mentor_id\n",
                " WHERE true\n",
            ),
        ),
    ),
    Mutant(
        name="an-older-delivery-resolves",
        what="A delivery closes the failure of a newer version.",
        invariant="S15",
        caught_by=f"{CONFIRMING}::test_an_older_delivery_resolves_nothing",
        changes=(Change(CONFIRMATIONS, "   AND failure.version <= delivered.version\n", ""),),
    ),
    Mutant(
        name="dies-without-a-failure",
        what="An event dies and no coordinator is told.",
        invariant="S3",
        caught_by=f"{CONFIRMING}::test_a_dead_event_opens_a_failure_that_says_what_a_person_needs",
        changes=(
            Change(
                CONFIRMATIONS,
                '        await connection.execute(FAIL, {"dead": json.dumps(dead)})\n',
                "        pass\n",
            ),
        ),
    ),
    Mutant(
        name="an-older-version-is-good-enough",
        what="Waiting ends as soon as the portal has confirmed any version.",
        invariant="S15",
        caught_by=f"{WAITING}::test_an_older_confirmed_version_does_not_count",
        changes=(
            Change(
                CONFIRMATIONS,
                "SELECT confirmed.version >= :version",
                "SELECT confirmed.version >= 0 OR :version < 0",
            ),
        ),
    ),
    Mutant(
        name="counted-as-confirmed-too-early",
        what="The coordinator sees a mentor in order whose newest version is not confirmed.",
        invariant="S15",
        caught_by=f"{COORDINATING}::test_only_the_newest_version_counts_as_confirmed",
        changes=(
            Change(
                ALERTS,
                "coalesce(confirmation.version >= desired.version",
                "coalesce(confirmation.version > 0",
            ),
        ),
    ),
    Mutant(
        name="a-recovery-forgets-other-pages",
        what="Recovering from an outage re-drives only the first hundred mentors.",
        invariant="S12",
        caught_by=f"{CONFIRMING}::test_a_recovery_goes_page_by_page",
        changes=(
            Change(
                PORTAL,
                "            after = max(found)\n",
                "            after = UUID(int=2**128 - 1)\n",
            ),
        ),
    ),
)

_DATABASE = (
    Mutant(
        name="a-lost-commit-counts-as-failed",
        what="A COMMIT whose answer is lost is taken for one that did not happen.",
        invariant="S1",
        caught_by=f"{CONNECTING}::test_a_lost_answer_to_a_commit_that_happened_is_no_error",
        changes=(
            Change(
                DATABASE,
                "        else:\n            return\n",
                "        else:\n            return\n    raise lost\n",
            ),
        ),
    ),
    Mutant(
        name="a-lost-commit-counts-as-done",
        what="A COMMIT that never arrived is taken for one that happened.",
        invariant="S1",
        caught_by=f"{CONNECTING}::test_a_commit_that_never_arrived_is_an_error_and_changed_nothing",
        changes=(Change(DATABASE, "        raise lost\n", "        return\n"),),
    ),
    Mutant(
        name="stays-with-a-read-only-node",
        what="After a failover the pool keeps handing out the node that became read-only.",
        invariant="L5",
        caught_by=f"{CONNECTING}::test_a_connection_to_a_read_only_node_is_a_dead_connection",
        changes=(Change(DATABASE, "if error.sqlstate in NO_USE:", "if False:"),),
    ),
)

_DYNAMICS = (
    Mutant(
        name="patch-creates-rows",
        what="A PATCH without If-Match creates the record that it does not find.",
        invariant="S16",
        caught_by=f"{ASKING}::test_a_patch_is_exactly_this_request",
        changes=(Change(CLIENT, 'headers["If-Match"] = "*"', "pass"),),
    ),
    Mutant(
        name="a-lost-answer-is-no-doubt",
        what="A request whose answer is lost counts as certainly not applied.",
        invariant="S13",
        caught_by=f"{ASKING}::test_a_lost_answer_is_doubtful",
        changes=(
            Change(
                EXCHANGE,
                "meaning.error(error.name, doubtful=sent)",
                "meaning.error(error.name, doubtful=False)",
            ),
        ),
    ),
    Mutant(
        name="follows-redirects",
        what="A redirect takes the request, and what it carries, to another host.",
        invariant="S21",
        caught_by=f"{ASKING}::test_a_redirect_is_refused_and_nobody_else_is_asked",
        changes=(
            Change(
                HTTP_CLIENT,
                "allow_redirects=False",
                "allow_redirects=True",
            ),
        ),
    ),
    Mutant(
        name="any-success-is-a-success",
        what="An HTML page with status 200 counts as a confirmation.",
        invariant="S15",
        caught_by=f"{ASKING}::test_a_success_that_dynamics_would_not_give_is_no_success",
        changes=(Change(CLIENT, "answer.status == HTTPStatus.NO_CONTENT", "answer.status < 300"),),
    ),
    Mutant(
        name="any-word-of-the-function-is-a-confirmation",
        what="Whatever comes with status 200 from where the Edge Function should be counts.",
        invariant="S15",
        caught_by="tests/integration/test_edge_client.py::test_what_is_no_verdict_is_none",
        changes=(Change(EDGE, 'if verdict.get("outcome") == expected:', "if verdict:"),),
    ),
    Mutant(
        name="a-verdict-without-its-doubt",
        what="What the Edge Function doubts counts as certainly not applied.",
        invariant="S13",
        caught_by="tests/integration/test_edge_client.py::test_a_verdict_is_taken_as_it_is",
        changes=(
            Change(
                EDGE_ERRORS,
                "return KINDS[kind](code, message, doubtful=doubtful)",
                "return KINDS[kind](code, message, doubtful=False)",
            ),
        ),
    ),
    Mutant(
        name="answers-of-a-batch-in-another-order",
        what="What became of one value in a batch is taken for what became of another.",
        invariant="S15",
        caught_by="tests/integration/test_dynamics_batch.py"
        "::test_answers_are_matched_by_their_place",
        changes=(Change(CLIENT, "in answers[: len(changes)]]", "in answers[len(changes) :: -1]]"),),
    ),
    Mutant(
        name="a-batch-without-answers-is-done",
        what="A value of a batch about which nothing was said counts as written.",
        invariant="S15",
        caught_by="tests/integration/test_dynamics_batch.py"
        "::test_what_has_no_readable_answer_is_unknown_and_not_done",
        changes=(Change(CLIENT, "[unknown] * (len(changes)", "[None] * (len(changes)"),),
    ),
    Mutant(
        name="a-refused-batch-gives-mentors-up",
        what="What Dynamics has against a batch as such is held against each mentor in it.",
        invariant="S3",
        caught_by="tests/integration/test_dynamics_batch.py"
        "::test_a_batch_that_is_refused_as_such_gives_nobody_up",
        changes=(
            Change(
                CLIENT,
                "                raise BatchRefusedError(refusal.code)\n",
                "                return [refusal] * len(changes)\n",
            ),
        ),
    ),
    Mutant(
        name="a-missing-record-is-retried",
        what="A 404 for a record counts as something that passes.",
        invariant="S16",
        caught_by="tests/unit/test_dynamics_errors.py"
        "::test_a_404_is_about_the_record_only_where_dataverse_says_so",
        changes=(
            Change(
                DYNAMICS_ERRORS,
                "RECORD_NOT_FOUND = Meaning(\n    kind=PermanentError,",
                "RECORD_NOT_FOUND = Meaning(\n    kind=TransientError,",
            ),
        ),
    ),
    Mutant(
        name="a-403-gives-up-the-mentor",
        what="A missing permission gives up each mentor instead of closing the gate.",
        invariant="S12",
        caught_by="tests/unit/test_dynamics_errors.py"
        "::test_of_a_403_only_the_name_of_the_privilege_is_kept",
        changes=(
            Change(
                DYNAMICS_ERRORS,
                "FORBIDDEN = Meaning(\n    kind=ConfigurationError,",
                "FORBIDDEN = Meaning(\n    kind=PermanentError,",
            ),
        ),
    ),
    Mutant(
        name="sends-for-another-organisation",
        what="The credentials of one organisation are used for a mentor of another.",
        invariant="S21",
        caught_by="tests/unit/test_dynamics_service.py"
        "::test_a_mentor_of_another_organisation_is_skipped",
        changes=(
            Change(
                SERVICE, "link.organization_id != self._organization_id", "not link.organization_id"
            ),
        ),
    ),
    Mutant(
        name="a-token-that-shows-itself",
        what="Whoever prints or logs a token prints its value.",
        invariant="S22",
        caught_by="tests/unit/test_dynamics_token.py::test_a_token_and_its_keeper_do_not_show_their_secrets",
        changes=(Change(TOKEN, "value: str = field(repr=False)", "value: str = field()"),),
    ),
    Mutant(
        name="sends-the-opposite",
        what="The worker's process shows whom it has to hide; commands are not concerned.",
        invariant="S12",
        caught_by="tests/acceptance/test_seed_criteria.py"
        "::test_expiry_reaches_dynamics_as_false_and_a_valid_renewal_as_true",
        changes=(
            Change(
                PORTAL,
                '            visible=event.payload["visible"],',
                '            visible=not event.payload["visible"],',
            ),
        ),
    ),
    Mutant(
        name="signals-are-not-heard",
        what="SIGTERM ends the process at once, with its claims.",
        invariant="L6",
        caught_by="tests/acceptance/test_crashes.py::test_sigterm_lets_flights_land_and_gives_the_rest_back",
        changes=(
            Change(PROCESS, "        loop.add_signal_handler(number, stop)\n", "        pass\n"),
        ),
    ),
)

MUTANTS_OF_WORKER = (
    *_CERTIFICATIONS,
    *_NIGHT,
    *_REMINDERS,
    *_CONFIRMATIONS,
    *_DATABASE,
    *_DYNAMICS,
)
