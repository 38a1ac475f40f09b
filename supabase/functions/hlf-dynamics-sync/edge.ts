/**
 * What is asked of the function and what it answers.
 *
 *     POST {organization_id, target, seconds, change: {row, visible, correlation_id} | null}
 *     200  {"outcome": "delivered"}, or "ready" where there was no change
 *     200  {"outcome": "failed", "class", "code", "message", "retry_after", "doubtful", …}
 *     4xx  no key, no such method, not such a question: nothing was sent
 *
 * It writes to its own target only, so a question about another one is refused.
 */

import { cappedBody } from "./body.ts";
import { type Failure, failure, isObject, jsonObject, Refusal } from "./classify.ts";
import { type Change, Dynamics, Refused } from "./dynamics.ts";
import { isLetIn, isLongEnough } from "./key.ts";
import {
  type Environment,
  isGuid,
  isSameTarget,
  keysOf,
  type Settings,
  settingsOf,
  type Target,
} from "./settings.ts";
import { MEANINGS } from "./tables.ts";

/** No question is longer. */
const MAX_QUESTION_BYTES = 4096;

/** No question gets more, whatever it asks for; the platform stops a request after 150 s. */
const MAX_SECONDS = 100;

/** No alternate key's value is longer. */
const MAX_ROW_LENGTH = 200;

interface Question {
  readonly organization: string;
  readonly target: Target;
  readonly seconds: number;
  readonly change: Change | null;
}

/** The function: from a request to its response. It is set up once, at the first request. */
export function edge(environment: Environment): (request: Request) => Promise<Response> {
  const keys = keysOf(environment);
  const settings = settingsOf(environment);
  const dynamics = isSettings(settings) ? new Dynamics(settings) : null;

  return async (request) => {
    if (request.method !== "POST") return refused(405, "post_only", { "Allow": "POST" });
    if (!await isLetIn(request.headers.get("authorization"), keys)) {
      return refused(401, keys.some(isLongEnough) ? "key_refused" : "no_key_of_32_characters_set");
    }
    if (!/^application\/json(;|$)/i.test(request.headers.get("content-type") ?? "")) {
      return refused(415, "json_only");
    }
    const body = await cappedBody(request, MAX_QUESTION_BYTES + 1);
    if (body.length > MAX_QUESTION_BYTES) return refused(413, "too_long");
    const question = questionIn(body);
    if (question === null) return refused(400, "no_such_question");
    if (!isSettings(settings) || dynamics === null) {
      return failed(failure(MEANINGS.NOT_SET_UP, settings as readonly string[]));
    }
    return await verdict(question, settings, dynamics);
  };
}

async function verdict(
  question: Question,
  settings: Settings,
  dynamics: Dynamics,
): Promise<Response> {
  if (question.organization !== settings.organization) {
    return failed(failure(MEANINGS.OTHER_ORGANIZATION));
  }
  if (!isSameTarget(settings.target, question.target)) {
    return failed(failure(MEANINGS.OTHER_TARGET));
  }
  const deadline = AbortSignal.timeout(Math.min(question.seconds, MAX_SECONDS) * 1000);
  try {
    if (question.change === null) {
      await dynamics.tokens.fresh(deadline);
      return answer(200, { outcome: "ready" });
    }
    await dynamics.setVisibility(question.change, deadline);
    return answer(200, { outcome: "delivered" });
  } catch (error) {
    if (error instanceof Refused) {
      return failed(error.failure, {
        status: error.status,
        service_request_id: error.serviceRequestId,
      });
    }
    if (error instanceof Refusal) return failed(error.failure);
    log({ event: "function.failed", error: error instanceof Error ? error.name : typeof error });
    return answer(500, { outcome: "unknown" });
  }
}

/** The question in a body, or null if it is none: nothing more and nothing less is accepted. */
export function questionIn(body: Uint8Array): Question | null {
  const { organization_id: organization, target, seconds, change, ...more } = jsonObject(body) ??
    {};
  if (Object.keys(more).length > 0) return null;
  if (typeof organization !== "string" || !isGuid(organization)) return null;
  if (typeof seconds !== "number" || !(seconds > 0)) return null;
  if (!isTarget(target)) return null;
  const asked = change === null ? null : changeIn(change, target);
  if (asked === undefined) return null;
  return { organization: organization.toLowerCase(), target, seconds, change: asked };
}

function changeIn(raw: unknown, target: Target): Change | undefined {
  if (!isObject(raw)) return undefined;
  const { row, visible, correlation_id: correlationId, ...more } = raw;
  if (Object.keys(more).length > 0 || typeof visible !== "boolean") return undefined;
  if (typeof correlationId !== "string" || !isGuid(correlationId)) return undefined;
  if (typeof row !== "string" || row === "" || row.length > MAX_ROW_LENGTH) return undefined;
  if (!row.isWellFormed()) return undefined;
  const byGuid = target.operation === "patch" && target.key === "";
  return byGuid && !isGuid(row) ? undefined : { row, visible, correlationId };
}

const TARGET_FIELDS = ["url", "entity_set", "key", "column", "operation", "action"];

function isTarget(raw: unknown): raw is Target {
  return isObject(raw) && Object.keys(raw).length === TARGET_FIELDS.length &&
    TARGET_FIELDS.every((name) => typeof raw[name] === "string");
}

function isSettings(settings: Settings | readonly string[]): settings is Settings {
  return !Array.isArray(settings);
}

/** A verdict: it was tried, or would have been, and this is what stands in the way. */
function failed(why: Failure, known: Record<string, string | number | null> = {}): Response {
  const { kind, code, message, retryAfter, doubtful } = why;
  log({ event: "request.refused", class: kind, code, ...known });
  return answer(200, {
    outcome: "failed",
    class: kind,
    code,
    message,
    retry_after: retryAfter,
    doubtful,
    ...known,
  });
}

/** No verdict: whoever asks is not let in, or does not ask as our worker does. */
function refused(status: number, code: string, headers: Record<string, string> = {}): Response {
  log({ event: "caller.refused", code });
  return answer(status, { outcome: "refused", code }, headers);
}

function answer(
  status: number,
  document: Record<string, unknown>,
  headers: Record<string, string> = {},
): Response {
  return Response.json(document, { status, headers: { "Cache-Control": "no-store", ...headers } });
}

/** One line of JSON; only codes and numbers ever get into it. */
function log(line: Record<string, string | number | null>): void {
  console.log(JSON.stringify(line));
}
