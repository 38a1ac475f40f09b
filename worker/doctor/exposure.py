"""
Who else reaches our tables, past row-level security or past the transitions; and whether the
app is told of failures.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import text

from worker.database import reading
from worker.doctor.finding import broken, warning, well
from worker.doctor.rights import PEOPLE, ROLES
from worker.tables import ADOPTABLE, MARK, OWNED

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    from worker.doctor.finding import Finding

UNSECURED = text("""
SELECT schemas.nspname || '.' || tables.relname AS name, tables.relrowsecurity AS enabled
  FROM pg_class AS tables
  JOIN pg_namespace AS schemas ON schemas.oid = tables.relnamespace
 WHERE NOT (tables.relrowsecurity AND tables.relforcerowsecurity)
   AND (schemas.nspname || '.' || tables.relname = ANY (:owned)
        OR schemas.nspname || '.' || tables.relname = ANY (:adoptable)
           AND obj_description(tables.oid, 'pg_class') = :mark)
 ORDER BY name
""")

# What everybody has is said of PUBLIC alone.
REACHED = text("""
WITH held AS (
    SELECT role, privilege, 'outbox.' || tables.relname AS what, tables.relname
      FROM unnest(CAST(:api AS text[])) AS role,
           unnest(CAST(:privileges AS text[])) AS privilege,
           pg_class AS tables
     WHERE tables.relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = 'outbox')
       AND tables.relkind IN ('r', 'p', 'v', 'm', 'f')
       AND (role = 'public' OR to_regrole(role) IS NOT NULL)
       AND CASE WHEN privilege IN ('SELECT', 'INSERT', 'UPDATE', 'REFERENCES')
                THEN has_any_column_privilege(role, tables.oid, privilege)
                ELSE has_table_privilege(role, tables.oid, privilege) END
       AND NOT (role = 'authenticated'
                AND tables.relname || ' ' || privilege = ANY (:open_to_people))
     UNION ALL
    SELECT role, privilege, 'SCHEMA outbox', ''
      FROM unnest(CAST(:api AS text[])) AS role, unnest(ARRAY['USAGE', 'CREATE']) AS privilege
     WHERE (role = 'public' OR to_regrole(role) IS NOT NULL)
       AND has_schema_privilege(role, 'outbox', privilege)
       AND NOT (role = 'authenticated' AND privilege = 'USAGE')
)
SELECT role, privilege, what
  FROM held
 WHERE role = 'public'
    OR NOT EXISTS (SELECT FROM held AS everybody
                    WHERE everybody.role = 'public' AND everybody.privilege = held.privilege
                      AND everybody.what = held.what)
 ORDER BY what, privilege, role
""")

# The policies of ours let `authenticated` change something in a transition only.
CHANGERS = text("""
WITH granted AS (
    SELECT tables.oid, tables.relowner, tables.relrowsecurity, acl.grantee, acl.privilege_type
      FROM pg_class AS tables, aclexplode(tables.relacl) AS acl
     WHERE tables.oid = CAST('public.certifications' AS regclass)
     UNION
    SELECT tables.oid, tables.relowner, tables.relrowsecurity, acl.grantee, acl.privilege_type
      FROM pg_class AS tables
      JOIN pg_attribute AS columns ON columns.attrelid = tables.oid,
           aclexplode(columns.attacl) AS acl
     WHERE tables.oid = CAST('public.certifications' AS regclass)
)
SELECT coalesce(CAST(role.rolname AS text), 'PUBLIC') AS name
  FROM granted
  LEFT JOIN pg_roles AS role ON role.oid = granted.grantee
 WHERE granted.privilege_type IN ('INSERT', 'UPDATE', 'DELETE', 'TRUNCATE')
   AND granted.grantee <> granted.relowner
   AND coalesce(role.rolname <> ALL (:ours) AND role.rolname <> current_user, true)
   AND (NOT granted.relrowsecurity
        OR granted.privilege_type = 'TRUNCATE'
        OR role.rolsuper OR role.rolbypassrls
        OR EXISTS (SELECT FROM pg_policy, unnest(polroles) AS to_role
                    WHERE polrelid = granted.oid AND polpermissive
                      AND polname NOT LIKE 'hlf\\_sync\\_%'
                      AND polcmd IN ('*', CASE granted.privilege_type WHEN 'INSERT' THEN 'a'
                                          WHEN 'UPDATE' THEN 'w' ELSE 'd' END)
                      AND (to_role = 0 OR to_role = granted.grantee
                           OR role.oid IS NOT NULL AND pg_has_role(role.oid, to_role, 'USAGE'))))
 UNION
