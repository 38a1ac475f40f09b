"""
The outbox, broken on purpose; see `mutants`.
"""

from __future__ import annotations

from tests.chaos.mutants_model import Change, Mutant

STORE = "outbox/store.py"
RELAY = "outbox/relay.py"
FLIGHTS = "outbox/flights.py"
CURSOR = "outbox/cursor.py"
ATTEMPT = "outbox/attempt.py"
OUTCOME = "outbox/outcome.py"
GATE = "outbox/gate.py"
RETRY = "outbox/retry.py"

CLAIMING = "tests/integration/test_outbox_claim.py"
DOUBTING = "tests/integration/test_outbox_doubts.py"
ENDING = "tests/integration/test_outbox_relay_end.py"
ENQUEUEING = "tests/integration/test_outbox_enqueue.py"
GATING = "tests/integration/test_outbox_gate.py"
RELAYING = "tests/integration/test_outbox_relay.py"
RELAY_GATING = "tests/integration/test_outbox_relay_gate.py"
SETTLING = "tests/integration/test_outbox_settle.py"
HELD = "tests/chaos/test_held.py"

_ENQUEUE = (
    Mutant(
        name="enqueue-ignores-the-version",
        what="An older state replaces a newer one that waits to be delivered.",
        invariant="S12",
        caught_by=f"{ENQUEUEING}::test_an_older_state_never_replaces_a_newer_one",
        changes=(Change(STORE, " WHERE live.version < excluded.version\n", ""),),
    ),
    Mutant(
        name="enqueue-commits",
        what="The library commits its caller's transaction, so a phantom can be delivered.",
        invariant="S2",
        caught_by=f"{ENQUEUEING}::test_a_rollback_leaves_nothing",
        changes=(
            Change(
                STORE,
                "        return\n    if rows:\n",
                "        await connection.commit()\n        return\n    if rows:\n",
            ),
        ),
    ),
    Mutant(
        name="enqueue-disturbs-a-flight",
        what="A newer state is due at once although the key is in flight: two requests overlap.",
        invariant="S6",
        caught_by=f"{ENQUEUEING}::test_a_newer_state_leaves_a_flight_alone",
        changes=(
            Change(
                STORE,
                "THEN excluded.available_at ELSE live.available_at END",
                "THEN excluded.available_at ELSE excluded.available_at END",
            ),
        ),
    ),
    Mutant(
        name="enqueue-keeps-the-attempts",
        what="A newer state begins with the attempts that an older one used up.",
        invariant="S9",
        caught_by=f"{ENQUEUEING}::test_a_newer_state_starts_with_all_attempts",
        changes=(
            Change(
                STORE,
                "attempts = CASE WHEN live.claim_token IS NULL THEN 0 ELSE live.attempts END",
                "attempts = live.attempts",
            ),
        ),
    ),
)

