"""What loractl serve refuses before it costs anything: other sites' pages, slow callers, prompts that can't fit."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loractl.worker.serving.decoding.decoder import Decoder
from loractl.worker.serving.http import application as http

from ..served import engine_of, served

JSON = {"Content-Type": "application/json"}
ASKED = {"model": "base", "messages": [{"role": "user", "content": "queue"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Decoder:
    return engine_of(tiny_model)


@pytest.fixture
def serve(engine: Decoder, tiny_model: Path, upgraded_home: Path) -> Iterator[Callable[..., int]]:
    """Starts the real server in this process; returns its port."""
    with contextlib.ExitStack() as servers:
        yield lambda key=None: servers.enter_context(served(engine, tiny_model, upgraded_home, key))


def ask(port: int, body: Any = ASKED, path: str = "/v1/chat/completions", **headers: str) -> tuple[int, str]:
    """(status, message) of an answer; headers with _ for -."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = {"Host": f"127.0.0.1:{port}", **JSON, **{name.replace("_", "-"): text for name, text in headers.items()}}
    head = "".join(f"{name}: {text}\r\n" for name, text in lines.items() if text)
    method = "GET" if body is None else "POST"
    request = f"{method} {path} HTTP/1.1\r\n{head}Content-Length: {len(raw)}\r\nConnection: close\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(request + raw)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    text = answer.partition(b"\r\n\r\n")[2].decode()
    value = json.loads(text)
    return int(answer.split()[1]), value["error"]["message"] if "error" in value else text


@pytest.mark.parametrize("key", [None, "secret"])
def test_a_page_of_another_site_is_not_answered(serve: Callable[..., int], key: str | None) -> None:
    port = serve(key)
    own = {"Authorization": f"Bearer {key}"} if key else {}
    assert ask(port, **own)[0] == 200, "a program"
    assert ask(port, **own, Origin=f"http://127.0.0.1:{port}", Sec_Fetch_Site="same-origin")[0] == 200, "its own page"
    for simple in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        assert ask(port, **own, Content_Type=simple) == (415, "the body must be JSON: content-type application/json")
    for origin in (
        "http://evil.example",
        "null",
        f"http://127.0.0.1:{port + 1}",
        "http://[",
        f"http://127.0.0.1:{port}.evil.example",
    ):
        status, message = ask(port, **own, Origin=origin)
        assert (status, "a page of another site" in message) == (403, True), origin
    for site in ("cross-site", "same-site"):
        assert ask(port, **own, Sec_Fetch_Site=site)[0] == 403
        assert ask(port, b"", "/v1/models", **own, Sec_Fetch_Site=site)[0] == 403
    assert ask(port, **own, Content_Type="Application/JSON; charset=utf-8")[0] == 200


def test_no_name_of_a_stranger_s_is_taken_for_this_machine(serve: Callable[..., int]) -> None:
    """A browser that a DNS name led here sends that name, whatever signs are in it; its page is of the same site."""
    port = serve(None)
    for host in (f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}", "LOCALHOST"):
        assert ask(port, Host=host)[0] == 200, host
    for host in (
        f"evil.example:{port}",
        f"a{{b.evil.example:{port}",
        "a`b.evil.example",
        "evil.example:99999",
        "x/health?",
    ):
        status, message = ask(port, Host=host, Origin=f"http://{host}", Sec_Fetch_Site="same-origin")
        assert (status, "only requests to this machine" in message) == (403, True), host
    assert ask(serve("secret"), Host="x/health?")[0] == 401, "the path that needs no key stands in no Host"


MESSAGES = ASKED["messages"]
TOOL = {"type": "function", "function": {"name": "f"}}
NOT_KEPT = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"$ref": "#/nowhere"}}}
OF_ITSELF = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"$ref": "#"}}}
MANY = {"type": "object", "properties": {f"property_{n}": {"type": "string"} for n in range(700)}}
TOO_WIDE = {"type": "json_schema", "json_schema": {"name": "a", "schema": MANY}}
TOO_WIDE_BELOW = {
    "type": "json_schema",
    "json_schema": {"name": "a", "schema": {"type": "object", "properties": {"a": MANY}, "required": ["a"]}},
}
NO_SCHEMA = {"type": "json_schema", "json_schema": {"name": "a"}}
IMAGE = {"type": "image_url", "image_url": {"url": "http://x"}}


