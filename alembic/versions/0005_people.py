"""
People: what they see and change, by row-level security; what they did; their sessions.

A person's transaction runs as role `authenticated` with claims in `request.jwt.claims`, from the
dashboard as from Supabase's own API:

    outbox.claimed_organization()   whose rows they see; nobody's without a role of ours
    outbox.may_act()                coordinators, in a transaction that a transition has marked

The API cannot set the mark, so there the tables can be read, not written. The tables' owner, as
whom the worker runs, is not bound by any of this.

`organizations`, `mentors` and `certifications` may be adopted. Row-level security is never switched
on for a table that we did not make, since its other readers would see nothing; where its owner has
switched it on and we may change it, it gets the grants and policies of the dashboard. Elsewhere it
is left alone, and the dashboard says what is missing.

Revision ID: 0005
Revises: 0004
"""

from __future__ import annotations

from alembic import op, util
from sqlalchemy import text
from sqlalchemy.exc import ProgrammingError

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

ROLE = """
    DO $$
    BEGIN
        CREATE ROLE authenticated NOLOGIN NOINHERIT;
    EXCEPTION
        WHEN duplicate_object OR unique_violation THEN NULL;  -- somebody was faster
    END $$;
"""

CAN_BECOME = {
    True: "SELECT pg_has_role(current_user, 'authenticated', 'SET')",
    False: "SELECT pg_has_role(current_user, 'authenticated', 'MEMBER')",
}
"""Whether the migrating user may take the role, from PostgreSQL 16 on and before."""

MEMBERSHIP = {
    True: "GRANT authenticated TO CURRENT_USER WITH INHERIT FALSE, SET TRUE",
    False: "GRANT authenticated TO CURRENT_USER",
}

FUNCTIONS = """
    CREATE FUNCTION outbox.claimed_organization() RETURNS uuid
        LANGUAGE sql STABLE PARALLEL SAFE
    RETURN (
        SELECT CASE WHEN claims ->> 'hlf_role' IN ('viewer', 'coordinator')
                    THEN CAST(claims ->> 'organization_id' AS uuid) END
          FROM (SELECT CAST(nullif(current_setting('request.jwt.claims', true), '') AS jsonb)
                       -> 'app_metadata' AS claims) AS claimed);
    CREATE FUNCTION outbox.claimed_subject() RETURNS text
        LANGUAGE sql STABLE PARALLEL SAFE
    RETURN CAST(nullif(current_setting('request.jwt.claims', true), '') AS jsonb) ->> 'sub';
    CREATE FUNCTION outbox.in_transition() RETURNS boolean
        LANGUAGE sql STABLE PARALLEL SAFE
    RETURN coalesce(current_setting('hlf.transition', true) = 'on', false);
    CREATE FUNCTION outbox.may_act() RETURNS boolean
        LANGUAGE sql STABLE PARALLEL SAFE
    RETURN outbox.in_transition() AND coalesce(
        CAST(nullif(current_setting('request.jwt.claims', true), '') AS jsonb)
            -> 'app_metadata' ->> 'hlf_role' = 'coordinator', false);
    REVOKE ALL ON FUNCTION outbox.claimed_organization(), outbox.claimed_subject(),
        outbox.in_transition(), outbox.may_act() FROM PUBLIC;
    GRANT EXECUTE ON FUNCTION outbox.claimed_organization(), outbox.claimed_subject(),
        outbox.in_transition(), outbox.may_act() TO authenticated;
    GRANT USAGE ON SCHEMA outbox TO authenticated;
"""

