"""
Roles of least privilege: each part of this service may do what its statements need, no more.

    hlf_sync_producer    transitions, and the events that follow from them
    hlf_sync_worker      delivers: claims, settles, confirms, notes failures, forgets what is old
    hlf_sync_cron        both, and what else a night does
    hlf_sync_web         people's sessions; for all else it becomes `authenticated`
    hlf_sync_metrics     counts; no names of mentors, no contents of events

Nobody logs in as one of them: whoever runs the service makes login roles `IN ROLE` these. An
installation that runs as the tables' owner goes on as before: row-level security holds for owners
too from now on, and a policy of its own lets the owner see every row.

A producer writes events, so what an event of the portal may be about is checked by the table: a
key that is no mentor's id would be nobody's to deliver, and in everybody's way.

Roles belong to the whole server, so another database or a migration at the same time may have
made them. For the same reason the downgrade leaves them: logins and other databases may hang on
them. What it leaves may do nothing here but what the owner of an adopted table granted.

An adopted table is opened to them where 0005 opened it to people; elsewhere `hlf-sync doctor`
says what its owner has to grant. Where Supabase's Realtime publishes single tables,
`dynamics_sync_failures` joins them.

Revision ID: 0006
Revises: 0005
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from alembic import op, util
from sqlalchemy import text
from sqlalchemy.exc import ProgrammingError

if TYPE_CHECKING:
    from collections.abc import Iterator

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

MARK = "hlf-dynamics-sync"

UNLESS_DONE = """
    DO $$
    BEGIN
        {statement};
    EXCEPTION
        WHEN duplicate_object OR unique_violation THEN NULL;  -- somebody was faster
    END $$;