_CLAIM = (
    Mutant(
        name="claim-without-skip-locked",
        what="A claim waits for the rows that another one holds.",
        invariant="L4",
        caught_by=f"{CLAIMING}::test_two_connections_never_get_the_same_event",
        changes=(Change(STORE, "FOR NO KEY UPDATE SKIP LOCKED", "FOR NO KEY UPDATE"),),
    ),
    Mutant(
        name="claim-without-a-lease",
        what="A claim does not push available_at, so the event is due again at once.",
        invariant="S6",
        caught_by=f"{CLAIMING}::test_a_claim_is_a_lease_with_a_token",
        changes=(
            Change(
                STORE, "       available_at = now() + make_interval(secs => :lease_seconds),\n", ""
            ),
        ),
    ),
    Mutant(
        name="claim-for-ever",
        what="An event of a worker that died stays its own.",
        invariant="L2",
        caught_by=f"{CLAIMING}::test_an_event_of_a_dead_worker_comes_back_by_itself",
        changes=(
            Change(
                STORE,
                "AND available_at <= now()\n",
                "AND available_at <= now() AND claim_token IS NULL\n",
            ),
        ),
    ),
    Mutant(
        name="claim-ignores-priority",
        what="The oldest event goes first, so showing can go before hiding.",
        invariant="S14",
        caught_by="tests/integration/test_transitions.py::test_hiding_goes_before_showing",
        changes=(
            Change(STORE, 'else "priority, available_at, id"', 'else "available_at, priority, id"'),
        ),
    ),
    Mutant(
        name="claim-ignores-age",
        what="Of equal priority the first enqueued goes first, so what fails holds others up.",
        invariant="L4",
        caught_by=f"{HELD}::test_of_equal_priority_what_has_been_due_longest_goes_first",
        changes=(Change(STORE, 'else "priority, available_at, id"', 'else "priority, id"'),),
    ),
    Mutant(
        name="claim-looks-up-the-past",
        what="A version that comes while a claim looks is claimed with what was found before it.",
        invariant="S12",
        caught_by=f"{CLAIMING}::test_what_comes_while_a_claim_looks_is_the_next_ones",
        changes=(
            Change(
                STORE,
                "WHERE event.ctid = due.place",
                "WHERE (event.destination, event.key) = (due.destination, due.key)",
            ),
        ),
    ),
    Mutant(
        name="claim-of-every-organisation",
        what="A worker takes events of another organisation.",
        invariant="S21",
        caught_by=f"{CLAIMING}::test_events_of_others_are_never_claimed",
        changes=(
            Change(
                STORE,
                "       AND organization_id = :organization_id\n       AND (priority",
                "       AND (priority",
            ),
        ),
    ),
    Mutant(
        name="claim-by-the-workers-clock",
        what="Whether an event is due is judged by the worker's clock.",
        invariant="S19",
        caught_by=f"{CLAIMING}::test_a_worker_whose_clock_is_wrong_claims_what_is_due",
        changes=(
            Change(STORE, "import json\n", "import json\nimport time\n"),
            Change(STORE, "AND available_at <= now()", "AND available_at <= to_timestamp(:clock)"),
            Change(
                STORE,
                '"slack_seconds": slack_seconds,',
                '"slack_seconds": slack_seconds, "clock": time.time(),',
            ),
        ),
    ),
    Mutant(
        name="attempts-counted-after-the-call",
        what="Settling counts the attempt, so an event that kills its worker is tried for ever.",
        invariant="S8",
        caught_by=f"{CLAIMING}::test_an_event_that_kills_its_workers_runs_out_of_attempts",
        changes=(
            # The database refuses a claim that counts nothing; this fence falls as well.
            Change(
                "alembic/versions/0002_portal_and_outbox.py",
                "(attempts > 0 AND first_attempt_at IS NOT NULL)",
                "(first_attempt_at IS NOT NULL)",
            ),
            Change(
                STORE,
                "THEN 1\n                           ELSE event.attempts + 1 END",
                "THEN 0\n                           ELSE event.attempts END",
            ),
            Change(
                STORE,
                "event.created_at, event.attempts,\n",
                "event.created_at, event.attempts + 1 AS attempts,\n",
            ),
            Change(
                STORE,
                "THEN event.attempts - 1\n               ELSE event.attempts END",
                "THEN event.attempts\n               ELSE event.attempts + 1 END",
            ),
        ),
    ),
    Mutant(
        name="no-doubt-about-an-abandoned-claim",
        what="That a worker which vanished may have sent something is forgotten.",
        invariant="S13",
        caught_by=f"{DOUBTING}::test_a_claim_that_was_lost_is_a_doubt",
        changes=(Change(STORE, "     WHERE abandoned\n", "     WHERE false\n"),),
    ),
)

