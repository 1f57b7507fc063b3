"""A TCP proxy in a thread, which delays what the server answers while a test wants it to."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_BYTES = 1 << 16


class Proxy:
    """Forwards connections to `port` of loopback. Each piece of an answer arrives `delay` (least, most) seconds later, in order."""

    def __init__(self, port: int) -> None:
        self._target = port
        self.delay = (0.0, 0.0)
        self.port = 0
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._over = asyncio.Event()
        self._random = random.Random(port)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(10)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(10)

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._over.wait()
        server.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            from_server, to_server = await asyncio.open_connection("127.0.0.1", self._target)
            try:
                tasks = [asyncio.create_task(self._pump(reader, to_server)), asyncio.create_task(self._late(from_server, writer))]
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            finally:
                to_server.close()
        writer.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(_BYTES):
                writer.write(data)
                await writer.drain()

    async def _late(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pieces: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def deliver() -> None:
            while True:
                due, data = await pieces.get()
                await asyncio.sleep(max(0.0, due - self._loop.time()))
                writer.write(data)

        delivering = asyncio.create_task(deliver())
        due = 0.0
        try:
            with suppress(OSError):
                while data := await reader.read(_BYTES):
                    due = max(due, self._loop.time() + self._random.uniform(*self.delay))
                    pieces.put_nowait((due, data))
        finally:
            delivering.cancel()


@contextmanager
def proxy(port: int) -> Iterator[Proxy]:
    """A proxy in front of `port`."""
    made = Proxy(port)
    try:
        yield made
    finally:
        made.close()