SELECT CAST(member.rolname AS text)
  FROM granted
  JOIN pg_roles AS role ON role.oid = granted.grantee AND role.rolname <> ALL (:ours)
  JOIN pg_roles AS member ON pg_has_role(member.oid, role.oid, 'USAGE')
 WHERE granted.privilege_type IN ('INSERT', 'UPDATE', 'DELETE', 'TRUNCATE')
   AND granted.grantee <> granted.relowner
   AND member.rolbypassrls AND NOT member.rolsuper
   AND NOT pg_has_role(member.oid, granted.relowner, 'USAGE')
   AND member.rolname <> current_user
 ORDER BY name
""")

TOLD = text("""
SELECT EXISTS (SELECT FROM pg_publication_tables
                WHERE pubname = publication.pubname AND schemaname = 'public'
                  AND tablename = 'dynamics_sync_failures') AS joined
  FROM pg_publication AS publication
 WHERE pubname = 'supabase_realtime'
""")

API = ("public", "anon", "authenticated", "service_role")
PRIVILEGES = ("SELECT", "INSERT", "UPDATE", "DELETE", "TRUNCATE", "REFERENCES", "TRIGGER")


async def examine_exposure(engine: AsyncEngine) -> AsyncIterator[Finding]:
    """
    Row-level security, the API's reach, who changes certifications past us, and Realtime.
    """
    async with reading(engine) as connection:
        findings = [
            await _row_security(connection),
            await _api(connection),
            await _certifications(connection),
            await _realtime(connection),
        ]
    for finding in findings:
        if finding is not None:
            yield finding


async def _row_security(connection: AsyncConnection) -> Finding:
    rows = (
        await connection.execute(
            UNSECURED,
            {
                "owned": [str(table) for table in OWNED],
                "adoptable": [str(table) for table in ADOPTABLE],
                "mark": MARK,
            },
        )
    ).all()
    if not rows:
        return well("row security", "holds on every table of ours, for its owner too")
    cure = "As the tables' owner: " + " ".join(
        f"ALTER TABLE {row.name} ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;"
        for row in rows
    )
    if off := [row.name for row in rows if not row.enabled]:
        return broken("row security", f"is off on {', '.join(off)}", cure)
    names = ", ".join(row.name for row in rows)
    return warning("row security", f"does not bind the owner of {names}", cure)


async def _api(connection: AsyncConnection) -> Finding:
    rows = (
        await connection.execute(
            REACHED,
            {
                "api": list(API),
                "privileges": list(PRIVILEGES),
                "open_to_people": [
                    f"{name.removeprefix('outbox.')} {command}"
                    for name, commands in PEOPLE.items()
                    if name.startswith("outbox.")
                    for command in commands
                ],
            },
        )
    ).all()
    if not rows:
        return well("API", "reaches nothing of the outbox but what policies open to people")
    names = {row: "PUBLIC" if row.role == "public" else row.role for row in rows}
    return broken(
        "API",
        "; ".join(f"{names[row]} has {row.privilege} on {row.what}" for row in rows),
        "As the owner: "
        + " ".join(f"REVOKE {row.privilege} ON {row.what} FROM {names[row]};" for row in rows),
    )


async def _certifications(connection: AsyncConnection) -> Finding:
    """
    A change that passes by the transitions reaches the portal a night late.
    """
    names = (await connection.scalars(CHANGERS, {"ours": list(ROLES)})).all()
    if not names:
        return well("certifications", "nobody was granted to change them past the transitions")
    return warning(
        "certifications",
        f"{', '.join(names)} may change them directly, past the transitions",
        "Let apps renew through the API or the service, and take back INSERT, UPDATE and DELETE "
        "where nothing needs them; what is changed directly, the next `hlf-sync nightly` catches.",
    )


async def _realtime(connection: AsyncConnection) -> Finding | None:
    """
    Only where there is such a publication; elsewhere nobody listens.
    """
    joined = await connection.scalar(TOLD)
    if joined is None:
        return None
    if not joined:
        return warning(
            "Realtime",
            "an app that subscribes to dynamics_sync_failures hears nothing",
            "As the publication's owner: ALTER PUBLICATION supabase_realtime ADD TABLE"
            " public.dynamics_sync_failures;",
        )
    return well("Realtime", "tells coordinators of dynamics_sync_failures")
