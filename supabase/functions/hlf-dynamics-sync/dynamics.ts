/**
 * One request that sets one column of one record, and nothing else.
 *
 * The permission is "write this field": nothing is ever read, and no answer with data is asked
 * for. The request is the same, header by header, as the worker's own in `client.py`.
 */

import { cappedBody } from "./body.ts";
import {
  type Answer,
  failure,
  failureOfAnswer,
  failureOfException,
  hasNoConnection,
  isUntrusted,
  jsonObject,
  Refusal,
} from "./classify.ts";
import { isGuid, type Settings, type Target } from "./settings.ts";
import { MEANINGS } from "./tables.ts";
import { Tokens } from "./token.ts";

/** Milliseconds between the three tries, as long as no connection could be made. */
const WAITS = [100, 200];

/** What Microsoft's support asks for is in the first of these that is there. */
const REQUEST_IDS = ["x-ms-service-request-id", "req_id", "x-ms-request-id"];

/** A value to write. */
export interface Change {
  /** GUID of the record, or the value of the alternate key if there is one. */
  readonly row: string;
  readonly visible: boolean;
  /** Of the event; the same at each attempt. */
  readonly correlationId: string;
}

/** Writes to one Dynamics, with the tokens of one application. */
export class Dynamics {
  readonly tokens: Tokens;

  constructor(readonly settings: Settings) {
    this.tokens = new Tokens(settings);
  }

  /**
   * Write the value; returns when Dynamics has confirmed it.
   *
   * @param deadline for everything: token, connection, new tries, the answer's last byte
   * @throws {Refused} it did not; the answer may have said why
   */
  async setVisibility(change: Change, deadline: AbortSignal): Promise<void> {
    const token = await this.tokens.fresh(deadline);
    let answer = await this.#try(change, token, deadline);
    if (answer.status === 401) {
      this.tokens.forget(token);
      answer = await this.#try(change, await this.tokens.fresh(deadline), deadline);
    }
    if (!isExpected(answer, this.settings.target)) throw new Refused(answer);
  }

  /** Ask once, and again as long as it certainly did not reach Dynamics. */
  async #try(change: Change, token: string, deadline: AbortSignal): Promise<Answer> {
    for (const wait of WAITS) {
      try {
        return await this.#ask(change, token, deadline);
      } catch (error) {
        if (!hasNoConnection(error) || isUntrusted(error)) throw refusal(error);
      }
      await pause(wait, deadline);
    }
    return await this.#ask(change, token, deadline).catch((error) => {
      throw refusal(error);
    });
  }

  async #ask(change: Change, token: string, deadline: AbortSignal): Promise<Answer> {
    if (deadline.aborted) throw new Refusal(failure(MEANINGS.TIMEOUT)); // and nothing was sent
    const { target } = this.settings;
    const isPatch = target.operation === "patch";
    const response = await fetch(addressOf(target, change.row), {
      method: isPatch ? "PATCH" : "POST",
      headers: {
        "Accept": "application/json",
        "Accept-Encoding": "identity",
        "Authorization": `Bearer ${token}`,
        "Content-Type": "application/json",
        // Without it a PATCH creates the record that it does not find.
        ...(isPatch ? { "If-Match": "*" } : {}),
        "OData-MaxVersion": "4.0",
        "OData-Version": "4.0",
        "User-Agent": "hlf-dynamics-sync",
        "x-ms-client-request-id": crypto.randomUUID(),
        "x-ms-correlation-id": change.correlationId,
      },
      body: once(
        isPatch
          ? { [target.column]: change.visible }
          : { MentorId: change.row, Visible: change.visible },
      ),
      redirect: "manual",
      signal: deadline,
    });
    return {
      status: response.status,
      headers: response.headers,
      body: await cappedBody(response),
    };
  }
}

/** An answer that is not the one hoped for. */
export class Refused extends Refusal {
  readonly status: number;
  /** What Microsoft's support asks for, if it is a GUID; nothing else of the answer is kept. */
  readonly serviceRequestId: string | null;

  constructor(answer: Answer) {
    super(failureOfAnswer(answer, new Date()));
    this.status = answer.status;
    const ids = REQUEST_IDS.map((name) => answer.headers.get(name) ?? "");
    this.serviceRequestId = ids.find(isGuid) ?? null;
  }
}

/** The address that a request for this row goes to. */
export function addressOf(target: Target, row: string): string {
  const api = `${target.url}/api/data/v9.2`;
  if (target.operation === "action") return `${api}/${target.action}`;
  const key = target.key ? `${target.key}=${stringLiteral(row)}` : row.toLowerCase();
  return `${api}/${target.entity_set}(${key})`;
}

/** A string as a key in a URL: in single quotes, those inside doubled, percent-encoded. */
export function stringLiteral(value: string): string {
  const encoded = encodeURIComponent(value.replaceAll("'", "''"));
  const rest = encoded.replace(/[!'()*]/g, (sign) => `%${sign.charCodeAt(0).toString(16)}`);
  return `'${rest.replaceAll("%2a", "%2A")}'`;
}

/** 204; a Custom API with results answers 200 and JSON, which a login page does not. */
function isExpected(answer: Answer, target: Target): boolean {
  if (target.operation === "action" && answer.status === 200) {
    return jsonObject(answer.body) !== null;
  }
  return answer.status === 204;
}

/**
 * A body that can be sent once only.
 *
 * The runtime sends a request again by itself when a connection that was used before breaks, even
 * if the server has read it all. Then the answer to the second would hide that the first may yet
 * take effect. It cannot do so with a stream, which goes out in chunks.
 * Source: denoland/deno, pull requests 32566 and 36415.
 */
function once(document: Record<string, unknown>): ReadableStream<Uint8Array> {
  return new Blob([JSON.stringify(document)]).stream();
}

function refusal(error: unknown): Refusal {
  return error instanceof Refusal ? error : new Refusal(failureOfException(error));
}

/** @throws {Refusal} the deadline came first; nothing is under way */
async function pause(milliseconds: number, deadline: AbortSignal): Promise<void> {
  await new Promise((resolve) => setTimeout(resolve, milliseconds));
  if (deadline.aborted) throw new Refusal(failure(MEANINGS.TIMEOUT));
}
