"""
The Edge Function's tables, made from the worker's: `python -m tests.integration.edge_tables`.

    worker/dynamics/errors.py, edge_errors.py ──► supabase/functions/hlf-dynamics-sync/tables.ts

They are written down there, so that the function can be deployed as it lies. A test compares.
"""

from __future__ import annotations

import json

from tests.conftest import ROOT
from worker.dynamics import errors
from worker.dynamics.edge_errors import KINDS, SAID_BY_THE_FUNCTION

FUNCTION = ROOT / "supabase" / "functions" / "hlf-dynamics-sync"
FILE = FUNCTION / "tables.ts"

_MEANINGS = {
    name: meaning for name, meaning in vars(errors).items() if isinstance(meaning, errors.Meaning)
} | SAID_BY_THE_FUNCTION
_NAMES = {id(meaning): name for name, meaning in _MEANINGS.items()}
_CLASSES = {kind: name for name, kind in KINDS.items()}

_HEAD = """\
/**
 * What answers mean, in tables. Made from the worker's `errors.py`, `edge_errors.py`; never edited:
 *
 *     python -m tests.integration.edge_tables
 */

/** What a failure is to the worker. */
export interface Meaning {
  readonly kind: "transient" | "throttled" | "permanent" | "configuration";
  /** Stable; machines and support rely on it. */
  readonly code: string;
  /** One sentence for people, without its full stop. */
  readonly says: string;
  /** The request may yet take effect. */
  readonly doubtful: boolean;
}
"""


def text() -> str:
    """
    The file as it has to be.
    """
    meanings = "".join(
        f"  {name}: {_meaning(meaning)},\n" for name, meaning in sorted(_MEANINGS.items())
    )
    in_doubt = ", ".join(str(int(status)) for status in sorted(errors._IN_DOUBT))
    return (
        f"{_HEAD}\nexport const MEANINGS = {{\n{meanings}}} as const satisfies"
        " Record<string, Meaning>;\n"
        + _table(
            "An error code of Dataverse, as an unsigned number of 32 bits.",
            "BY_CODE",
            "number",
            {row.hex.lower(): row.meaning for row in errors.DATAVERSE_CODES},
        )
        + _table(
            "An HTTP status of Dynamics, for answers without a known error code.",
            "BY_STATUS",
            "number",
            {str(int(row.status)): row.meaning for row in errors.STATUSES},
        )
        + _table(
            "An `error` word of the token endpoint.",
            "BY_WORD",
            "string",
            {json.dumps(row.word): row.meaning for row in errors.OAUTH_ERRORS},
        )
        + "\n/** Statuses after which a request may yet take effect, whatever they mean. */\n"
        f"export const IN_DOUBT: ReadonlySet<number> = new Set([{in_doubt}]);\n"
    )


def _meaning(meaning: errors.Meaning) -> str:
    """
    An object, a line for each field.
    """
    return (
        "{\n"
        f'    kind: "{_CLASSES[meaning.kind]}",\n'
        f'    code: "{meaning.code}",\n'
        f"    says: {json.dumps(meaning.says)},\n"
        f"    doubtful: {json.dumps(meaning.doubtful)},\n"
        "  }"
    )


def _table(says: str, name: str, key: str, rows: dict[str, errors.Meaning]) -> str:
    lines = "".join(
        f"  [{word}, MEANINGS.{_NAMES[id(meaning)]}],\n" for word, meaning in rows.items()
    )
    of = f"Map<{key}, Meaning>"
    return f"\n/** {says} */\nexport const {name}: Readonly{of} = new {of}([\n{lines}]);\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
