/**
 * What the Node peers share: the request, the measured transactions, the roles.
 *
 * The measuring is that of `tests/bench/contenders/business.py`, in JavaScript.
 */

import { randomInt, randomUUID } from 'node:crypto'
import { text } from 'node:stream/consumers'
import { setTimeout as sleep } from 'node:timers/promises'

import pg from 'pg'
import { Pool } from 'undici'

const ROWS = 10_000
const FILL_AT_ONCE = 5_000

const CERTIFICATION =
  "UPDATE bench.certifications SET status = 'expired', changed_at = now() WHERE id = $1"
const MENTOR =
  'UPDATE bench.mentors SET visible = NOT visible, version = version + 1 WHERE id = $1'

const HEADERS = {
  accept: 'application/json',
  authorization: `Bearer ${'t'.repeat(1200)}`,
  'content-type': 'application/json',
  'if-match': '*',
  'odata-maxversion': '4.0',
  'odata-version': '4.0',
}
const HIDDEN = '{"hlf_portalvisible": false}'

const [configuration, role, ...numbers] = process.argv.slice(2)

export { configuration }

export const databaseUrl = process.env.BENCH_DATABASE_URL

/**
 * Sends one event; so many at once and no more.
 */
function sender(concurrency) {
  const api = new Pool(process.env.BENCH_API_URL, { connections: concurrency })
  return async (key) => {
    const path = `/api/data/v9.2/contacts(${key})`
    const request = { path, method: 'PATCH', headers: HEADERS, body: HIDDEN }
    const { statusCode, body } = await api.request(request)
    await body.dump()
    if (statusCode !== 204) throw new Error(`The API answered ${statusCode}.`)
  }
}

/**
 * Plays the role that the command line names.
 *
 * A peer has `prepare()`, `fill(batches)`, `work(send, concurrency)` and `enqueuer({ waking })`,
 * which gives `enqueue(client, key)`: an event in the transaction that is open on the client; the
 * worker need not hear of it at once unless it is to be woken.
 */
export async function main(peer) {
  await roles[role](peer, ...numbers.map(Number))
}

const roles = {
  async prepare(peer) {
    await peer.prepare()
    process.exit() // whatever a library may still hold open
  },

  async fill(peer) {
    const keys = (await text(process.stdin)).split('\n')
    const batches = []
    for (let start = 0; start < keys.length; start += FILL_AT_ONCE) {
      batches.push(keys.slice(start, start + FILL_AT_ONCE))
    }
    await peer.fill(batches)
    process.exit()
  },

  async work(peer, concurrency) {
    await peer.work(sender(concurrency), concurrency)
  },

  async produce(peer, clients, seconds, sliceSeconds) {
    const transactions = await connected(peer, clients, { waking: false })
    print(await produce(transactions, seconds, sliceSeconds))
  },

  async tick(peer, perSecond, seconds) {
    const [transact] = await connected(peer, 1, { waking: true })
    print(await tick(transact, perSecond, seconds))
  },
}

async function connected(peer, count, { waking }) {
  const enqueue = await peer.enqueuer({ waking })
  return Promise.all(
    Array.from({ length: count }, async () => {
      const client = new pg.Client(databaseUrl)
      await client.connect()
      return transaction(client, enqueue)
    }),
  )
}

function transaction(client, enqueue) {
  return async (key) => {
    const row = randomInt(1, ROWS + 1)
    await client.query('BEGIN')
    await client.query(CERTIFICATION, [row])
    await client.query(MENTOR, [row])
    if (key) await enqueue(client, key)
    await client.query('COMMIT')
  }
}

async function produce(transactions, seconds, sliceSeconds) {
  const taken = { without: [], with: [] }
  const spent = { without: 0, with: 0 }
  const slices = Math.max(4, Math.round(seconds / sliceSeconds))
  for (let number = 0; number < slices; number++) {
    const kind = number % 2 ? 'with' : 'without'
    const began = performance.now()
    const until = began + sliceSeconds * 1000
    const done = await Promise.all(transactions.map((one) => slice(one, kind, until)))
    if (number > 1) {
      taken[kind].push(...done.flat())
      spent[kind] += (performance.now() - began) / 1000
    }
  }
  return {
    without: taken.without.length / spent.without,
    with: taken.with.length / spent.with,
    milliseconds_without: median(taken.without),
    milliseconds_with: median(taken.with),
  }
}

async function slice(transact, kind, until) {
  const durations = []
  for (let began = performance.now(); began < until; began = performance.now()) {
    await transact(kind === 'with' ? randomUUID() : null)
    durations.push(performance.now() - began)
  }
  return durations
}

async function tick(transact, perSecond, seconds) {
  const committed = []
  const began = performance.now()
  for (let number = 0; number < Math.round(perSecond * seconds); number++) {
    await sleep(Math.max(0, began + (number * 1000) / perSecond - performance.now()))
    const key = randomUUID()
    await transact(key)
    committed.push(`[${process.hrtime.bigint()}, "${key}"]`)
  }
  return `[${committed.join(', ')}]`
}

function median(values) {
  const ordered = values.toSorted((one, other) => one - other)
  return ordered[Math.floor(ordered.length / 2)]
}

function print(document) {
  const line = typeof document === 'string' ? document : JSON.stringify(document)
  process.stdout.write(`${line}\n`, () => process.exit())
}
