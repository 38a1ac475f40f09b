/** The function's parts that no request from outside can show. */

import { deepStrictEqual, strictEqual } from "node:assert";

import { MAX_BODY_BYTES } from "../../../supabase/functions/hlf-dynamics-sync/body.ts";
import { Refusal } from "../../../supabase/functions/hlf-dynamics-sync/classify.ts";
import { Dynamics } from "../../../supabase/functions/hlf-dynamics-sync/dynamics.ts";
import { isLetIn, isSame } from "../../../supabase/functions/hlf-dynamics-sync/key.ts";
import {
  isAddress,
  type Settings,
} from "../../../supabase/functions/hlf-dynamics-sync/settings.ts";
import { Tokens } from "../../../supabase/functions/hlf-dynamics-sync/token.ts";

const KEY = "0123456789abcdef0123456789abcdef";
const NEVER = new AbortController().signal;
const SETTINGS: Settings = {
  organization: "00000000-0000-4000-8000-000000000001",
  target: {
    url: "https://hlf.example",
    entity_set: "contacts",
    key: "",
    column: "hlf_portalvisible",
    operation: "patch",
    action: "",
  },
  authority: "https://login.example",
  tenant: "hlf.example",
  client: "a-client",
  secret: () => "a-secret",
};
const CHANGE = {
  row: "00000000-0000-4000-8000-0000000000a1",
  visible: true,
  correlationId: "00000000-0000-4000-8000-0000000000e1",
};

/** Replace `fetch` while something runs; returns the addresses that were asked. */
async function fetching(
  answer: (url: string) => Response | Promise<Response>,
  run: () => Promise<void>,
): Promise<string[]> {
  const asked: string[] = [];
  const original = globalThis.fetch;
  globalThis.fetch = async (input) => {
    asked.push(String(input));
    return await answer(String(input));
  };
  try {
    await run();
  } finally {
    globalThis.fetch = original;
  }
  return asked;
}

const isForToken = (url: string) => url.endsWith("/token");
const token = (value: string, seconds: number) =>
  Response.json({ access_token: value, expires_in: seconds, token_type: "Bearer" });

async function refusalOf(promise: Promise<unknown>): Promise<Refusal> {
  try {
    await promise;
  } catch (error) {
    if (error instanceof Refusal) return error;
    throw error;
  }
  throw new Error("It was not refused.");
}

Deno.test("every byte of a digest is compared, wherever they differ", () => {
  const one = new Uint8Array(32).fill(7);
  strictEqual(isSame(one, new Uint8Array(one)), true);
  for (let i = 0; i < 32; i++) {
    const other = new Uint8Array(one);
    other[i] = 8;
    strictEqual(isSame(one, other), false);
  }
  strictEqual(isSame(one, one.slice(1)), false);
  strictEqual(isSame(new Uint8Array(), one), false);

  let read = 0;
  const counting = new Proxy(new Uint8Array(32), {
    get(bytes, name) {
      if (/^\d+$/.test(String(name))) read++;
      return Reflect.get(bytes, name, bytes);
    },
  });
  isSame(one, counting); // which differs from its first byte on
  strictEqual(read, 32);
});

Deno.test("a key lets in with or without its word, and only if it is long enough", async () => {
  strictEqual(await isLetIn(`Bearer ${KEY}`, [KEY]), true);
  strictEqual(await isLetIn(`bearer ${KEY}`, ["x".repeat(32), KEY]), true);
  strictEqual(await isLetIn(`Bearer ${KEY} `, [KEY]), false);
  strictEqual(await isLetIn(`Bearer ${KEY.slice(1)}`, [KEY.slice(1)]), false);
  strictEqual(await isLetIn("Bearer ", [""]), false);
  strictEqual(await isLetIn(null, []), false);
});

Deno.test("a secret goes nowhere without https, but to this machine", () => {
  for (
    const url of [
      "https://hlf.example",
      "http://127.1.2.3:80",
      "http://localhost",
      "http://[::1]:9",
    ]
  ) {
    strictEqual(isAddress(url), true, url);
  }
  for (
    const url of [
      "http://hlf.example",
      "http://127.0.0.1.example",
      "http://localhost.example",
      "http://10.0.0.1",
      "https://hlf.example/path",
      "https://hlf.example?x",
      "https://anna@hlf.example",
      "ftp://hlf.example",
      "hlf.example",
      "",
    ]
  ) strictEqual(isAddress(url), false, url);
});