"""

ROLE = "CREATE ROLE {role} NOLOGIN {inherit}"

MEMBERSHIP = {
    True: "GRANT authenticated TO hlf_sync_web WITH INHERIT FALSE, SET TRUE",
    False: "GRANT authenticated TO hlf_sync_web",
}
"""From PostgreSQL 16 on and before, where a NOINHERIT role only takes what it asks for."""

MAY_BECOME = {
    True: "SELECT pg_has_role('hlf_sync_web', 'authenticated', 'SET')",
    False: "SELECT pg_has_role('hlf_sync_web', 'authenticated', 'MEMBER')",
}

EVERYBODY = {
    "public.organizations": {"SELECT": "(id)"},
    "outbox.alembic_version": {"SELECT": ""},
}
"""Which release this is, and whether there is such an organisation."""

TRANSITIONS = {
    "public.mentors": {"SELECT": "(id, organization_id)"},
    "public.certifications": {
        "SELECT": "(id, mentor_id, expires_on, status, expired_at, renewed_at)",
        "UPDATE": "(expires_on, status, expired_at, renewed_at)",
    },
    "public.mentor_pauses": {
        "SELECT": "",
        "INSERT": "(mentor_id, certification_id, reason)",
        "UPDATE": "(resumed_at)",
    },
    "public.portal_visibility": {
        "SELECT": "",
        "INSERT": "(mentor_id, organization_id, visible, version)",
        "UPDATE": "(organization_id, visible, version, changed_at)",
    },
    "public.portal_confirmations": {"SELECT": ""},
    "public.dynamics_sync_failures": {"SELECT": "(mentor_id, error_code, resolved_at)"},
    # A claim can be neither made nor taken: a transition only asks whether there is one.
    "outbox.events": {
        "SELECT": "(destination, key, organization_id, version, payload, priority, created_at,"
        " available_at, attempts, claim_token, replaced, first_attempt_at, last_error_code,"
        " traceparent)",
        "INSERT": "(destination, key, organization_id, version, payload, priority, traceparent)",
        "UPDATE": "(organization_id, version, payload, priority, created_at, available_at,"
        " attempts, replaced, first_attempt_at, last_error_code, traceparent)",
    },
    "outbox.commits": {"INSERT": "(id)"},
}

DELIVERY = {
    "public.mentors": {"SELECT": "(id, organization_id, dynamics_id)"},
    "public.certifications": {"SELECT": "(id, mentor_id, expires_on, status)"},
    "public.mentor_pauses": {"SELECT": ""},
    "public.portal_visibility": {"SELECT": "", "UPDATE": "(version)"},
    "public.portal_confirmations": {
        "SELECT": "",
        "INSERT": "(mentor_id, organization_id, visible, version)",
        "UPDATE": "(organization_id, visible, version, confirmed_at)",
    },
    "public.dynamics_sync_failures": {
        "SELECT": "",
        "INSERT": "(organization_id, mentor_id, certification_id, visible, version, error_code,"
        " error_message, retry_count, recoverable)",
        "UPDATE": "(organization_id, certification_id, visible, version, attempted_at,"
        " error_code, error_message, retry_count, recoverable, resolved_at, resolution)",
    },
    "outbox.events": {"SELECT": "", "INSERT": "", "UPDATE": "", "DELETE": ""},
    # Whoever locks a row has to be able to update some column of it; this one never changes.
    "outbox.settled": {"SELECT": "", "INSERT": "", "UPDATE": "(id)", "DELETE": ""},
    "outbox.gates": {"SELECT": "", "INSERT": "", "UPDATE": ""},
    "outbox.doubts": {"SELECT": "", "INSERT": "", "UPDATE": "", "DELETE": ""},
    "outbox.commits": {"SELECT": "(committed_at)", "INSERT": "(id)", "DELETE": ""},
    # A worker tells whoever watches it when the night last went well.
    "outbox.nightly_runs": {"SELECT": ""},
}

NIGHT = {
    "public.cert_notification_log": {
        "SELECT": "",
        "INSERT": "(mentor_id, threshold_days, cert_id, expires_on)",
        "UPDATE": "(expires_on, notified_at)",
    },
    "outbox.nightly_runs": {
        "SELECT": "",
        "INSERT": "(organization_id)",
        "UPDATE": "(finished_at, ok, summary)",
        "DELETE": "",
    },
}

SESSIONS = {
    "outbox.web_sessions": {
        "SELECT": "",
        "INSERT": "(token_hash, claims, expires_at)",
        "UPDATE": "(seen_at)",
        "DELETE": "",
    },
    # Answers are people's; that they are old can be seen without them.
    "outbox.idempotency": {"SELECT": "(ctid, created_at)", "DELETE": ""},
}

COUNTS = {
    "public.portal_visibility": {"SELECT": ""},
    "public.portal_confirmations": {"SELECT": ""},
    "public.dynamics_sync_failures": {
        "SELECT": "(id, organization_id, mentor_id, visible, version, attempted_at, error_code,"
        " retry_count, recoverable, created_at, resolved_at, resolution)",
    },
    "outbox.events": {
        "SELECT": "(id, destination, key, organization_id, version, priority, created_at,"
        " available_at, attempts, claimed_version, replaced, first_attempt_at, last_error_code)",
    },
    "outbox.settled": {
        "SELECT": "(id, event_id, destination, key, organization_id, version, outcome, attempts,"
        " error_code, created_at, settled_at)",
    },
    "outbox.gates": {"SELECT": ""},
    "outbox.nightly_runs": {"SELECT": ""},
}

ROLES = {
    "hlf_sync_producer": (EVERYBODY, TRANSITIONS),
    "hlf_sync_worker": (EVERYBODY, DELIVERY),
    "hlf_sync_cron": (EVERYBODY, TRANSITIONS, DELIVERY, NIGHT),
    "hlf_sync_web": (EVERYBODY, SESSIONS),
    "hlf_sync_metrics": (EVERYBODY, COUNTS),
}
"""By role, table and command: the columns, or all of them."""

AUTHENTICATED = {
    "public.organizations": {"SELECT": ""},
    "public.mentors": {"SELECT": ""},
    "public.certifications": {
        "SELECT": "",
        "UPDATE": "(status, expires_on, expired_at, renewed_at)",
    },
    "public.mentor_pauses": {"SELECT": "", "UPDATE": "(resumed_at)"},
    "public.portal_visibility": {"SELECT": "", "INSERT": "", "UPDATE": ""},
    "public.portal_confirmations": {"SELECT": ""},
    "public.dynamics_sync_failures": {
        "SELECT": "",
        "UPDATE": "(resolved_at, resolution, resolved_by)",
    },
    "outbox.events": {"SELECT": "", "INSERT": "", "UPDATE": ""},
    "outbox.settled": {"SELECT": ""},
    "outbox.gates": {"SELECT": ""},
    "outbox.nightly_runs": {"SELECT": ""},
    "outbox.audit": {"SELECT": "", "INSERT": ""},
    "outbox.idempotency": {"SELECT": "", "INSERT": ""},
    "outbox.commits": {"INSERT": ""},
}
"""What 0005 gave, and what stays where somebody's defaults gave more."""

ADOPTABLE = ("public.organizations", "public.mentors", "public.certifications")

OURS = (
    "public.mentor_pauses",
    "public.portal_visibility",
    "public.portal_confirmations",
    "public.dynamics_sync_failures",
    "public.cert_notification_log",
    "outbox.events",
    "outbox.settled",
    "outbox.gates",
    "outbox.doubts",
    "outbox.commits",
    "outbox.nightly_runs",
    "outbox.audit",
    "outbox.web_sessions",
    "outbox.idempotency",
)

