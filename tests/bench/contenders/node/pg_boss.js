/**
 * pg-boss: `node pg_boss.js pg-boss work 10`, and the other roles.
 */

import { PgBoss } from 'pg-boss'

import { databaseUrl, main } from './bench.js'

const QUEUE = 'hide'

// Two workers in the process, so that one fetches and settles while the other's requests are on
// their way. Batches of 100 to 1,000 and 2 to 10 workers were measured: all within the noise, but
// small batches cost more CPU.
const WORKER = {
  batchSize: 1000,
  localConcurrency: 2,
  burstWhenBatchFull: true,
  perJobResults: true,
}

await main({
  async prepare() {
    const boss = await started()
    await boss.createQueue(QUEUE, { notify: true })
  },

  async fill(batches) {
    const boss = await started()
    for (const batch of batches) {
      await boss.insert(QUEUE, batch.map((key) => ({ data: { key } })))
    }
  },

  async work(send) {
    const boss = await started()
    process.once('SIGTERM', () => boss.stop())
    await boss.work(QUEUE, WORKER, (jobs) => Promise.all(jobs.map((job) => outcome(job, send))))
  },

  // Where only the cost of the enqueue is asked for, it is not burdened with a NOTIFY: by default
  // the workers poll. Measured side by side: 0.55 of the transactions remain, with NOTIFY 0.45.
  async enqueuer({ waking }) {
    const boss = await started()
    await boss.updateQueue(QUEUE, { notify: waking })
    return (client, key) => {
      const db = { executeSql: (text, values) => client.query(text, values) }
      return boss.send(QUEUE, { key }, { db })
    }
  },
})

async function started() {
  const boss = new PgBoss({ connectionString: databaseUrl, useListenNotify: true, schedule: false })
  boss.on('error', (error) => console.error(error))
  return boss.start()
}

async function outcome({ id, data }, send) {
  try {
    await send(data.key)
    return { id, status: 'completed' }
  } catch (error) {
    return { id, status: 'failed', output: { message: error.message } }
  }
}
