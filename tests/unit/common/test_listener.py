"""How the servers listen: real connections on loopback, to uvicorn in this process."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

from loractl.common.listener import FILES, Connection, Listener

WAITING = 50

ASKED_LATER, MAY_ANSWER = threading.Semaphore(0), threading.Event()


async def hello(scope: Any, receive: Any, send: Any) -> None:
    if scope["path"] == "/body":
        while (await receive()).get("more_body"):
            pass
    if scope["path"] == "/later":
        ASKED_LATER.release()
        while not MAY_ANSWER.is_set():
            await asyncio.sleep(0.01)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"hi"})


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Of a server that serves two more connections than may be left waiting."""
    monkeypatch.setattr("loractl.common.listener.WAITING", WAITING)
    told: list[str] = []
    listens = threading.Event()

    def tell(address: str) -> None:
        told.append(address)
        listens.set()

    config = uvicorn.Config(
        hello,
        host="127.0.0.1",
        port=0,
        http=Connection,
        limit_concurrency=WAITING + 3,
        lifespan="off",
        log_level="error",
        timeout_keep_alive=60,
    )
    server = Listener(config, tell)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert listens.wait(20)
    yield int(told[0].rpartition(":")[2])
    server.should_exit = server.force_exit = True
    thread.join()


ASKED = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"


BEGUN = b"POST /body HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nx"


@pytest.mark.parametrize(
    "sent", [b"", b"GET / HTTP/1.1\r\n", BEGUN, ASKED], ids=["silent", "half a request", "half a body", "answered"]
)
def test_an_address_with_many_waiting_connections_loses_the_oldest_and_shuts_nobody_out(port: int, sent: bytes) -> None:
    with contextlib.ExitStack() as stack:
        waiting = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20)) for _ in range(3 * WAITING)
        ]
        for caller in waiting:
            with contextlib.suppress(ConnectionError):  # the oldest may be closed already
                caller.sendall(sent)
        for older in waiting[:-WAITING]:
            with contextlib.suppress(ConnectionError):
                while older.recv(1024):
                    pass  # at most an answer, then the end
        caller = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20))
        caller.sendall(ASKED)
        assert caller.recv(64).startswith(b"HTTP/1.1 200")


def test_the_address_with_the_most_waiting_connections_pays_for_its_own(port: int) -> None:
    with contextlib.ExitStack() as stack:
        few, many = (
            [
                stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20, source_address=(own, 0)))
                for _ in range(count)
            ]
            for own, count in (("127.0.0.2", 10), ("127.0.0.1", 2 * WAITING))
        )
        for older in many[: -WAITING + 10]:
            assert not older.recv(64)
        for caller in (*few, many[-1]):
            caller.sendall(ASKED)
            assert caller.recv(64).startswith(b"HTTP/1.1 200")


def test_connections_whose_answers_end_later_are_counted_then(port: int) -> None:
    """None of them waits while the others come."""
    MAY_ANSWER.clear()
    with contextlib.ExitStack() as stack:
        callers = []
        for _ in range(WAITING + 2):
            callers.append(stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20)))
            callers[-1].sendall(b"GET /later HTTP/1.1\r\nHost: a\r\n\r\n")
            assert ASKED_LATER.acquire(timeout=20)
        MAY_ANSWER.set()
        ended = 0
        for caller in callers:
            caller.settimeout(5 if ended < 2 else 0.01)
            with contextlib.suppress(TimeoutError):
                while caller.recv(1024):
                    pass
                ended += 1
        assert ended == 2


def test_a_server_has_files_enough_for_its_connections(request: pytest.FixtureRequest) -> None:
    """A login's limit is 1,024 on most systems, and a full one would shut everybody out."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    try:
        request.getfixturevalue("port")
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(hard, FILES), hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_connections_that_are_few_stay(port: int) -> None:
    with contextlib.ExitStack() as stack:
        callers = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20)) for _ in range(WAITING)
        ]
        for _ in range(2):
            for caller in callers:
                caller.sendall(ASKED)
                answer = b""
                while not answer.endswith(b"hi"):
                    more = caller.recv(256)
                    assert more
                    answer += more
                assert answer.startswith(b"HTTP/1.1 200")
