/**
 * The token of Entra ID: fetched, kept, renewed; one renewal at a time, shared by all who wait.
 *
 * Kept for as long as the platform keeps this isolate; each isolate has its own.
 */

import { failure, failureOfTokenAnswer, hasNoConnection, isUntrusted } from "./classify.ts";
import { type Failure, jsonObject, Refusal } from "./classify.ts";
import { cappedBody } from "./body.ts";
import type { Settings } from "./settings.ts";
import { MEANINGS } from "./tables.ts";

/** For one token request, whoever waits for it. */
const TOKEN_MS = 5_000;

/** How long before its end a token is renewed, or a tenth of its life if that is less. */
const EARLY_MS = 300_000;

/** How long a request waits for an early renewal before it goes with the token that is left. */
const PATIENCE_MS = 1_000;

/** After an early renewal that failed, until the next one. */
const POSTPONED_MS = 30_000;

/** A token is not kept for longer than a day, whatever its `expires_in` says. */
const LONGEST_LIFE_MS = 86_400_000;

interface Token {
  readonly value: string;
  renewAt: number;
  readonly expiresAt: number;
}

type Renewal = Promise<Token | Failure>;

/** Tokens of one application for one Dynamics. */
export class Tokens {
  #token: Token | null = null;
  #renewal: Renewal | null = null;

  /**
   * @param settings whose secret is read for each token request
   * @param now monotonic milliseconds
   */
  constructor(
    readonly settings: Settings,
    readonly now: () => number = () => performance.now(),
  ) {}

  /**
   * The token that is kept, or a new one.
   *
   * @throws {Refusal} there is none, and none could be had
   */
  async fresh(deadline: AbortSignal): Promise<string> {
    const token = this.#token;
    if (token && this.now() < token.renewAt) return token.value;
    if (token && this.now() < token.expiresAt) {
      const patience = AbortSignal.any([deadline, AbortSignal.timeout(PATIENCE_MS)]);
      const renewed = await until(this.#renew(), patience);
      return renewed && "value" in renewed ? renewed.value : token.value;
    }
    const renewed = await until(this.#renew(), deadline);
    if (renewed === null) throw new Refusal(failure(MEANINGS.TIMEOUT, ["waiting for a token"]));
    if (!("value" in renewed)) throw new Refusal(renewed);
    return renewed.value;
  }

  /** Keep a refused token no longer, unless another request has replaced it already. */
  forget(refused: string): void {
    if (this.#token?.value === refused) this.#token = null;
  }

  #renew(): Renewal {
    this.#renewal ??= this.#ask().then((outcome) => {
      this.#renewal = null;
      if ("value" in outcome) this.#token = outcome;
      else this.#postpone();
      return outcome;
    });
    return this.#renewal;
  }

  /** Leave Entra ID alone for a while, if there is a token to go on with. */
  #postpone(): void {
    const token = this.#token;
    if (token) token.renewAt = Math.min(this.now() + POSTPONED_MS, token.expiresAt);
  }

  /** One token request; whatever goes wrong is a value. */
  async #ask(): Renewal {
    const askedAt = this.now();
    const { authority, tenant, client, secret, target } = this.settings;
    try {
      const response = await fetch(`${authority}/${tenant}/oauth2/v2.0/token`, {
        method: "POST",
        headers: { "Accept": "application/json", "Accept-Encoding": "identity" },
        body: new URLSearchParams({
          grant_type: "client_credentials",
          client_id: client,
          client_secret: secret(),
          scope: `${target.url}/.default`,
        }),
        redirect: "manual",
        signal: AbortSignal.timeout(TOKEN_MS),
      });
      const answer = {
        status: response.status,
        headers: response.headers,
        body: await cappedBody(response),
      };
      const token = answer.status === 200 ? tokenIn(answer.body, askedAt) : null;
      return token ?? failureOfTokenAnswer(answer, new Date());
    } catch (error) {
      const untrusted = hasNoConnection(error) && isUntrusted(error);
      return failure(untrusted ? MEANINGS.CERTIFICATE : MEANINGS.TOKEN_UNAVAILABLE);
    }
  }
}

/** The token in a successful answer, or null if there is no bearer token with a life in it. */
export function tokenIn(body: Uint8Array, askedAt: number): Token | null {
  const { access_token: value, expires_in: seconds, token_type: kind = "Bearer" } =
    jsonObject(body) ?? {};
  const life = lifeOf(seconds);
  if (typeof value !== "string" || !/^[\x21-\x7e]+$/.test(value) || life === null) return null;
  if (typeof kind !== "string" || kind.toLowerCase() !== "bearer") return null;
  const early = Math.min(EARLY_MS, life / 10);
  return { value, renewAt: askedAt + life - early, expiresAt: askedAt + life };
}

/** Milliseconds from `expires_in`, which older endpoints send as a string of digits. */
function lifeOf(raw: unknown): number | null {
  const seconds = typeof raw === "string" && /^[0-9]{1,9}$/.test(raw) ? Number(raw) : raw;
  if (typeof seconds !== "number" || !(seconds >= 0)) return null;
  return Math.min(seconds * 1000, LONGEST_LIFE_MS);
}

/** What a promise gives, or null if the signal comes first; it goes on for others. */
async function until<T>(promise: Promise<T>, signal: AbortSignal): Promise<T | null> {
  if (signal.aborted) return null;
  const { promise: late, resolve } = Promise.withResolvers<null>();
  const stop = () => resolve(null);
  signal.addEventListener("abort", stop);
  try {
    return await Promise.race([promise, late]);
  } finally {
    signal.removeEventListener("abort", stop);
  }
}
