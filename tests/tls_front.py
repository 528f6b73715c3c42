"""TLS before a server on loopback: ``tls_front.py CERTIFICATE KEY HOST PORT TARGET_PORT``. Says "ready" when it listens."""

import contextlib
import ssl
import sys

import trio

GONE = (trio.BrokenResourceError, trio.ClosedResourceError, OSError)


async def main(certificate, key, host, port, target):
    async def forward(source, sink, scope):
        with contextlib.suppress(*GONE):
            async for data in source:
                await sink.send_all(data)
        scope.cancel()  # HTTP: neither side goes on alone

    async def serve(client):
        with contextlib.suppress(*GONE):
            async with (
                client,
                await trio.open_tcp_stream("127.0.0.1", int(target)) as server,
                trio.open_nursery() as nursery,
            ):
                nursery.start_soon(forward, client, server, nursery.cancel_scope)
                nursery.start_soon(forward, server, client, nursery.cancel_scope)

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    async with trio.open_nursery() as nursery:
        listen = trio.serve_ssl_over_tcp
        await nursery.start(
            lambda task_status: listen(serve, int(port), context, host=host, task_status=task_status)
        )
        print("ready", flush=True)


if __name__ == "__main__":
    trio.run(main, *sys.argv[1:])
