/**
 * Bodies that are read up to a limit only.
 */

/** No body is read beyond this: an honest one has a few hundred bytes, a token 2 KiB. */
export const MAX_BODY_BYTES = 64 * 1024;

/** The start of a body, at most `limit` bytes; what is longer is cut and the stream closed. */
export async function cappedBody(
  source: Request | Response,
  limit: number = MAX_BODY_BYTES,
): Promise<Uint8Array> {
  const pieces: Uint8Array[] = [];
  let length = 0;
  for await (const piece of source.body ?? []) {
    pieces.push(piece.subarray(0, limit - length));
    length += piece.length;
    if (length >= limit) break;
  }
  return new Uint8Array(await new Blob(pieces as BlobPart[]).arrayBuffer());
}
