// A real IPFS node (js-ipfs) with Kubo's RPC, on loopback only. Usage: node node.mjs REPO API_PORT SWARM_PORT
// (0: any free port). Prints "ready" and a JSON line with its addresses; SIGTERM ends it.
import { create } from 'ipfs-core'
import { HttpApi } from 'ipfs-http-server'

const [repo, api, swarm] = process.argv.slice(2)
const ipfs = await create({
  repo,
  silent: true,
  preload: { enabled: false },
  init: { emptyRepo: true, algorithm: 'Ed25519' },
  config: {
    Addresses: { Swarm: [`/ip4/127.0.0.1/tcp/${swarm}`], API: `/ip4/127.0.0.1/tcp/${api}`, Gateway: '', Delegates: [] },
    Bootstrap: [],
    Discovery: { MDNS: { Enabled: false }, webRTCStar: { Enabled: false } },
    Routing: { Type: 'none' },
    Swarm: { DisableNatPortMap: true }
  }
})
const http = new HttpApi(ipfs)
await http.start()
// The library's default limit for a request's body is 1 MiB; Kubo takes blocks of 2 MiB.
for (const server of http._apiServers) {
  for (const route of server.table()) {
    if (route.settings.payload) route.settings.payload.maxBytes = 2 * 1024 * 1024 + 65536
  }
}
const { id } = await ipfs.id()
console.log(`ready ${JSON.stringify({ id, api: http._apiServers[0].info.port, swarm: (await ipfs.swarm.localAddrs()).map(String) })} end`)
const stop = async () => { await http.stop(); await ipfs.stop(); process.exit(0) }
process.on('SIGTERM', stop)
process.on('SIGINT', stop)
