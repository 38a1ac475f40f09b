"""
What may be done, of what has to be: grants first, then the policies that let rows be seen.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from sqlalchemy import text

from worker.database import reading
from worker.doctor.finding import broken, warning, well
from worker.doctor.rights import ALL, BECOME_PEOPLE, PEOPLE, ROLES
from worker.errors import SchemaError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from sqlalchemy import Row
    from sqlalchemy.ext.asyncio import AsyncEngine

    from worker.doctor.finding import Finding
    from worker.doctor.rights import Duty

WHO = text("""
SELECT current_user AS name, quote_ident(current_user) AS quoted,
       ARRAY (SELECT CAST(rolname AS text) FROM pg_roles
               WHERE rolname = ANY (:roles) OR rolname = 'authenticated') AS known,
       ARRAY (SELECT CAST(rolname AS text) FROM pg_roles
               WHERE rolname = ANY (:roles) AND pg_has_role(oid, 'USAGE')
                 -- Whoever may everything is no member of anything.
                 AND NOT (SELECT rolsuper FROM pg_roles WHERE rolname = current_user)) AS roles
""")

# Names of schemas and tables are joined: a cast to regclass is refused where a schema is closed.
_NEEDED = """
SELECT needed.role, needed.name, needed.command, needed.columns, tables.oid,
       tables.relrowsecurity, tables.relforcerowsecurity, tables.relowner,
       role.rolsuper OR role.rolbypassrls AS sees_everything,
       CASE needed.command WHEN 'SELECT' THEN 'r' WHEN 'INSERT' THEN 'a' WHEN 'UPDATE' THEN 'w'
                           WHEN 'DELETE' THEN 'd' END AS polcmd
  FROM jsonb_to_recordset(CAST(:needed AS jsonb))
       AS needed (role text, schema text, relation text, name text, command text, columns text[])
  JOIN pg_namespace AS schemas ON schemas.nspname = needed.schema
  JOIN pg_class AS tables
    ON tables.relnamespace = schemas.oid AND tables.relname = needed.relation
  JOIN pg_roles AS role ON role.rolname = needed.role
"""

MISSING = text(f"""
WITH needed AS ({_NEEDED})
SELECT role, command || CASE WHEN lacking = '{{}}' THEN ''
                             ELSE ' (' || array_to_string(lacking, ', ') || ')' END
       || ' on ' || name AS what
  FROM (SELECT role, name, command, oid, columns,
               ARRAY (SELECT wanted FROM unnest(columns) AS wanted
                       WHERE NOT has_column_privilege(role, oid, wanted, command)
                       ORDER BY wanted) AS lacking
          FROM needed) AS looked
 WHERE CASE WHEN columns = '{{}}' THEN NOT has_table_privilege(role, oid, command)
            ELSE lacking <> '{{}}' END
 UNION
SELECT role, 'USAGE on schema ' || split_part(name, '.', 1)
  FROM needed
 WHERE NOT has_schema_privilege(role, split_part(name, '.', 1), 'USAGE')
 ORDER BY role, what
""")  # noqa: S608 (constants)

_IS_BOUND = """
       relrowsecurity
   AND NOT sees_everything
   AND (relforcerowsecurity OR NOT pg_has_role(role, relowner, 'USAGE'))
"""
"""Whether policies decide about the rows of this table for this role."""

HIDDEN = text(f"""
WITH needed AS ({_NEEDED})
SELECT DISTINCT role, name, command
  FROM needed
 WHERE {_IS_BOUND}
   AND NOT EXISTS (SELECT FROM pg_policy, unnest(polroles) AS to_role
                    WHERE polrelid = needed.oid AND polpermissive
                      AND polcmd IN ('*', needed.polcmd)
                      AND (to_role = 0 OR pg_has_role(role, to_role, 'USAGE')))
 ORDER BY role, name, command
