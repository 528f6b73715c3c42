// A trustless gateway made of Helia and @helia/verified-fetch, over the directory of a meshkitfs block store:
//   node gateway.mjs STORE PORT
// Only the HTTP routing and the look into the directory are ours; what a request means, Helia decides.
import http from 'node:http'
import { readFile, access } from 'node:fs/promises'
import { createHeliaLight } from 'helia'
import { createVerifiedFetchWithHelia } from '@helia/verified-fetch'
import { MemoryDatastore } from 'datastore-core'
import { CID } from 'multiformats/cid'

const [store, port] = [process.argv[2], Number(process.argv[3])]
const place = cid => { const text = cid.toString(); return `${store}/${text.slice(-2)}/${text}` }
const blockstore = {
  async has (cid) { return access(place(cid)).then(() => true, () => false) },
  async * get (cid) { yield await readFile(place(cid)) },
  async put () { throw new Error('read only') },
  async delete () { throw new Error('read only') }
}
const helia = await createHeliaLight({ blockstore, datastore: new MemoryDatastore() })
const fetchVerified = await createVerifiedFetchWithHelia(helia, { withServerTiming: false })

http.createServer(async (request, response) => {
  try {
    const url = new URL(request.url, 'http://127.0.0.1')
    // Path style, and subdomain style: CID.ipfs.HOST
    const host = (request.headers.host ?? '').match(/^(b[a-z2-7]{20,})\.ipfs\./)
    const path = url.pathname.match(/^\/ipfs\/([^/]+)$/)
    const text = host ? host[1] : path ? path[1] : null
    if (text === null) { response.writeHead(404); return response.end() }
    let cid
    try { cid = CID.parse(text) } catch { response.writeHead(400); return response.end() }
    // Helia answers 500 for what it does not have; the specification wants 404.
    if (!await blockstore.has(cid)) { response.writeHead(404); return response.end() }
    const headers = request.headers.accept && request.headers.accept !== '*/*' ? { accept: request.headers.accept } : {}
    const answer = await fetchVerified(`ipfs://${cid}${url.search}`, {
      headers, method: request.method, session: false, signal: AbortSignal.timeout(5000)
    })
    response.writeHead(answer.status, Object.fromEntries(answer.headers))
    if (request.method !== 'HEAD' && answer.body) for await (const chunk of answer.body) response.write(chunk)
    response.end()
  } catch (error) {
    if (!response.headersSent) response.writeHead(500, { 'content-type': 'text/plain' })
    response.end(String(error))
  }
}).listen(port, '127.0.0.1', () => console.log('ready', port))
