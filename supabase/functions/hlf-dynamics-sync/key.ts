/**
 * Who may ask: whoever has the key.
 */

/** A shorter key could be guessed, so it opens nothing. */
export const SHORTEST_KEY = 32;

/** Whether a key is one that cannot be guessed. */
export function isLongEnough(key: string): boolean {
  return key.length >= SHORTEST_KEY;
}

/**
 * Whether a request carries one of the keys, in a time that does not tell how much of it fits.
 *
 * Their digests are compared, which are as long as each other, all bytes of them.
 */
export async function isLetIn(
  authorization: string | null,
  keys: readonly string[],
): Promise<boolean> {
  const given = await digest(authorization?.replace(/^Bearer /i, "") ?? "");
  let fits = false;
  for (const key of keys) {
    const same = isSame(given, await digest(key));
    fits = (same && isLongEnough(key)) || fits;
  }
  return fits;
}

/** Whether two digests are the same; every byte is looked at. */
export function isSame(one: Uint8Array, other: Uint8Array): boolean {
  let difference = one.length ^ other.length;
  for (const [i, byte] of one.entries()) difference |= byte ^ (other[i] ?? 0);
  return difference === 0;
}

async function digest(text: string): Promise<Uint8Array> {
  return new Uint8Array(await crypto.subtle.digest("SHA-256", new TextEncoder().encode(text)));
}
