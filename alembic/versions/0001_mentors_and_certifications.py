"""
Mentors and certifications: adopt the tables that exist, create those that do not.

A table that somebody else made is checked for what we need and otherwise left alone; the
upgrade stops with the whole list of what is missing. A table that we make carries a mark in
its comment, and only marked tables are dropped by the downgrade.

Revision ID: 0001
"""

from __future__ import annotations

from alembic import op, util
from sqlalchemy import text

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

MARK = "hlf-dynamics-sync"

TEXT = {"text", "character varying", "USER-DEFINED"}
TIME = {"timestamp with time zone"}

NEEDED: dict[str, dict[str, set[str]]] = {
    "organizations": {"id": {"uuid"}, "name": TEXT},
    "mentors": {
        "id": {"uuid"},
        "organization_id": {"uuid"},
        "full_name": TEXT,
        "dynamics_id": {"uuid"},
    },
    "certifications": {
        "id": {"uuid"},
        "mentor_id": {"uuid"},
        "expires_on": {"date"},
        "status": TEXT,
        "expired_at": TIME,
        "renewed_at": TIME,
    },
}
"""What we read and write, by table and column, with the types that will do."""

STATUS_WORDS = {"valid", "expired"}

CREATE = {
    "organizations": f"""
        CREATE TABLE public.organizations (
            id uuid NOT NULL DEFAULT gen_random_uuid(),
            name text NOT NULL,
            CONSTRAINT organizations_pkey PRIMARY KEY (id)
        );
        COMMENT ON TABLE public.organizations IS '{MARK}';
    """,
    "mentors": f"""
        CREATE TABLE public.mentors (
            id uuid NOT NULL DEFAULT gen_random_uuid(),
            organization_id uuid NOT NULL,
            full_name text NOT NULL,
            dynamics_id uuid,
            CONSTRAINT mentors_pkey PRIMARY KEY (id),
            CONSTRAINT mentors_organization_id_fkey
                FOREIGN KEY (organization_id) REFERENCES public.organizations (id)
        );
        CREATE INDEX mentors_by_organization ON public.mentors (organization_id);
        COMMENT ON TABLE public.mentors IS '{MARK}';
        COMMENT ON COLUMN public.mentors.dynamics_id IS 'The GUID of the row in Dynamics.';
    """,
    "certifications": f"""
        CREATE TABLE public.certifications (
            id uuid NOT NULL DEFAULT gen_random_uuid(),
            mentor_id uuid NOT NULL,
            expires_on date NOT NULL,
            status text NOT NULL DEFAULT 'valid',
            expired_at timestamptz,
            renewed_at timestamptz,
            CONSTRAINT certifications_pkey PRIMARY KEY (id),
            CONSTRAINT certifications_mentor_id_fkey
                FOREIGN KEY (mentor_id) REFERENCES public.mentors (id),
            CONSTRAINT certifications_status_known CHECK (status IN ('valid', 'expired')),
            CONSTRAINT certifications_expired_with_a_time
                CHECK ((status = 'expired') = (expired_at IS NOT NULL))
        );
        CREATE INDEX certifications_by_mentor ON public.certifications (mentor_id);
        CREATE INDEX certifications_running_out
            ON public.certifications (expires_on, mentor_id) WHERE status = 'valid';
        COMMENT ON TABLE public.certifications IS '{MARK}';
        COMMENT ON COLUMN public.certifications.expires_on IS 'The last valid day.';
    """,
}

LOCK_UP = """
    ALTER TABLE public.{table} ENABLE ROW LEVEL SECURITY;
    REVOKE ALL ON public.{table} FROM PUBLIC;
    DO $$
    DECLARE api_role text;
    BEGIN
        FOR api_role IN SELECT rolname FROM pg_roles
                         WHERE rolname IN ('anon', 'authenticated', 'service_role')
        LOOP
            EXECUTE format('REVOKE ALL ON public.{table} FROM %I', api_role);
        END LOOP;
    END $$;
"""
"""Closed to the API until grants and policies open it on purpose."""


def upgrade() -> None:
    existing = {table for table in NEEDED if _exists(table)}
    missing = [problem for table in sorted(existing) for problem in _problems(table)]
    if missing:
        raise util.CommandError(
            "The tables that are already there cannot be adopted. Nothing was changed. Missing: "
            + "; ".join(missing)
            + "."
        )
    for table, statements in CREATE.items():
        if table not in existing:
            op.execute(statements)
            op.execute(LOCK_UP.format(table=table))


def downgrade() -> None:
    for table in reversed(CREATE):
        if _mark(table) == MARK:
            op.execute(f"DROP TABLE public.{table}")


def _exists(table: str) -> bool:
    found = text("SELECT to_regclass(:name) IS NOT NULL")
    return bool(op.get_bind().execute(found, {"name": f"public.{table}"}).scalar())


def _mark(table: str) -> str | None:
    comment = text("SELECT obj_description(to_regclass(:name), 'pg_class')")
    mark: str | None = op.get_bind().execute(comment, {"name": f"public.{table}"}).scalar()
    return mark


def _problems(table: str) -> list[str]:
    rows = op.get_bind().execute(
        text(
            "SELECT column_name, data_type FROM information_schema.columns"
            " WHERE table_schema = 'public' AND table_name = :table"
        ),
        {"table": table},
    )
    types = {row.column_name: row.data_type for row in rows}
    problems = [
        f"{table}.{column} ({' or '.join(sorted(wanted - {'USER-DEFINED'}))})"
        + (f", which is {types[column]}" if column in types else "")
        for column, wanted in NEEDED[table].items()
        if types.get(column) not in wanted
    ]
    if types.get("status") == "USER-DEFINED" and (words := STATUS_WORDS - _labels(table, "status")):
        problems.append(f"{table}.status with the words {' and '.join(sorted(words))}")
    if "id" in types and not _id_is_unique(table):
        problems.append(f"a primary key on {table}.id")
    return problems


def _labels(table: str, column: str) -> set[str]:
    """
    The words of an enum column.
    """
    labels = text("""
        SELECT label.enumlabel
          FROM pg_attribute AS attribute
          JOIN pg_enum AS label ON label.enumtypid = attribute.atttypid
         WHERE attribute.attrelid = to_regclass(:name) AND attribute.attname = :column
    """)
    parameters = {"name": f"public.{table}", "column": column}
    return set(op.get_bind().execute(labels, parameters).scalars())


def _id_is_unique(table: str) -> bool:
    unique = text("""
        SELECT EXISTS (
            SELECT FROM pg_index AS index
              JOIN pg_attribute AS attribute
                ON attribute.attrelid = index.indrelid AND attribute.attnum = index.indkey[0]
             WHERE index.indrelid = to_regclass(:name)
               AND index.indisunique AND index.indimmediate
               AND index.indpred IS NULL AND index.indnkeyatts = 1 AND attribute.attname = 'id')
    """)
    return bool(op.get_bind().execute(unique, {"name": f"public.{table}"}).scalar())