_SETTLE = (
    Mutant(
        name="settle-without-the-token",
        what="Whoever lost a claim still writes its result.",
        invariant="S7",
        caught_by=f"{SETTLING}::test_a_stale_token_changes_nothing",
        changes=(
            Change(
                STORE,
                "WHERE id = report.id AND claim_token = report.token",
                "WHERE id = report.id",
            ),
        ),
    ),
    Mutant(
        name="settle-logs-what-it-did-not-write",
        what="What changed while it was settled counts as settled, and is sent once more.",
        invariant="S7",
        caught_by=f"{SETTLING}::test_what_changes_while_it_is_settled_is_left_for_later",
        changes=(
            Change(
                STORE,
                "      FROM written\n     WHERE ending IS NOT NULL",
                "      FROM verdict\n     WHERE ending IS NOT NULL",
            ),
            Change(STORE, "SELECT token, ending FROM written", "SELECT token, ending FROM verdict"),
        ),
    ),
    Mutant(
        name="settle-ignores-a-newer-version",
        what="A delivery ends the event although a newer state came during the flight.",
        invariant="S3",
        caught_by=f"{SETTLING}::test_a_newer_state_is_due_at_once_when_the_flight_lands",
        changes=(Change(STORE, "event.version > report.version AS moved_on", "false AS moved_on"),),
    ),
    Mutant(
        name="settle-forgets-the-history",
        what="Versions that were superseded in flight vanish without a trace.",
        invariant="S5",
        caught_by=f"{SETTLING}::test_a_newer_state_that_dies_leaves_the_key_failed",
        changes=(
            Change(
                STORE,
                "     WHERE ending IS NOT NULL\n     ORDER BY id",
                "     WHERE ending IN ('delivered', 'dead', 'skipped')\n     ORDER BY id",
            ),
        ),
    ),
    Mutant(
        name="settle-waits-for-a-business-transaction",
        what="The worker waits for whoever holds the event's row.",
        invariant="L4",
        caught_by=f"{SETTLING}::test_what_a_business_transaction_holds_is_left_for_later",
        changes=(Change(STORE, "FOR UPDATE SKIP LOCKED) AS event", "FOR UPDATE) AS event"),),
    ),
    Mutant(
        name="not-said-again-after-a-doubt",
        what="A slow request of an older state may land last, and nothing repairs it.",
        invariant="S13",
        caught_by=f"{DOUBTING}::test_a_newer_state_is_said_again_after_an_older_request_could_land",
        changes=(
            Change(
                STORE,
                "CASE WHEN outcome = 'delivered' AND NOT moved_on THEN (",
                "CASE WHEN false THEN (",
            ),
        ),
    ),
    Mutant(
        name="throttling-burns-an-attempt",
        what="A 429 counts as an attempt.",
        invariant="S10",
        caught_by=f"{SETTLING}::test_a_deferral_burns_nothing",
        changes=(
            Change(
                STORE,
                "               WHEN verdict.outcome = 'deferred' THEN event.attempts - 1\n",
                "",
            ),
        ),
    ),
    Mutant(
        name="recorded-before-the-event-is-locked",
        what="The confirmation is written first, so lost claims confirm and locks go in a circle.",
        invariant="S7",
        caught_by=f"{ENDING}::test_a_lost_claim_changes_nothing",
        changes=(
            Change(
                RELAY,
                "        settled = await store.settle(\n",
                "        await self._destination.record(\n"
                "            connection,\n"
                '            [store._settlement(one, "delivered") for one in landed],\n'
                "        )\n"
                "        settled = await store.settle(\n",
            ),
        ),
    ),
    Mutant(
        name="dead-letter-in-a-second-transaction",
        what="The event is deleted in one transaction and its failure written in the next.",
        invariant="S4",
        caught_by=f"{RELAYING}::test_a_failure_that_cannot_be_recorded_is_not_lost",
        changes=(
            Change(
                RELAY,
                "        await self._destination.record(connection, settled.written)\n",
                "        await connection.commit()\n"
                "        await self._destination.record(connection, settled.written)\n",
            ),
        ),
    ),
)

