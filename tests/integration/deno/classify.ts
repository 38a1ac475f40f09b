/**
 * Classifies the answers on standard input as the function does, for comparison with the worker:
 * a JSON array of {of, status, headers, body, now} becomes one of failures.
 */

import {
  failureOfAnswer,
  failureOfTokenAnswer,
} from "../../../supabase/functions/hlf-dynamics-sync/classify.ts";

interface Case {
  of: "dynamics" | "token";
  status: number;
  headers: Record<string, string>;
  body: string;
  now: string;
}

const cases: Case[] = JSON.parse(await new Response(Deno.stdin.readable).text());
const failures = cases.map(({ of, status, headers, body, now }) => {
  const answer = { status, headers: new Headers(headers), body: new TextEncoder().encode(body) };
  const classify = of === "dynamics" ? failureOfAnswer : failureOfTokenAnswer;
  return classify(answer, new Date(now));
});
console.log(JSON.stringify(failures));