VERSION = "outbox.alembic_version"
"""Alembic's own; it is read, and has no rows to keep apart."""

FUNCTIONS = (
    "outbox.claimed_organization(), outbox.claimed_subject(), outbox.in_transition(),"
    " outbox.may_act()"
)

FIRST_SECURED = ("outbox.doubts",)
"""The one that had no row-level security before."""

A_MENTOR = "destination <> 'dynamics' OR key ~ '^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$'"

POLICIES = {
    "SELECT": "USING (true)",
    "INSERT": "WITH CHECK (true)",
    "UPDATE": "USING (true) WITH CHECK (true)",
    "DELETE": "USING (true)",
}

PUBLICATION = """
    SELECT pg_has_role(current_user, pubowner, 'USAGE') AND NOT puballtables AS changeable,
           EXISTS (SELECT FROM pg_publication_rel
                    WHERE prpubid = publication.oid
                      AND prrelid = CAST('public.dynamics_sync_failures' AS regclass)) AS joined
      FROM pg_publication AS publication
     WHERE pubname = 'supabase_realtime'
"""


def upgrade() -> None:
    _require_roles()
    _refuse_events_about_nobody()
    _close_schema()
    for role in ROLES:
        op.execute(f"GRANT USAGE ON SCHEMA outbox TO {role}")
        _let_into_public(role)
    ours = [*_made_by_us(), *OURS]
    for table in [*ours, VERSION]:
        _close(table)
    for table in ours:
        _force(table)
    for table in [*filter(_may_open, ADOPTABLE), *OURS, VERSION]:
        _grant(table)
        if table != VERSION:
            _let_rows_be_seen(table)
    _publish()


def downgrade() -> None:
    if _publication() == (True, True):
        op.execute("ALTER PUBLICATION supabase_realtime DROP TABLE public.dynamics_sync_failures")
    for table in [*filter(_may_change, ADOPTABLE), *OURS, VERSION]:
        for command, _ in _commands(table):
            op.execute(f"DROP POLICY IF EXISTS hlf_sync_roles_{command.lower()} ON {table}")
        _take_back(f"ALL ON {table}")
    for table in [*_made_by_us(), *OURS]:
        op.execute(f"DROP POLICY IF EXISTS hlf_sync_owner ON {table}")
        op.execute(f"ALTER TABLE {table} NO FORCE ROW LEVEL SECURITY")
    for table in FIRST_SECURED:
        op.execute(f"ALTER TABLE {table} DISABLE ROW LEVEL SECURITY")
    _take_back("ALL ON SCHEMA outbox")
    op.drop_constraint("events_portal_key_is_a_mentor", "events", schema="outbox")


def _take_back(what: str) -> None:
    """
    From the roles that there are: whoever was dropped, here or by a restore, has nothing left.
    """
    if roles := _known(*ROLES):
        op.execute(f"REVOKE {what} FROM {', '.join(roles)}")


# --------------------------------------------------------------------------------- roles


def _require_roles() -> None:
    """
    Make sure that the roles are there, and that the dashboard's can become `authenticated`.
    """
    wanted = list(_missing_roles())
    try:
        with op.get_bind().begin_nested():
            for role in wanted:
                op.execute(UNLESS_DONE.format(statement=_creation(role)))
            if not _asked(MAY_BECOME[_new()]):
                op.execute(UNLESS_DONE.format(statement=MEMBERSHIP[_new()]))
    except ProgrammingError:
        make = [f"{_creation(role)};" for role in wanted]
        raise util.CommandError(
            "The parts of this service run as roles which this user may not make. As an "
            f"administrator run: {' '.join(make)} {MEMBERSHIP[_new()]}; and migrate again. "
            "Nothing was changed."
        ) from None


def _missing_roles() -> Iterator[str]:
    for role in ROLES:
        if not _asked("SELECT count(*) > 0 FROM pg_roles WHERE rolname = :role", role=role):
            yield role


def _creation(role: str) -> str:
    return ROLE.format(role=role, inherit="NOINHERIT" if role == "hlf_sync_web" else "INHERIT")


def _new() -> bool:
    return (op.get_bind().dialect.server_version_info or (0,)) >= (16,)


def _let_into_public(role: str) -> None:
    """
    Everybody is let in by default; where that was taken back, we give what is ours to give.
    """
    if not _asked("SELECT has_schema_privilege(:role, 'public', 'USAGE')", role=role) and _asked(
        "SELECT has_schema_privilege('public', 'USAGE WITH GRANT OPTION')"
    ):
        op.execute(f"GRANT USAGE ON SCHEMA public TO {role}")


# -------------------------------------------------------------------------------- tables


