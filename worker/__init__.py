"""
worker: everything of this service that runs.

    __main__, cli       the commands, what they print and how they exit
    bootstrap           the composition root: the only place where things are joined
    credentials         the only reader of secrets; hands out capabilities, not strings
    settings            every other setting, checked together at the start
    coordinator/        what waits, what failed, and "try again"
    portal              the portal as a destination of the outbox: events meet Dynamics
    certifications/     the transitions, pauses, what the portal has to show, what it confirmed
    dynamics/           everything that knows the Dynamics Web API
    database, tables, errors, logs

Imports point down this list, and a check fails when they do not.
"""
