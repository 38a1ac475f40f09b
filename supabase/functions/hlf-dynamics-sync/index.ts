/**
 * Sets the visibility of one organisation's mentors in its Dynamics, for its worker.
 *
 *     index ── edge (key, question, verdict) ── dynamics (one request) ── token (of Entra ID)
 *                 │                                └── classify ── tables (made from Python's)
 *                 └── settings, key
 *
 * It holds the Azure credentials, so that the worker does not have to. All its settings are
 * secrets of the function; `settings.ts` lists them.
 */

import { edge } from "./edge.ts";

Deno.serve(edge((name) => Deno.env.get(name)));