@pytest.mark.parametrize(
    ("changed", "says", "param", "code"),
    [
        ({"top_k": -2}, "top_k must be at least -1", "top_k", "invalid_value"),
        ({"min_p": 1.1}, "min_p must be at most 1", "min_p", "invalid_value"),
        ({"repetition_penalty": 1.1}, "is not supported here", "repetition_penalty", "unsupported_parameter"),
        ({"temprature": 1}, "did you mean temperature?", "temprature", "unknown_parameter"),
        ({"n": 129}, "n must be at most 128", "n", "invalid_value"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs", "top_logprobs", "invalid_value"),
        ({"logprobs": True, "top_logprobs": 21}, "must be at most 20", "top_logprobs", "invalid_value"),
        ({"logprobs": 7}, "logprobs must be true or false", "logprobs", "invalid_type"),
        ({"echo": True}, "echo is not supported here", "echo", "unsupported_parameter"),
        ({"tools": [TOOL]}, "has no place for tools", "tools", "invalid_value"),
        ({"response_format": NOT_KEPT}, "the schema can't be kept", "response_format", "invalid_value"),
        ({"response_format": OF_ITSELF}, "it names itself, or has", "response_format", "invalid_value"),
        ({"response_format": TOO_WIDE}, "it names itself, or has", "response_format", "invalid_value"),
        (
            {"response_format": TOO_WIDE_BELOW, "max_tokens": 99},
            "it names itself, or has",
            "response_format",
            "invalid_value",
        ),
        ({"response_format": NO_SCHEMA}, "an object schema", "response_format.json_schema", "invalid_value"),
        (
            {"response_format": {"type": "xml"}},
            "text, json_object, json_schema",
            "response_format.type",
            "invalid_value",
        ),
        ({"response_format": "json"}, "must be an object", "response_format", "invalid_type"),
        ({"temperature": 3}, "temperature must be at most 2", "temperature", "invalid_value"),
        ({"temperature": "hot"}, "temperature must be a number", "temperature", "invalid_type"),
        ({"max_tokens": 0}, "max_tokens must be at least 1", "max_tokens", "invalid_value"),
        ({"max_tokens": 10_000}, "the answer may have", "max_tokens", "context_length_exceeded"),
        ({"max_completion_tokens": 9999}, "may have", "max_completion_tokens", "context_length_exceeded"),
        ({"messages": []}, "messages needs at least 1", "messages", "invalid_value"),
        ({"messages": "hello"}, "messages must be a list", "messages", "invalid_type"),
        ({"messages": None}, "messages must be a list", "messages", "invalid_type"),
        ({"messages": [{"role": "user"}]}, "has no content", "messages[0]", "invalid_value"),
        ({"messages": [{"role": "x", "content": ""}]}, "must be one of", "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "text alone", "messages[0].content", "invalid_value"),
        ({"messages": [{**MESSAGES[0], "tool_calls": [TOOL]}]}, "the assistant's", "messages[0]", "invalid_value"),
        ({"messages": [{**MESSAGES[0], "images": ["x"]}]}, "images", "messages", "unsupported_parameter"),
        ({"messages": [{"role": "user", "content": "a " * 600}]}, "tokens", "messages", "context_length_exceeded"),
        ({"stop": ["x"] * 17}, "stop has more than 16 parts", "stop", "invalid_value"),
        ({"model": "pink"}, "there is no model 'pink' here", "model", "model_not_found"),
    ],
)
def test_what_is_refused_names_the_key_and_has_a_code(
    serve: Callable[..., int], changed: dict[str, Any], says: str, param: str, code: str
) -> None:
    error = _error(serve(), {**ASKED, **changed})
    assert says in error["message"] and "Input should" not in error["message"], error
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")


def test_what_changes_no_answer_is_taken_and_a_body_that_is_no_json_is_said(serve: Callable[..., int]) -> None:
    port = serve()
    describing = {"user": "ada", "store": False, "metadata": {"a": "b"}, "parallel_tool_calls": True, "n": 1}
    assert ask(port, {**ASKED, **describing})[0] == 200
    tool = [*MESSAGES, {"role": "assistant", "content": "a", "tool_calls": None}]
    tool.append({"role": "tool", "content": "4", "tool_call_id": "1"})
    assert ask(port, {**ASKED, "messages": tool})[0] == 200, "trained on messages, which have the role tool"
    assert "the body is not JSON" in ask(port, b"{")[1]
    error = _error(port, {"model": "base"}, "/v1/completions")
    assert (error["message"], error["param"]) == ("prompt is missing", "prompt")


def _error(port: int, body: Any, path: str = "/v1/chat/completions") -> dict[str, Any]:
    asked = urllib.request.Request(f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), JSON)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(asked, timeout=20)
    found: dict[str, Any] = json.load(refused.value)["error"]
    return found


def test_slow_callers_are_cut_off_and_others_are_answered_meanwhile(
    serve: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loractl.common.listener.HEADERS_S", 0.4)
    monkeypatch.setattr(http, "BODY_S", 0.4)
    port = serve()
    line = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    begun = line + b"Content-Length: 4000\r\n\r\n{"
    slow = {
        "silent": b"", "a line": b"POST /v1/ch", "headers": line, "body": begun,
        "answered": begun.replace(b"/v1/chat/completions", b"/nowhere"),
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        callers = {name: stack.enter_context(socket.create_connection(("127.0.0.1", port))) for name in slow}
        for name, caller in callers.items():
            caller.sendall(slow[name])
        assert ask(port)[0] == 200
        ended: dict[str, bytes] = {}
        deadline = time.monotonic() + 20
        while len(ended) < len(callers):
            assert time.monotonic() < deadline, f"only {list(ended)} were cut off"
            for name, caller in callers.items():
                if name not in ended and _dripped(caller, name) is not None:
                    ended[name] = b""
            time.sleep(0.05)
    assert ask(port)[0] == 200


def _dripped(caller: socket.socket, name: str) -> bytes | None:
    """Send another byte, as slow callers do; b"" once the server has closed the connection."""
    try:
        if name != "silent":
            caller.sendall(b"x")
        caller.settimeout(0.01)
        return None if caller.recv(65536) else b""
    except TimeoutError:
        return None
    except OSError:
        return b""


def test_a_body_that_does_not_come_is_answered(serve: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "BODY_S", 0.2)
    port = serve()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(f"{head}Content-Length: 99\r\n\r\n{{".encode())
        answer = b""
        while b"}" not in answer and (more := connection.recv(65536)):  # head and body may come apart
            answer += more
    assert answer.startswith(b"HTTP/1.1 408 ") and b"the body did not arrive within 0.2 s" in answer


def test_a_fleet_behind_one_address_is_answered_or_told_to_come_later(serve: Callable[..., int]) -> None:
    """800 callers whose connections open before any of them has sent its request, as agents behind a proxy."""
    port, body = serve(), json.dumps({"model": "base", "prompt": "queue", "max_tokens": 1}).encode()
    lines = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\nConnection: close\r\n"

    async def post(opened: asyncio.Barrier) -> tuple[bytes, bytes]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        await opened.wait()
        with contextlib.closing(writer):
            writer.write(f"{lines}Content-Type: application/json\r\n\r\n".encode())
            await writer.drain()
            writer.write(body)
            head, _, answer = (await reader.read()).partition(b"\r\n\r\n")
        assert json.loads(answer)
        return head.split()[1], head.lower()

    async def all_at_once() -> list[tuple[bytes, bytes]]:
        opened = asyncio.Barrier(800)
        return await asyncio.gather(*(post(opened) for _ in range(800)))

    answers = asyncio.run(asyncio.wait_for(all_at_once(), 60))
    counts = Counter(status for status, _ in answers)
    assert counts[b"200"] + counts[b"503"] == 800 and counts[b"200"] >= http.MOST_WAITING, counts
    assert all(b"\r\nretry-after: 5" in head for status, head in answers if status == b"503")


def test_a_prompt_that_can_not_fit_is_refused_before_it_is_tokenised(
    serve: Callable[..., int], engine: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    port, read = serve(), []
    monkeypatch.setattr(http, "prompt_for", lambda *given: read.append("chat"))
    monkeypatch.setattr(http, "text_prompt", lambda *given: read.append("text"))
    room = engine.longest
    assert room == 512
    long = "x" * (room * http.LETTERS_A_TOKEN + 1)
    for messages in ([long], [long[:5000], long[5000:]], ["x"] * (room + 1)):
        asked = {"model": "base", "messages": [{"role": "user", "content": text} for text in messages]}
        status, message = ask(port, asked)
        assert (status, f"{sum(map(len, messages))} letters in {len(messages)} messages" in message) == (400, True)
    assert ask(port, {"model": "base", "prompt": long}, "/v1/completions")[0] == 400
    assert read == []
    assert ask(port, {"model": "x" * 257, "prompt": "x"}, "/v1/completions") == (
        400, "model has more than 256 letters",
    )  # fmt: skip