""")  # noqa: S608 (constants)

# Whether a row passes such a policy only PostgreSQL can say. Every row passes one that says "true".
LIMITED = text(f"""
WITH needed AS ({_NEEDED})
SELECT DISTINCT role, quote_ident(polname) || ' on ' || name AS policy
  FROM needed
  JOIN pg_policy AS policies ON policies.polrelid = needed.oid AND NOT policies.polpermissive
                            AND policies.polcmd IN ('*', needed.polcmd)
 WHERE {_IS_BOUND}
   AND EXISTS (SELECT FROM unnest(polroles) AS to_role
                WHERE to_role = 0 OR pg_has_role(role, to_role, 'USAGE'))
   -- What is there is asked for USING, what is written for WITH CHECK, or else for USING, too.
   AND (needed.polcmd <> 'a' AND pg_get_expr(polqual, polrelid) <> 'true'
        OR needed.polcmd IN ('a', 'w')
           AND pg_get_expr(coalesce(polwithcheck, polqual), polrelid) <> 'true')
 ORDER BY role, policy
""")  # noqa: S608 (constants)

LIFT = (
    "As the tables' owner, drop these policies, or say in each whom it is meant for "
    "(ALTER POLICY … ON … TO …)."
)

# From PostgreSQL 16 on a member may be kept from becoming what it is a member of.
CANNOT_BECOME = text("""
SELECT role, 'authenticated' AS what
  FROM unnest(CAST(:roles AS text[])) AS role
 WHERE NOT pg_has_role(role, 'authenticated',
                       CASE WHEN CAST(current_setting('server_version_num') AS integer) < 160000
                            THEN 'MEMBER' ELSE 'SET' END)
 ORDER BY role
