"""A TCP proxy that holds back what goes to the server: `python -m bench.latency UPSTREAM-PORT SECONDS`.

Prints the port it listens on. Each connection takes the added time once more, as its handshake would.
"""

from __future__ import annotations

import asyncio
import sys

_CHUNK = 256 << 10


async def _serve(upstream: int, seconds: float) -> None:
    loop = asyncio.get_running_loop()

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay: float) -> None:
        while data := await reader.read(_CHUNK):
            if delay:
                # One timer for each piece keeps their order, and does not add one delay to another.
                loop.call_later(delay, writer.write, data)
            else:
                writer.write(data)
                await writer.drain()
        await asyncio.sleep(delay)
        writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(seconds)
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", upstream)
        await asyncio.gather(
            forward(reader, server_writer, seconds), forward(server_reader, writer, 0.0), return_exceptions=True
        )

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1]), float(sys.argv[2])))
