/**
 * What an answer of Dynamics, or of Entra ID, means; the same as the worker's `errors.py`, from
 * the same tables. A server's own words never get into it: they may hold GUIDs and names.
 */

import { BY_CODE, BY_STATUS, BY_WORD, IN_DOUBT, type Meaning, MEANINGS } from "./tables.ts";

/** The longest wait that a server may order, in seconds. */
export const MAX_RETRY_AFTER = 600;

/** Longer bodies are not parsed; no error of Dataverse is nearly as long. */
export const MAX_JSON_BYTES = 64 * 1024;

/** Letters only, and the prefix of a custom table: no GUID, no name with digits gets through. */
const PRIVILEGE = /(?<![\p{L}\p{N}_])prv[A-Za-z]{1,64}(?:_[A-Za-z]{1,64}){0,3}(?![\p{L}\p{N}_])/u;

/** An answer whose body was read, perhaps not to its end. */
export interface Answer {
  readonly status: number;
  readonly headers: Headers;
  readonly body: Uint8Array;
}

/** Why a value was not confirmed. */
export interface Failure {
  readonly kind: Meaning["kind"];
  readonly code: string;
  readonly message: string;
  /** Seconds, where a server said so. */
  readonly retryAfter: number | null;
  /** The request may yet take effect. */
  readonly doubtful: boolean;
}

/** Thrown where there is nothing to return; its cause is dropped, as it may hold a header. */
export class Refusal extends Error {
  constructor(readonly failure: Failure) {
    super(failure.message);
  }
}

/** A failure with this meaning. */
export function failure(
  meaning: Meaning,
  details: readonly string[] = [],
  known: { retryAfter?: number | null; doubtful?: boolean } = {},
): Failure {
  const brackets = details.length > 0 ? ` (${details.join(", ")})` : "";
  return {
    kind: meaning.kind,
    code: meaning.code,
    message: `${meaning.says}${brackets}.`,
    retryAfter: meaning.kind === "throttled" ? known.retryAfter ?? null : null,
    doubtful: meaning.doubtful || (known.doubtful ?? false),
  };
}

/** What an answer of Dynamics means that is not the one hoped for. */
export function failureOfAnswer(answer: Answer, now: Date): Failure {
  const said = saidIn(answer.body);
  const meaning = meaningOf(answer.status, said);
  const details = [`HTTP ${answer.status}`];
  if (said?.code) details.push(`0x${said.code.toString(16).padStart(8, "0")}`);
  const privilege = meaning === MEANINGS.FORBIDDEN && PRIVILEGE.exec(said?.message ?? "");
  if (privilege) details.push(`missing ${privilege[0]}`);
  return failure(meaning, details, {
    retryAfter: retryAfterSeconds(answer.headers.get("retry-after"), now),
    doubtful: IN_DOUBT.has(answer.status),
  });
}

/** What an answer of the token endpoint means that brought no usable token. */
export function failureOfTokenAnswer(answer: Answer, now: Date): Failure {
  const details = [`HTTP ${answer.status}`];
  let meaning = tokenMeaningOf(answer.status);
  const word = jsonObject(answer.body)?.["error"];
  const known = typeof word === "string" ? BY_WORD.get(word) : undefined;
  if (known !== undefined) {
    details.push(String(word));
    if (meaning === MEANINGS.TOKEN_REFUSED) meaning = known;
  }
  return failure(meaning, details, {
    retryAfter: retryAfterSeconds(answer.headers.get("retry-after"), now),
  });
}

/**
 * What it means that no answer came, from the words of the runtime, which has no codes.
 *
 * Only where it says that it could not connect is it certain that nothing was sent.
 */
export function failureOfException(error: unknown): Failure {
  const words = wordsOf(error);
  if (isLate(error)) return failure(MEANINGS.TIMEOUT, [], { doubtful: true });
  if (hasNoConnection(error)) {
    const meaning = isUntrusted(error) ? MEANINGS.CERTIFICATE : MEANINGS.UNREACHABLE;
    return failure(meaning);
  }
  const incomplete = /before message completed|invalid HTTP|parsed|reading a body|unexpected end/i;
  const meaning = incomplete.test(words) ? MEANINGS.INCOMPLETE_ANSWER : MEANINGS.CONNECTION_LOST;
  return failure(meaning, [], { doubtful: true });
}

/** Whether no connection was made, so that nothing can have been sent. */
export function hasNoConnection(error: unknown): boolean {
  return /client error \(Connect\)|tcp connect error|dns error/.test(wordsOf(error));
}

/** Whether that is due to a certificate, which no new try will mend. */
export function isUntrusted(error: unknown): boolean {
  return /certificate/i.test(wordsOf(error));
}