_ATTEMPT = (
    Mutant(
        name="acknowledged-before-the-reply",
        what="An event counts as delivered as soon as its request is on the way.",
        invariant="S3",
        caught_by=f"{RELAYING}::test_transient_faults_are_retried_until_it_works",
        changes=(
            Change(
                ATTEMPT,
                "            return await destination.deliver(event, seconds)\n",
                "            asyncio.ensure_future(destination.deliver(event, seconds))\n"
                "            return Delivered()\n",
            ),
            Change(ATTEMPT, "import Dead, Deferred, ", "import Dead, Deferred, Delivered, "),
        ),
    ),
    Mutant(
        name="a-late-flight-still-sends",
        what="A process that stood still for more than half its lease sends all the same.",
        invariant="S13",
        caught_by="tests/unit/test_outbox_attempt.py::test_an_attempt_that_would_start_late_is_put_off",
        changes=(
            Change(
                ATTEMPT, "> destination.lease_seconds / 2:", "> destination.lease_seconds * 99:"
            ),
        ),
    ),
    Mutant(
        name="a-lease-counted-from-the-answer",
        what="Time lost while the claim was asked for does not count towards the lease.",
        invariant="S13",
        caught_by=f"{HELD}::test_time_lost_while_claiming_counts_towards_the_lease",
        changes=(
            Change(
                RELAY,
                "self._take_off(event, claimed_at=claimed_at, probe=probe)",
                "self._take_off(event, claimed_at=time.monotonic(), probe=probe)",
            ),
        ),
    ),
    Mutant(
        name="a-killer-is-tried-for-ever",
        what="Attempts beyond the last one are made, not buried.",
        invariant="S8",
        caught_by="tests/unit/test_outbox_attempt.py"
        "::test_an_event_that_killed_all_its_workers_is_buried_unsent",
        changes=(
            Change(
                ATTEMPT, "event.attempts > destination.policy.max_attempts", "event.attempts < 0"
            ),
        ),
    ),
    Mutant(
        name="retries-outlive-their-window",
        what="The time that requests take does not count towards the 15 seconds.",
        invariant="S9",
        caught_by="tests/unit/test_outbox_retry.py"
        "::test_a_retry_is_planned_only_if_there_is_time_left_for_it",
        changes=(
            Change(
                RETRY,
                "planned_seconds = elapsed_seconds + delay + self.slack_seconds",
                "planned_seconds = delay + self.slack_seconds",
            ),
        ),
    ),
    Mutant(
        name="retry-after-ignored",
        what="However long a 429 asks us to wait, we wait our own time.",
        invariant="S10",
        caught_by="tests/unit/test_outbox_errors.py"
        "::test_throttling_closes_the_gate_for_as_long_as_asked",
        changes=(
            Change(
                OUTCOME,
                "asked = THROTTLED_SECONDS if error.retry_after is None else error.retry_after",
                "asked = THROTTLED_SECONDS",
            ),
        ),
    ),
    Mutant(
        name="a-broken-setup-kills-events",
        what="Each 401 or 403 gives up one mentor instead of closing the gate.",
        invariant="S12",
        caught_by=f"{RELAY_GATING}::test_a_broken_setup_closes_the_gate_and_burns_nothing",
        changes=(
            Change(
                OUTCOME,
                "        case ConfigurationError():\n            return Deferred(\n"
                "                after_seconds=0,\n                code=error.code,\n"
                '                closes="configuration",\n',
                "        case ConfigurationError():\n            return Dead(\n"
                "                code=error.code,\n",
            ),
        ),
    ),
)

