"""
What a coordinator sees and does, in the terminal, in the browser and through the app.

    serving             the dashboard as a process: where it may listen, how it ends
    app                 from a request to its room; errors to sentences
    access, guard       who may; what no page has to think of
    api, openapi        for programs
    pages, views        for people; templates/ and static/ are theirs
    stream              live: what changed, as it changes
    tokens, sessions    whose a token is; who is logged in
    problems            what went wrong, for a program
    actions             try again, done by hand, renew: once, and written down
    audit, idempotency  who did what; a request that comes again
    retry               "try again": the current state, never an old one
    alerts, mentors     what waits, what failed; all about one mentor
    callers             whoever asks, and what the database shows them
    wording             every text, in bokmål and English; locales/ holds them

Imports point down this list, and a check fails when they do not.
"""

from __future__ import annotations