function isLate(error: unknown): boolean {
  return error instanceof DOMException && /TimeoutError|AbortError/.test(error.name);
}

function wordsOf(error: unknown): string {
  if (!(error instanceof Error)) return "";
  return `${error.message} ${error.cause === undefined ? "" : wordsOf(error.cause)}`;
}

/**
 * How long a Retry-After header asks to keep away: seconds, or a date of RFC 9110; at most 10
 * minutes, and null where it says neither.
 */
export function retryAfterSeconds(value: string | null, now: Date): number | null {
  const text = (value ?? "").trim();
  if (/^[0-9]+(\.[0-9]+)?$/.test(text)) return Math.min(Number(text), MAX_RETRY_AFTER);
  if (!/^[A-Z][a-z]{2,8},? .*\d\d:\d\d:\d\d/.test(text)) return null;
  const moment = Date.parse(/ GMT$/.test(text) ? text : `${text} GMT`);
  if (Number.isNaN(moment)) return null;
  return Math.min(Math.max((moment - now.getTime()) / 1000, 0), MAX_RETRY_AFTER);
}

/** A body as a JSON object, or null if it is none or too long. */
export function jsonObject(body: Uint8Array): Record<string, unknown> | null {
  if (body.length > MAX_JSON_BYTES) return null;
  try {
    const document: unknown = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(body));
    return isObject(document) ? document : null;
  } catch {
    return null;
  }
}

/** Whether a value of JSON is an object. */
export function isObject(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

interface Said {
  readonly code: number | null;
  readonly blank: boolean;
  readonly message: string;
}

function meaningOf(status: number, said: Said | null): Meaning {
  if (status < 300) return MEANINGS.UNEXPECTED_ANSWER;
  if (status < 400) return MEANINGS.REDIRECT_REFUSED;
  if (status === 429) return MEANINGS.THROTTLED;
  const known = said?.code ? BY_CODE.get(said.code) : undefined;
  if (known !== undefined) return known;
  if (status === 404) return missing(said);
  return BY_STATUS.get(status) ?? unlisted(status);
}

/** A 404 is about the record only where Dataverse says so; else the address is wrong. */
function missing(said: Said | null): Meaning {
  const record = said?.blank && said.message.toLowerCase().includes("does not exist");
  return record ? MEANINGS.RECORD_NOT_FOUND : MEANINGS.WRONG_ADDRESS;
}

function unlisted(status: number): Meaning {
  const code = `http_${status}`;
  return status < 500
    ? { kind: "permanent", code, says: "Dynamics refused the request", doubtful: false }
    : { kind: "transient", code, says: "Dynamics failed to answer", doubtful: false };
}

function tokenMeaningOf(status: number): Meaning {
  if (status < 300) return MEANINGS.TOKEN_UNUSABLE;
  if (status < 400) return MEANINGS.REDIRECT_REFUSED;
  if (status === 429) return MEANINGS.TOKEN_THROTTLED;
  if (status === 408 || status >= 500) return MEANINGS.TOKEN_UNAVAILABLE;
  return MEANINGS.TOKEN_REFUSED;
}

/** The error in a body, or null if it is in none of Dataverse's spellings. */
function saidIn(body: Uint8Array): Said | null {
  const document = lowerKeys(jsonObject(body) ?? {});
  const error = document["error"];
  if (!isObject(error) && !("errorcode" in document)) return null;
  const fields = isObject(error) ? lowerKeys(error) : document;
  const raw = "code" in fields ? fields["code"] : fields["errorcode"];
  const code = codeOf(raw);
  const message = fields["message"];
  return {
    code: code || null,
    blank: raw === undefined || raw === null || raw === "" || code === 0,
    message: typeof message === "string" ? message : "",
  };
}

/** An error code as an unsigned number of 32 bits, from hexadecimal or (signed) decimal. */
function codeOf(raw: unknown): number | null {
  let code: number;
  if (typeof raw === "number" && Number.isInteger(raw)) code = raw;
  else if (typeof raw === "string" && HEX.test(raw.trim())) code = Number.parseInt(raw.trim(), 16);
  else if (typeof raw === "string" && DECIMAL.test(raw.trim())) code = Number(raw.trim());
  else return null;
  return -(2 ** 31) <= code && code < 2 ** 32 ? code >>> 0 : null;
}

const HEX = /^0[xX][0-9a-fA-F]{1,8}$/;
const DECIMAL = /^-?[0-9]{1,10}$/;

function lowerKeys(fields: Record<string, unknown>): Record<string, unknown> {
  return Object.fromEntries(
    Object.entries(fields).map(([name, value]) => [name.toLowerCase(), value]),
  );
}
