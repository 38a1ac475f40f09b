/**
 * graphile-worker: `node graphile_worker.js graphile-worker[:tuned] work 10`, and the other roles.
 */

import { Logger, makeWorkerUtils, run } from 'graphile-worker'

import { configuration, databaseUrl, main } from './bench.js'

const TASK = 'hide'

const WORKER = {
  'graphile-worker': {},
  // 250 ms is what its documentation advises to begin with. Queues of 500 and 2,000 jobs and
  // delays of 0, 1 and 10 ms were measured: none is faster, the short delays cost more CPU.
  'graphile-worker:tuned': {
    localQueue: { size: 1000 },
    completeJobBatchDelay: 250,
    failJobBatchDelay: 250,
  },
}

const logger = new Logger(() => () => {})

await main({
  prepare: () => withUtils((utils) => utils.migrate()),

  fill: (batches) =>
    withUtils(async (utils) => {
      for (const batch of batches) {
        await utils.addJobs(batch.map((key) => ({ identifier: TASK, payload: { key } })))
      }
    }),

  async work(send, concurrency) {
    const runner = await run({
      preset: { worker: WORKER[configuration] },
      connectionString: databaseUrl,
      concurrency,
      maxPoolSize: Math.max(10, concurrency + 2), // as its documentation advises
      taskList: { [TASK]: ({ key }) => send(key) },
      parsedCronItems: [],
      logger,
    })
    await runner.promise // it ends at SIGTERM by itself
  },

  async enqueuer() {
    return (client, key) =>
      client.query('SELECT graphile_worker.add_job($1, $2::json)', [TASK, JSON.stringify({ key })])
  },
})

async function withUtils(work) {
  const utils = await makeWorkerUtils({ connectionString: databaseUrl, logger })
  await work(utils)
  await utils.release()
}