_GATE = (
    Mutant(
        name="claim-forgets-the-gate",
        what="Events are sent through a closed gate.",
        invariant="S10",
        caught_by=f"{RELAY_GATING}::test_nothing_is_sent_while_a_person_keeps_the_gate_closed",
        changes=(
            Change(
                STORE,
                'admitted="true" if probing else _ADMITTED',
                'admitted="true"',
            ),
            Change(
                RELAY,
                "OPEN if is_open else await gate.look(connection, **self._where)",
                "OPEN",
            ),
            # The second fence: with it alone, the first may fall.
            Change(FLIGHTS, "        if self.grounded:\n", "        if False:\n"),
        ),
    ),
    Mutant(
        name="everybody-probes",
        what="A probe does not keep other processes from probing too.",
        invariant="S10",
        caught_by=f"{GATING}::test_one_of_two_processes_gets_the_probe",
        changes=(
            Change(
                GATE,
                "   SET closed_until = now() + make_interval(secs => :seconds),\n"
                "       probe = gen_random_uuid()",
                "   SET probe = gen_random_uuid()",
            ),
            Change(
                GATE,
                '"organization_id": organization_id, "seconds": seconds}',
                '"organization_id": organization_id}',
            ),
        ),
    ),
    Mutant(
        name="probes-beside-earlier-flights",
        what="A half-open gate is probed although requests from before are under way.",
        invariant="S10",
        caught_by=f"{HELD}::test_a_half_open_gate_is_not_probed_before_earlier_flights_have_landed",
        changes=(
            Change(
                RELAY,
                'self.gate.state == "half-open" and not self._flights and not self._unsettled:',
                'self.gate.state == "half-open":',
            ),
        ),
    ),
    Mutant(
        name="a-pause-by-hand-is-overruled",
        what="An answer of Dynamics replaces what an operator closed by hand.",
        invariant="S10",
        caught_by=f"{GATING}::test_nothing_automatic_changes_what_a_person_closed",
        changes=(
            Change(
                GATE,
                "excluded.reason = 'throttled' AND gate.reason <> 'operator'",
                "excluded.reason = 'throttled'",
            ),
        ),
    ),
    Mutant(
        name="opened-before-the-redrive",
        what="A recovery opens the gate first: if it dies then, dead events stay dead.",
        invariant="S12",
        caught_by=f"{RELAY_GATING}"
        "::test_a_probe_that_comes_through_opens_the_gate_after_the_redrive",
        changes=(
            Change(
                RELAY,
                "        redriven = await self._redrive(None)\n        if redriven is None:",
                "        async with self._line.transaction() as connection:\n"
                "            opened = await gate.open_after_probe(\n"
                "                connection, **self._where, probe=probe\n"
                "            )\n"
                "        redriven = await self._redrive(None)\n        if redriven is None:",
            ),
            Change(
                RELAY,
                "        async with self._line.transaction() as connection:\n"
                "            opened = await gate.open_after_probe("
                "connection, **self._where, probe=probe)\n",
                "",
            ),
        ),
    ),
    Mutant(
        name="released-before-the-gate-is-closed",
        what="Between settling and closing, another process may claim what was throttled.",
        invariant="S10",
        caught_by=f"{RELAY_GATING}::test_the_gate_is_closed_before_anything_is_released",
        changes=(
            Change(
                RELAY,
                "        if self._breaker.closings:\n            await self._close_gate()\n",
                "        if self._unsettled:\n            await self._flush(self._unsettled)\n"
                "        if self._breaker.closings:\n            await self._close_gate()\n",
            ),
        ),
    ),
)