""")

CLAUSES: Mapping[str, str] = {
    "SELECT": "USING (true)",
    "INSERT": "WITH CHECK (true)",
    "UPDATE": "USING (true) WITH CHECK (true)",
    "DELETE": "USING (true)",
}


async def of_this_user(engine: AsyncEngine) -> Finding:
    """
    Whoever runs this command: the duties of our roles that it has; without any, of every command.
    """
    who = await _who(engine)
    duties = [duty for role in who.roles for duty in ROLES[role]] or ALL
    missing, hidden = await _lacking(engine, {who.name: duties})
    if {*who.roles} & {*BECOME_PEOPLE} and "authenticated" in who.known:
        missing = [*missing, *await _cannot_become(engine, [who.name])]
    whom = who.roles[0] if len(who.roles) == 1 else who.quoted
    if missing:
        return broken(
            "grants",
            "missing: " + ", ".join(row.what for row in missing),
            "As the tables' owner: " + _statements(_grant(row.what, whom) for row in missing),
        )
    if hidden:
        return broken(
            "grants",
            "row level security hides every row of "
            + ", ".join(dict.fromkeys(row.name for row in hidden)),
            "Log in as a member of our roles, give this user BYPASSRLS, or as the tables' owner: "
            + _statements(_policy(row, whom) for row in hidden),
        )
    if limited := await _limited(engine, {who.name: duties}):
        policies = ", ".join(row.policy for row in limited)
        return warning("grants", f"a restrictive policy may keep rows from it: {policies}", LIFT)
    part = f"{' and '.join(who.roles)} has to" if who.roles else "is needed"
    return well("grants", f"this user may do all that {part}")


async def of_the_roles(engine: AsyncEngine) -> Finding:
    """
    Each of our roles, whoever asks; those of the user who asks have been told of already. Of
    people too, but which rows they see is more than a statement to paste.
    """
    who = await _who(engine)
    if absent := sorted({*ROLES, "authenticated"} - {*who.known}):
        return broken(
            "roles",
            f"missing: {', '.join(absent)}",
            "As an administrator, and then run the doctor again, which says what to grant: "
            + _statements(f"CREATE ROLE {role} NOLOGIN{_inherit(role)};" for role in absent),
        )
    others = {role: ROLES[role] for role in ROLES if role not in who.roles}
    missing, hidden = await _lacking(engine, others)
    denied, unseen = await _lacking(engine, {"authenticated": [PEOPLE]})
    missing = [*missing, *denied]
    missing += await _cannot_become(engine, [role for role in others if role in BECOME_PEOPLE])
    # Whom an owner keeps people from is the owner's business.
    limited = await _limited(engine, others)
    if not missing and not hidden and not unseen and not limited:
        return well("roles", "each may do what its part needs")
    says = [f"{row.role} lacks {row.what}" for row in missing]
    says += [
        f"{row.role} has no policy for {row.command} on {row.name}" for row in [*hidden, *unseen]
    ]
    says += [f"{row.role} may be kept from rows by the restrictive {row.policy}" for row in limited]
    cures = [_grant(row.what, row.role) for row in missing]
    cures += [_policy(row, row.role) for row in hidden]
    cure = ["Make people's policies again as migration 0005 has them."] if unseen else []
    cure += [LIFT] if limited else []
    if cures:
        cure.append("As the tables' owner, if you log in as these: " + _statements(cures))
    return warning("roles", "; ".join(says), " ".join(cure))


async def may(engine: AsyncEngine, duty: Duty) -> bool:
    """
    Whether whoever runs this command may do this.
    """
    return not await _lacks(engine, duty)


async def require(engine: AsyncEngine, duty: Duty) -> None:
    """
    Check before a long run what would go wrong in it again and again.

    Raises:
        SchemaError: this user lacks something.
    """
    if lacks := await _lacks(engine, duty):
        raise SchemaError(
            f"The database user lacks what a worker needs: {', '.join(lacks)}. Log in as a member "
            "of hlf_sync_worker, or see `hlf-sync doctor`."
        )


async def _lacks(engine: AsyncEngine, duty: Duty) -> list[str]:
    who = await _who(engine)
    missing, hidden = await _lacking(engine, {who.name: [duty]})
    return [
        *(row.what for row in missing),
        *(f"a policy for {row.command} on {row.name}" for row in hidden),
    ]


async def _who(engine: AsyncEngine) -> Row[Any]:
    async with reading(engine) as connection:
        return (await connection.execute(WHO, {"roles": list(ROLES)})).one()


async def _lacking(
    engine: AsyncEngine, duties: Mapping[str, Sequence[Duty]]
) -> tuple[Sequence[Row[Any]], Sequence[Row[Any]]]:
    """
    By role: what is not granted, and what no policy lets be seen or done.
    """
    needed = [one for role, parts in duties.items() for one in _needed(role, parts)]
    parameters = {"needed": json.dumps(needed)}
    async with reading(engine) as connection:
        missing = (await connection.execute(MISSING, parameters)).all()
        hidden = (await connection.execute(HIDDEN, parameters)).all()
    return missing, hidden


async def _limited(engine: AsyncEngine, duties: Mapping[str, Sequence[Duty]]) -> Sequence[Row[Any]]:
    """
    By role: policies that may take away rows which others show.
    """
    needed = [one for role, parts in duties.items() for one in _needed(role, parts)]
    async with reading(engine) as connection:
        return (await connection.execute(LIMITED, {"needed": json.dumps(needed)})).all()


async def _cannot_become(engine: AsyncEngine, roles: Sequence[str]) -> Sequence[Row[Any]]:
    """
    Those of them that cannot do as people what people ask of them.
    """
    async with reading(engine) as connection:
        return (await connection.execute(CANNOT_BECOME, {"roles": list(roles)})).all()


def _needed(role: str, duties: Iterable[Duty]) -> Iterator[dict[str, Any]]:
    """
    Each table and command once, with the columns of all duties; none are all of them.
    """
    together: dict[tuple[str, str], set[str]] = {}
    whole = set()
    for duty in duties:
        for name, commands in duty.items():
            for command, columns in commands.items():
                together.setdefault((name, command), set()).update(columns.split(", "))
                if not columns:
                    whole.add((name, command))
    for (name, command), wanted in together.items():
        schema, relation = name.split(".")
        yield {
            "role": role,
            "schema": schema,
            "relation": relation,
            "name": name,
            "command": command,
            "columns": [] if (name, command) in whole else sorted(wanted),
        }


def _grant(what: str, role: str) -> str:
    return f"GRANT {what.replace(' on ', ' ON ')} TO {role};"


def _inherit(role: str) -> str:
    return " NOINHERIT" if role in (*BECOME_PEOPLE, "authenticated") else ""


def _policy(row: Row[Any], role: str) -> str:
    whose = role if role in ROLES else "hlf_sync_own"
    return (
        f"CREATE POLICY {whose}_{row.command.lower()} ON {row.name} FOR {row.command} TO {role} "
        f"{CLAUSES[row.command]};"
    )


def _statements(each: Iterable[str]) -> str:
    return " ".join(dict.fromkeys(each))
