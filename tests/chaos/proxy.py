"""TCP links that a test can cut or make silent in either direction: a box's way to PostgreSQL or to Valkey."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable
from typing import Literal, TypeVar

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Direction = Literal["up", "down"]
Answer = TypeVar("Answer")


class Link:
    """One listening port and the service behind it."""

    def __init__(self, proxy: Proxy, connect: Callable[[], Awaitable[Streams]]) -> None:
        self._proxy = proxy
        self._connect = connect
        self._refuses = False
        self._delay_s = 0.0
        self._open: set[asyncio.StreamWriter] = set()
        self._flows: dict[Direction, asyncio.Event] = {}
        self.port = 0

    def cut(self) -> None:
        """Break every connection and take no new one, until `heal`."""
        self._proxy.call(self._cut())

    def silence(self, direction: Direction) -> None:
        """Let connections stand and pass nothing on in one direction, until `heal`: then what was sent arrives late."""
        self._proxy.call(self._set(direction, flows=False))

    def slow(self, seconds: float) -> None:
        """Pass nothing on before so long, until `heal`: at most 64 KiB of each direction at a time."""
        self._delay_s = seconds

    def heal(self) -> None:
        self._proxy.call(self._heal())

    async def listen(self) -> None:
        self._flows = {"up": asyncio.Event(), "down": asyncio.Event()}
        await self._heal()
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]

    async def _cut(self) -> None:
        self._refuses = True
        for writer in self._open:
            writer.transport.abort()

    async def _set(self, direction: Direction, *, flows: bool) -> None:
        if flows:
            self._flows[direction].set()
        else:
            self._flows[direction].clear()

    async def _heal(self) -> None:
        self._refuses, self._delay_s = False, 0.0
        for flow in self._flows.values():
            flow.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._refuses:
            writer.transport.abort()
            return
        try:
            up_reader, up_writer = await self._connect()
        except OSError:  # the service is down
            writer.transport.abort()
            return
        ends = {writer, up_writer}
        self._open |= ends
        pumps = [
            asyncio.create_task(self._pump(reader, up_writer, "up")),
            asyncio.create_task(self._pump(up_reader, writer, "down")),
        ]
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        for pump in pumps:
            pump.cancel()
        for end in ends:
            end.transport.abort()
        self._open -= ends

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: Direction) -> None:
        with contextlib.suppress(ConnectionError):  # either end may go at any time
            while data := await reader.read(1 << 16):
                await asyncio.sleep(self._delay_s)
                await self._flows[direction].wait()
                writer.write(data)
                await writer.drain()


class Proxy:
    """All links, on an event loop in a thread of its own."""

    def __enter__(self) -> Proxy:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def to_port(self, port: int) -> Link:
        return self._link(lambda: asyncio.open_connection("127.0.0.1", port))

    def to_socket(self, path: str) -> Link:
        return self._link(lambda: asyncio.open_unix_connection(path))

    def call(self, work: Awaitable[Answer]) -> Answer:
        async def do() -> Answer:
            return await work

        return asyncio.run_coroutine_threadsafe(do(), self._loop).result(timeout=30)

    def _link(self, connect: Callable[[], Awaitable[Streams]]) -> Link:
        link = Link(self, connect)
        self.call(link.listen())
        return link

    async def _end(self) -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