_RELAY = (
    Mutant(
        name="a-transaction-open-during-the-call",
        what="The claim is committed only after its requests were answered.",
        invariant="S11",
        caught_by=f"{HELD}::test_no_transaction_is_open_while_dynamics_is_asked",
        changes=(
            Change(
                RELAY,
                "line = self._line.transaction() if landed else self._line.statements()",
                "line = self._line.transaction()",
            ),
            Change(
                RELAY,
                "                    events, again = await self._claim(connection, room)\n"
                "        except Exception as error:\n",
                "                    events, again = await self._claim(connection, room)\n"
                "                self._take_off_all(events, claimed_at=claimed_at)\n"
                "                if self._flights:\n"
                "                    await asyncio.wait([one.task for one in self._flights._up])\n"
                "        except Exception as error:\n",
            ),
            Change(
                RELAY,
                "        self._settled(landed, settled)\n"
                "        self._take_off_all(events, claimed_at=claimed_at)\n",
                "        self._settled(landed, settled)\n",
            ),
        ),
    ),
    Mutant(
        name="stopping-abandons-claims",
        what="After SIGTERM, what did not land is left to its lease instead of given back.",
        invariant="L6",
        caught_by=f"{ENDING}::test_stopping_gives_back_what_does_not_land",
        changes=(
            Change(
                RELAY,
                "        for flight in await self._flights.cancel():\n",
                "        deaf = await self._flights.cancel()\n"
                "        self._flights._over.clear()\n"
                "        for flight in deaf:\n",
            ),
        ),
    ),
    Mutant(
        name="stopping-claims-on",
        what="After SIGTERM, new events are still claimed.",
        invariant="L6",
        caught_by=f"{ENDING}::test_stopping_lets_flights_land",
        changes=(
            Change(
                RELAY,
                "            await self._settle_quietly()\n            if self._flights:",
                "            await self._settle_quietly()\n            await self._claim()\n"
                "            if self._flights:",
            ),
        ),
    ),
    Mutant(
        name="a-lost-database-ends-the-worker",
        what="The first failed statement ends the process.",
        invariant="L5",
        caught_by=f"{ENDING}::test_a_database_that_is_away_for_a_while_costs_nothing",
        changes=(
            Change(
                RELAY,
                "                failures += 1\n",
                "                raise\n",
            ),
        ),
    ),
    Mutant(
        name="one-odd-event-blocks-its-batch",
        what="If one event cannot be recorded, none of its batch is settled.",
        invariant="L4",
        caught_by=f"{RELAYING}::test_one_event_that_cannot_be_recorded_does_not_block_the_others",
        changes=(Change(RELAY, "if len(landed) > 1:", "if len(landed) > 999:"),),
    ),
    Mutant(
        name="more-in-flight-than-allowed",
        what="A relay claims as if nothing of its own were under way.",
        invariant="L3",
        caught_by=f"{RELAYING}::test_no_more_is_in_flight_than_allowed",
        changes=(
            Change(
                FLIGHTS,
                "        if len(self._up) < self._places:\n",
                "        if True:\n",
            ),
        ),
    ),
    Mutant(
        name="a-backlog-is-never-looked-at-from-the-start",
        what="What comes in behind the place of the claims is never found.",
        invariant="L1",
        caught_by=f"{RELAYING}::test_what_comes_in_behind_a_backlog_is_found_too",
        changes=(
            Change(
                CURSOR,
                "self._position = START if short else claimed.last",
                "self._position = max(self._position, claimed.last)",
            ),
            Change(
                CURSOR,
                "return short and (claimed.is_overtaken or not looked_at_all)",
                "return False",
            ),
        ),
    ),
    Mutant(
        name="urgent-events-wait-for-the-end-of-a-backlog",
        what="A mentor who has to be hidden waits until all others have been shown.",
        invariant="S14",
        caught_by=f"{RELAYING}::test_an_urgent_event_does_not_wait_for_the_end_of_a_backlog",
        changes=(
            Change(
                CURSOR,
                "if self._begun_at >= self._full_look_at:",
                "if not self._full_look_at:",
            ),
        ),
    ),
    Mutant(
        name="who-waits-for-a-place-is-sent-after-all",
        what="A closed gate does not stop what was claimed and waits for a place.",
        invariant="S10",
        caught_by="tests/unit/test_outbox_flights.py"
        "::test_who_waits_gives_up_when_all_are_grounded",
        changes=(Change(FLIGHTS, "        if self.grounded:\n", "        if False:\n"),),
    ),
    Mutant(
        name="who-is-throttled-hands-its-place-on",
        what="Whoever waits for a place is sent between a throttled answer and the closing.",
        invariant="S10",
        caught_by="tests/unit/test_outbox_flights.py"
        "::test_an_answer_that_may_close_the_gate_grounds_who_waits",
        changes=(Change(FLIGHTS, "            self.grounded = True", "            pass"),),
    ),
)

MUTANTS_OF_OUTBOX = (*_ENQUEUE, *_CLAIM, *_SETTLE, *_ATTEMPT, *_GATE, *_RELAY)
