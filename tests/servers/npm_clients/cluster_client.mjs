// An independent client of IPFS Cluster's REST API: node cluster_client.mjs URL AUTHORIZATION < [[call, ...args], ...]
// Prints a JSON list with what each call gave. A Blob is written as {"base64": ...}.
import { Cluster } from '@nftstorage/ipfs-cluster'

const [url, authorization] = process.argv.slice(2)
const cluster = new Cluster(url, { headers: authorization ? { authorization } : {} })
const calls = JSON.parse((await process.stdin.toArray()).join(''))
const given = value => value?.base64 ? new Blob([Buffer.from(value.base64, 'base64')]) : value
const results = []
for (const [call, ...args] of calls) {
  try {
    results.push({ ok: await cluster[call](...args.map(given)) })
  } catch (error) {
    results.push({ error: error.message, status: error.response?.status })
  }
}
console.log(JSON.stringify(results))
