"""
worker: everything of this service that runs.

    __main__, cli       the commands, what they print and how they exit
    doctor, demo        what a run depends on; a whole little world to watch
    bootstrap           the composition root: the only place where things are joined
    nightly             expire, reconcile, re-drive, drain: each whatever becomes of the others
    credentials         the only reader of secrets; hands out capabilities, not strings
    settings            every other setting, checked together at the start
    coordinator/        what waits, what failed, "try again", and how the nights went
    monitoring/         how a worker is: /live, /ready and /metrics
    ping                tells somebody outside that the night run began and how it ended
    process             the two ways of running: until told to stop, until nothing is due
    portal, reminding   the portal and the reminders' webhook as destinations of the outbox
    certifications/     the transitions, pauses, what the portal has to show, what it confirmed,
                        reminders
    webhook             what sends a reminder
    dynamics/           everything that knows the Dynamics Web API
    reporting           tells Sentry of errors that nobody expected
    wakeup, logs, tracing, redaction, database, tables, gathering, http_client, listening,
    answering, errors, release

Imports point down this list, and a check fails when they do not.
"""