TABLES = """
    CREATE TABLE outbox.audit (
        id bigint GENERATED ALWAYS AS IDENTITY,
        at timestamptz NOT NULL DEFAULT clock_timestamp(),
        organization_id uuid NOT NULL,
        subject text NOT NULL,
        name text NOT NULL,
        action text NOT NULL,
        target uuid,
        mentor_id uuid,
        outcome text NOT NULL,
        note text NOT NULL DEFAULT '',
        CONSTRAINT audit_pkey PRIMARY KEY (id),
        CONSTRAINT audit_action_known CHECK (action IN ('retry', 'handle', 'renew'))
    );
    CREATE INDEX audit_by_organization ON outbox.audit (organization_id, at);
    CREATE INDEX audit_by_target ON outbox.audit (target, at);
    CREATE INDEX audit_by_mentor ON outbox.audit (mentor_id, at);

    CREATE TABLE outbox.web_sessions (
        token_hash bytea NOT NULL,
        claims jsonb NOT NULL,
        created_at timestamptz NOT NULL DEFAULT now(),
        seen_at timestamptz NOT NULL DEFAULT now(),
        expires_at timestamptz NOT NULL,
        CONSTRAINT web_sessions_pkey PRIMARY KEY (token_hash)
    );
    CREATE INDEX web_sessions_by_end ON outbox.web_sessions (expires_at);

    CREATE TABLE outbox.idempotency (
        organization_id uuid NOT NULL,
        subject text NOT NULL,
        key text NOT NULL,
        request_hash bytea NOT NULL,
        answer jsonb NOT NULL,
        created_at timestamptz NOT NULL DEFAULT now(),
        CONSTRAINT idempotency_pkey PRIMARY KEY (organization_id, subject, key)
    );
    CREATE INDEX idempotency_by_age ON outbox.idempotency (created_at);

    CREATE INDEX dynamics_sync_failures_handled
        ON public.dynamics_sync_failures (mentor_id, version) WHERE resolution = 'manual';
    CREATE INDEX dynamics_sync_failures_handled_lately
        ON public.dynamics_sync_failures (organization_id, resolved_at)
        WHERE resolution = 'manual';

    REVOKE ALL ON outbox.audit, outbox.web_sessions, outbox.idempotency FROM PUBLIC;
    DO $$
    DECLARE api_role text;
    BEGIN
        FOR api_role IN SELECT rolname FROM pg_roles
                         WHERE rolname IN ('anon', 'authenticated', 'service_role')
        LOOP
            EXECUTE format('REVOKE ALL ON outbox.audit, outbox.web_sessions, outbox.idempotency'
                           ' FROM %I', api_role);
            EXECUTE format('REVOKE ALL ON ALL SEQUENCES IN SCHEMA outbox FROM %I', api_role);
        END LOOP;
    END $$;
"""

OURS = "organization_id = (SELECT outbox.claimed_organization())"
ACTING = "(SELECT outbox.may_act())"
MINE = f"{OURS} AND subject = (SELECT outbox.claimed_subject()) AND (SELECT outbox.in_transition())"

OUR_MENTORS = (
    "EXISTS (SELECT FROM public.mentors AS mentor WHERE mentor.id = mentor_id"
    " AND mentor.organization_id = (SELECT outbox.claimed_organization()))"
)
"""Of rows that know their mentor, and not the organisation."""

ADOPTABLE = {
    "public.organizations": {
        "SELECT": ("", "id = (SELECT outbox.claimed_organization())"),
    },
    "public.mentors": {"SELECT": ("", OURS)},
    "public.certifications": {
        "SELECT": ("", OUR_MENTORS),
        "UPDATE": ("(status, expires_on, expired_at, renewed_at)", f"{ACTING} AND {OUR_MENTORS}"),
    },
}

OPENED = {
    "public.mentor_pauses": {
        "SELECT": ("", OUR_MENTORS),
        "UPDATE": ("(resumed_at)", f"{ACTING} AND {OUR_MENTORS}"),
    },
    "public.portal_visibility": {
        "SELECT": ("", OURS),
        "INSERT": ("", f"{ACTING} AND {OURS}"),
        "UPDATE": ("", f"{ACTING} AND {OURS}"),
    },
    "public.portal_confirmations": {"SELECT": ("", OURS)},
    "public.dynamics_sync_failures": {
        "SELECT": ("", OURS),
        "UPDATE": ("(resolved_at, resolution, resolved_by)", f"{ACTING} AND {OURS}"),
    },
    "outbox.events": {
        "SELECT": ("", OURS),
        "INSERT": ("", f"{ACTING} AND {OURS}"),
        "UPDATE": ("", f"{ACTING} AND {OURS}"),
    },
    "outbox.settled": {"SELECT": ("", OURS)},
    "outbox.gates": {"SELECT": ("", OURS)},
    "outbox.nightly_runs": {"SELECT": ("", OURS)},
    # Who was refused is written down too, so whoever asks may add to it.
    "outbox.audit": {"SELECT": ("", OURS), "INSERT": ("", MINE)},
    "outbox.idempotency": {"SELECT": ("", MINE), "INSERT": ("", f"{MINE} AND {ACTING}")},
    # A receipt says nothing but that a transaction was committed.
    "outbox.commits": {"INSERT": ("", "(SELECT outbox.in_transition())")},
}
"""By table and command, the columns that are granted and the rows that they are granted for."""