def _refuse_events_about_nobody() -> None:
    """
    From now on; those that are there are for a person to look at.
    """
    keys = op.get_bind().scalars(
        text(f"SELECT key FROM outbox.events WHERE NOT ({A_MENTOR}) ORDER BY id LIMIT 5")  # noqa: S608
    )
    if found := ", ".join(keys):
        raise util.CommandError(
            f"There are events for the portal whose key is no mentor's id: {found}. Nobody can "
            "deliver them: look at them, DELETE them from outbox.events, and migrate again. "
            "Nothing was changed."
        )
    op.create_check_constraint("events_portal_key_is_a_mentor", "events", A_MENTOR, schema="outbox")


def _made_by_us() -> list[str]:
    """
    Which of the adoptable tables are no one else's.
    """
    mark = "SELECT obj_description(to_regclass(:table), 'pg_class') = :mark"
    return [table for table in ADOPTABLE if _asked(mark, table=table, mark=MARK)]


def _may_change(table: str) -> bool:
    """
    Whether the table is the migrating user's to change.
    """
    mine = "SELECT pg_has_role(current_user, relowner, 'USAGE') FROM pg_class WHERE oid = "
    return _asked(f"{mine} to_regclass(:table)", table=table)


def _may_open(table: str) -> bool:
    """
    Whether rows can be granted without granting all of them.
    """
    secured = "SELECT relrowsecurity FROM pg_class WHERE oid = to_regclass(:table)"
    return _may_change(table) and _asked(secured, table=table)


def _close_schema() -> None:
    """
    Nobody makes anything in the machinery, and only people's policies call its functions.
    """
    nobody = ", ".join(["PUBLIC", *ROLES, *_known("anon", "service_role")])
    op.execute(f"REVOKE ALL ON SCHEMA outbox FROM authenticated, {nobody}")
    op.execute(f"REVOKE ALL ON ALL SEQUENCES IN SCHEMA outbox FROM authenticated, {nobody}")
    op.execute(f"REVOKE ALL ON FUNCTION {FUNCTIONS} FROM {nobody}")
    op.execute("GRANT USAGE ON SCHEMA outbox TO authenticated")


def _known(*roles: str) -> list[str]:
    """
    Those of them that there are.
    """
    there = "SELECT to_regrole(:role) IS NOT NULL"
    return [role for role in roles if _asked(there, role=role)]


def _close(table: str) -> None:
    """
    Take back what defaults may have given; people keep what 0005 gave them.
    """
    api = ("anon", "authenticated")
    if table.startswith("outbox."):
        # Tables of `public` may have been opened to a project's own back end on purpose.
        api = (*api, "service_role")
    op.execute(f"REVOKE ALL ON {table} FROM {', '.join(['PUBLIC', *ROLES, *_known(*api)])}")
    for command, columns in AUTHENTICATED.get(table, {}).items():
        op.execute(f"GRANT {command} {columns} ON {table} TO authenticated")


def _force(table: str) -> None:
    """
    Bind the owner too, and let the owner see every row.
    """
    owner = op.get_bind().scalar(
        text(
            "SELECT quote_ident(pg_get_userbyid(relowner)) FROM pg_class WHERE oid ="
            " CAST(:table AS regclass)"
        ),
        {"table": table},
    )
    op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY")
    op.execute(f"CREATE POLICY hlf_sync_owner ON {table} TO {owner} USING (true) WITH CHECK (true)")


def _grant(table: str) -> None:
    for role, duties in ROLES.items():
        for duty in duties:
            for command, columns in duty.get(table, {}).items():
                op.execute(f"GRANT {command} {columns} ON {table} TO {role}")


def _let_rows_be_seen(table: str) -> None:
    for command, roles in _commands(table):
        op.execute(
            f"CREATE POLICY hlf_sync_roles_{command.lower()} ON {table} FOR {command} "
            f"TO {', '.join(roles)} {POLICIES[command]}"
        )


def _commands(table: str) -> Iterator[tuple[str, list[str]]]:
    """
    Each command, with the roles that it is granted to.
    """
    for command in POLICIES:
        roles = [
            role
            for role, duties in ROLES.items()
            if any(command in duty.get(table, {}) for duty in duties)
        ]
        if roles:
            yield command, roles


# -------------------------------------------------------------------------- publication


def _publish() -> None:
    if _publication() == (True, False):
        op.execute("ALTER PUBLICATION supabase_realtime ADD TABLE public.dynamics_sync_failures")


def _publication() -> tuple[bool, bool] | None:
    """
    Whether we may change it, and whether the failures are in it; None if there is none.
    """
    row = op.get_bind().execute(text(PUBLICATION)).one_or_none()
    return None if row is None else (row.changeable, row.joined)


def _asked(question: str, **parameters: str) -> bool:
    return bool(op.get_bind().scalar(text(question), parameters))