Deno.test("all who wait share one token request, and the token is kept", async () => {
  const tokens = new Tokens(SETTINGS);
  const asked = await fetching(() => token("one", 3600), async () => {
    const all = await Promise.all(Array.from({ length: 20 }, () => tokens.fresh(NEVER)));
    deepStrictEqual(new Set(all), new Set(["one"]));
    strictEqual(await tokens.fresh(NEVER), "one");
  });
  strictEqual(asked.length, 1);
});

Deno.test("a token is renewed before its end, and used on while it cannot be", async () => {
  let now = 0;
  let answer = () => token("one", 3600);
  const tokens = new Tokens(SETTINGS, () => now);
  const asked = await fetching(() => answer(), async () => {
    strictEqual(await tokens.fresh(NEVER), "one");
    now = 3_299_000;
    strictEqual(await tokens.fresh(NEVER), "one");
    now = 3_301_000;
    answer = () => new Response(null, { status: 503 });
    strictEqual(await tokens.fresh(NEVER), "one"); // and Entra ID is left alone for 30 s
    strictEqual(await tokens.fresh(NEVER), "one");
    now += 30_000;
    answer = () => token("two", 3600);
    strictEqual(await tokens.fresh(NEVER), "two");
  });
  strictEqual(asked.length, 3);
});

Deno.test("an expired token is not used, and why there is no other is said", async () => {
  let now = 0;
  const tokens = new Tokens(SETTINGS, () => now);
  await fetching(
    () => now === 0 ? token("one", 60) : new Response(null, { status: 503 }),
    async () => {
      await tokens.fresh(NEVER);
      now = 60_000;
      const { failure } = await refusalOf(tokens.fresh(NEVER));
      strictEqual(failure.code, "token_unavailable");
      strictEqual(failure.doubtful, false);
    },
  );
});

Deno.test("a connection that cannot be made is tried three times, and is not doubtful", async () => {
  const refused = new TypeError("error sending request: client error (Connect): refused");
  const asked = await fetching((url) => {
    if (isForToken(url)) return token("one", 3600);
    throw refused;
  }, async () => {
    const { failure } = await refusalOf(new Dynamics(SETTINGS).setVisibility(CHANGE, NEVER));
    deepStrictEqual([failure.code, failure.doubtful], ["unreachable", false]);
  });
  strictEqual(asked.filter((url) => !isForToken(url)).length, 3);
});

Deno.test("whatever else is said of a request is tried once only, and is doubtful", async () => {
  for (
    const [words, code] of [
      ["connection closed before message completed", "incomplete_answer"],
      ["Connection reset by peer (os error 104)", "connection_lost"],
      ["something that no runtime says today", "connection_lost"],
    ] as const
  ) {
    const asked = await fetching((url) => {
      if (isForToken(url)) return token("one", 3600);
      throw new TypeError("fetch failed", { cause: new Error(words) });
    }, async () => {
      const { failure } = await refusalOf(new Dynamics(SETTINGS).setVisibility(CHANGE, NEVER));
      deepStrictEqual([failure.code, failure.doubtful], [code, true]);
    });
    strictEqual(asked.filter((url) => !isForToken(url)).length, 1);
  }
});

Deno.test("a deadline that has passed before anything was sent is not doubtful", async () => {
  const dynamics = new Dynamics(SETTINGS);
  const asked = await fetching(() => token("one", 3600), async () => {
    await dynamics.tokens.fresh(NEVER);
    const { failure } = await refusalOf(dynamics.setVisibility(CHANGE, AbortSignal.abort()));
    deepStrictEqual([failure.code, failure.doubtful], ["timeout", false]);
  });
  strictEqual(asked.filter((url) => !isForToken(url)).length, 0);
});

Deno.test("an answer is read up to a limit", async () => {
  const endless = () =>
    new ReadableStream<Uint8Array>({
      pull(controller) {
        pulled++;
        controller.enqueue(new Uint8Array(1024));
      },
    });
  let pulled = 0;
  await fetching(
    (url) => isForToken(url) ? token("one", 3600) : new Response(endless(), { status: 500 }),
    async () => {
      const { failure } = await refusalOf(new Dynamics(SETTINGS).setVisibility(CHANGE, NEVER));
      strictEqual(failure.code, "server_error");
    },
  );
  strictEqual(pulled <= MAX_BODY_BYTES / 1024 + 2, true);
});