CLOSED = ("outbox.web_sessions",)
"""Nobody's but the dashboard's own."""

CLAUSES = {
    "SELECT": "USING ({rows})",
    "INSERT": "WITH CHECK ({rows})",
    "UPDATE": "USING ({rows}) WITH CHECK ({rows})",
}


def upgrade() -> None:
    _require_role()
    op.execute(FUNCTIONS)
    op.execute(TABLES)
    for table, commands in ADOPTABLE.items():
        if _may_open(table):
            _open(table, commands)
    for table, commands in OPENED.items():
        op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
        _open(table, commands)
    for table in CLOSED:
        op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")


def downgrade() -> None:
    for table, commands in ADOPTABLE.items():
        # What somebody else granted to the role besides is not told apart, and stays.
        for command in commands:
            if _may_change(table):
                op.execute(f"DROP POLICY IF EXISTS hlf_sync_{command.lower()} ON {table}")
    for table, commands in OPENED.items():
        _close(table, commands)
        if table.startswith("outbox."):
            op.execute(f"ALTER TABLE {table} DISABLE ROW LEVEL SECURITY")
    op.execute("""
        DROP INDEX public.dynamics_sync_failures_handled_lately,
            public.dynamics_sync_failures_handled;
        DROP TABLE outbox.idempotency, outbox.web_sessions, outbox.audit;
        DROP FUNCTION outbox.may_act(), outbox.in_transition(), outbox.claimed_subject(),
            outbox.claimed_organization();
    """)
    if _is_there():
        op.execute("REVOKE USAGE ON SCHEMA outbox FROM authenticated")


def _require_role() -> None:
    """
    Make sure that `authenticated` is there and that we can act as it.
    """
    connection = op.get_bind()
    new = (connection.dialect.server_version_info or (0,)) >= (16,)
    try:
        with connection.begin_nested():
            if not _is_there():
                op.execute(ROLE)
            if not connection.scalar(text(CAN_BECOME[new])):
                op.execute(MEMBERSHIP[new])
    except ProgrammingError:
        raise util.CommandError(
            "People's transactions run as role `authenticated`, which this user may not make or "
            "take. As an administrator run: CREATE ROLE authenticated NOLOGIN (if there is none), "
            "and: GRANT authenticated TO this user. Then migrate again."
        ) from None


def _is_there() -> bool:
    known = text("SELECT count(*) > 0 FROM pg_roles WHERE rolname = 'authenticated'")
    return bool(op.get_bind().scalar(known))


def _may_change(table: str) -> bool:
    """
    Whether the table is the migrating user's to change.
    """
    return _of_class(table, "pg_has_role(current_user, relowner, 'USAGE')")


def _may_open(table: str) -> bool:
    """
    Whether rows can be granted without granting all of them.
    """
    return _may_change(table) and _of_class(table, "relrowsecurity")


def _of_class(table: str, question: str) -> bool:
    asked = text(f"SELECT {question} FROM pg_class WHERE oid = to_regclass(:table)")  # noqa: S608
    return bool(op.get_bind().scalar(asked, {"table": table}))


def _open(table: str, commands: dict[str, tuple[str, str]]) -> None:
    for command, (columns, rows) in commands.items():
        op.execute(f"GRANT {command} {columns} ON {table} TO authenticated")
        op.execute(
            f"CREATE POLICY hlf_sync_{command.lower()} ON {table} FOR {command} TO authenticated "
            + CLAUSES[command].format(rows=rows)
        )


def _close(table: str, commands: dict[str, tuple[str, str]]) -> None:
    for command, (columns, _) in commands.items():
        op.execute(f"DROP POLICY IF EXISTS hlf_sync_{command.lower()} ON {table}")
        if _is_there():  # or it took all that it had along
            op.execute(f"REVOKE {command} {columns} ON {table} FROM authenticated")
