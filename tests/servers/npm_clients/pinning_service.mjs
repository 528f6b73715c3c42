// A pinning service that pins nothing, checked by the API's own OpenAPI document: node pinning_service.mjs TOKEN
// Prints "ready" and its port. A request's status is what the beginning of its name says ("pinned-..."), or queued.
import { createRequire } from 'node:module'
const { setup } = createRequire(import.meta.url)('mock-ipfs-pinning-service')

const service = await setup({ token: process.argv[2] || null })
const server = service.listen(0, '127.0.0.1', () => console.log(`ready ${server.address().port} end`))
process.on('SIGTERM', () => process.exit(0))
