"""The HTTP application of loractl serve: it takes requests on an event loop, and one thread decodes them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from loractl.common.errors import LoractlError, UsageError
from loractl.common.job.sections import DataFormat, PromptTemplate
from loractl.common.store.database import DatabaseError
from loractl.worker.data.prompt import prompt_for, text_prompt
from loractl.worker.data.tokens import message_of
from loractl.worker.serving.decoding.decoder import Decoder, TooLong
from loractl.worker.serving.decoding.grammar import CallForm, CallReader, form_of
from loractl.worker.serving.decoding.logprobs import TokenTexts
from loractl.worker.serving.decoding.request import Ask, Said
from loractl.worker.serving.library import Library, Listed

from .access import AccessControl, answered
from .openai_api import (
    ApiError,
    ChatRequest,
    DetokenizeRequest,
    TextRequest,
    TokenizeRequest,
    refusal,
)
from .reply import Reply, ReplyChoice

log = logging.getLogger("loractl.worker")

DEFAULT_TOKENS = 512
"""The token limit of a request that names none."""

MOST_WAITING = 256
"""Answers that may wait for a place in the batch; further ones are asked to come later."""

AGAIN_S = 5
"""Seconds after which a caller that was sent away should ask again."""

FRESH_S = 2.0
"""The list of stored adapters is reread when older than this."""

GONE_S = 0.5
"""How often to check whether the caller of an answer that is not streamed is still there."""

MOST_BODY_BYTES = 4 * 2**20

BODY_S = 30.0
"""Seconds in which a body must have arrived: a slow one holds a connection and its memory."""

LETTERS_A_TOKEN = 16
"""A prompt with more letters than this per token that fits is refused unread. Text has 3 to 5; a long run of spaces or
dashes may be a single token, but no prompt consists of those."""


MOST_LOGPROBS = 2**20
"""Log-probabilities that one request may ask for: each takes some hundred bytes until the answer is sent."""

HAS = "/v1/chat/completions, /v1/completions and /v1/models"


class Names:
    """The names that a request may give: those of --adapters, or of all stored adapters of the base."""

    def __init__(self, given: Mapping[str, Listed] | None, library: Library, base: str, revision: str | None) -> None:
        self._given = given
        self._library, self._base, self._revision = library, base, revision
        self._stored: dict[str, Listed] = {}
        self._looked = -math.inf

    def all(self) -> dict[str, Listed]:
        if self._given is not None:
            return dict(self._given)
        if time.monotonic() - self._looked > FRESH_S:
            self._stored = self._library.on(self._base, self._revision)
            self._looked = time.monotonic()
        return dict(self._stored)

    def find(self, name: str) -> Listed | None:
        """The adapter of a name; None for the base. Raises KeyError."""
        if name == "base":
            return None
        for tried in (name, f"{name}:latest"):
            if tried in (known := self.all()):
                return known[tried]
        self._looked = -math.inf  # the name may have been stored or tagged since
        known = self.all()
        return known[name] if name in known else known[f"{name}:latest"]


def make_app(engine: Decoder, names: Names, library: Library, *, key: str | None, temperature: float = 0.0) -> FastAPI:
    """The application: what HAS names, /health, and the tokenizer as on vLLM's servers."""
    service = Service(engine, names, library, temperature)
    app = FastAPI(title="loractl", docs_url=None, redoc_url=None, openapi_url=None, lifespan=service.open)
    app.add_middleware(AccessControl, key=key)

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return answered(error)

    @app.exception_handler(HTTPException)
    async def not_found(request: Request, error: HTTPException) -> Response:
        path = request.scope["path"]
        if error.status_code == 404:
            return answered(ApiError(404, f"loractl serve does not have {path[:64]}; it has {HAS}"))
        return answered(ApiError(error.status_code, f"{request.method} {path}: {error.detail}"))

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return answered(ApiError(499, "the caller has gone"))

    @app.get("/health")
    async def health() -> Response:
        state = {"status": service.state, "running": engine.running, "waiting": engine.waiting}
        return JSONResponse(state, status_code=200 if service.state == "ok" else 503)

    def takes(path: str, kind: type[BaseModel], answer: Callable[[Any, Request], Awaitable[Any]]) -> None:
        @app.post(path)
        async def posted(request: Request) -> Any:
            return await answer(await _read(request, kind), request)

    app.get("/v1/models")(service.models)
    app.get("/v1/models/{name:path}")(service.model)
    app.get("/tokenizer_info")(service.tokenizer_info)
    takes("/v1/chat/completions", ChatRequest, service.chat)
    takes("/v1/completions", TextRequest, service.complete)
    takes("/tokenize", TokenizeRequest, service.tokenize)
    takes("/detokenize", DetokenizeRequest, service.detokenize)
    return app


async def _read(request: Request, kind: Any) -> Any:
    """The body as a request of its kind. Raises ApiError, which names the first error."""
    raw = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for block in request.stream():
                raw += block
                if len(raw) > MOST_BODY_BYTES:
                    raise ApiError(413, f"the body has more than {MOST_BODY_BYTES} bytes")
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {BODY_S:g} s") from None
    try:
        return kind.model_validate_json(bytes(raw))
    except ValidationError as error:
        raise refusal(error) from None


class Service:
    """Takes requests on the event loop, and hands them to the only thread that decodes."""

    def __init__(self, engine: Decoder, names: Names, library: Library, temperature: float) -> None:
        self._engine, self._names, self._library, self._temperature = engine, names, library, temperature
        self._texts = TokenTexts(engine.tokenizer)
        self._over = threading.Event()
        self.state = "ok"

    @contextlib.asynccontextmanager
    async def open(self, app: Any) -> AsyncIterator[None]:
        """Decode as long as the application lives."""
        thread = threading.Thread(target=self._decode, name="decode", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            await asyncio.to_thread(thread.join)

    def _decode(self) -> None:
        """The only thread that steps. If it fails, all callers get an error, and /health reports it."""
        try:
            while not self._over.is_set():
                if not self._engine.step():
                    self._engine.wait(0.2)
        except Exception:
            log.exception("decoding has ended")
            self.state = "decoding has failed: start the server again"
        else:
            self.state = "the server is ending"
        self._engine.fail_all(self.state)

    async def models(self) -> dict[str, Any]:
        known = sorted((await _refusing(self._names.all)).items())
        return {"object": "list", "data": [self._card("base", None), *(self._card(*one) for one in known)]}

    async def model(self, name: str) -> dict[str, Any]:
        listed = await self._find(name)
        return self._card("base" if listed is None else name, listed)

    def _card(self, name: str, listed: Listed | None) -> dict[str, Any]:
        """Of a model; None: the base."""
        own = {"id": name, "object": "model", "created": listed.created if listed else 0, "owned_by": "loractl"}
        if listed is not None:
            own |= {"job_id": listed.job_id, "name": listed.name, "base_model": listed.spec.base_model}
        return {**own, **self._engine.arithmetic(listed)}

    async def chat(self, asked: ChatRequest, request: Request) -> Any:
        listed = await self._find(asked.model)
        turns, tools, more = (
            [message.turn() for message in asked.messages],
            asked.tools or [],
            asked.chat_template_kwargs,
        )
        letters = sum(len(turn.said) for turn in turns) + sum(len(json.dumps(one)) for one in (tools, more) if one)
        self._check_length(letters, len(turns), "messages")
        self._demanded(asked)
        format = DataFormat.MESSAGES if listed is None else await _refusing(partial(self._library.format, listed))
        if format not in (DataFormat.MESSAGES, DataFormat.SHAREGPT, DataFormat.PREFERENCE) and any(
            turn.role == "tool" for turn in turns
        ):
            what = f"role tool is not known to {asked.model}: it was trained on {format.value} rows, which have none"
            raise ApiError(400, what, param="messages")
        template = PromptTemplate.CHAT if listed is None else listed.spec.dataset.template
        messages = [message_of(turn, self._tokenizer) for turn in turns]
        ids = await _refusing(
            lambda: prompt_for(format, messages, self._tokenizer, template, tools, more),
            "tools" if tools else "messages",
        )
        return await self._answer(asked, listed, [ids], request)

    async def complete(self, asked: TextRequest, request: Request) -> Any:
        listed = await self._find(asked.model)
        for text in asked.prompt:
            self._check_length(len(text) if isinstance(text, str) else 0, 1, "prompt")
        prompts = await _refusing(lambda: [self._prompt(prompt) for prompt in asked.prompt], "prompt")
        return await self._answer(asked, listed, prompts, request)

    def _prompt(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            return text_prompt(prompt, self._tokenizer)
        self._check_tokens(prompt, "prompt")
        return prompt

    def _check_tokens(self, tokens: Sequence[int], param: str) -> None:
        """On a card a number beyond the vocabulary would end the process. Raises ApiError."""
        most = self._engine.vocabulary
        if wrong := [token for token in tokens if not 0 <= token < most]:
            raise ApiError(400, f"there is no token {wrong[0]}: the model has those from 0 to {most - 1}", param=param)

    async def tokenizer_info(self) -> dict[str, Any]:
        known = self._tokenizer
        names = ("bos_token", "eos_token", "pad_token", "chat_template")
        return {"tokenizer_class": type(known).__name__, **{name: getattr(known, name) for name in names}}

    async def tokenize(self, asked: TokenizeRequest, request: Request) -> dict[str, Any]:
        self._check_length(len(asked.prompt), 1, "prompt")
        special = asked.add_special_tokens
        ids = await _refusing(lambda: self._tokenizer(asked.prompt, add_special_tokens=special).input_ids)
        return {"tokens": ids, "count": len(ids), "max_model_len": self._engine.longest}

    async def detokenize(self, asked: DetokenizeRequest, request: Request) -> dict[str, Any]:
        # a body holds two million tokens, and the text of each may be a hundred letters
        await _refusing(lambda: self._engine.room(len(asked.tokens), 0), "tokens")
        self._check_tokens(asked.tokens, "tokens")
        return {"prompt": await _refusing(lambda: self._tokenizer.decode(asked.tokens))}

    @property
    def _tokenizer(self) -> Any:
        return self._engine.tokenizer

    def _check_length(self, letters: int, messages: int, param: str) -> None:
        """Refuse what can't fit before tokenising it, which takes long. Raises ApiError."""
        room = self._engine.longest
        if letters > LETTERS_A_TOKEN * room or messages > room:
            what = f"the prompt has {letters} letters in {messages} messages, the model takes {room} tokens in all"
            raise ApiError(400, what, code="context_length_exceeded", param=param)

    async def _find(self, name: str) -> Listed | None:
        try:
            return await _refusing(lambda: self._names.find(name))
        except KeyError:
            what = f"there is no model {name!r} here; /v1/models lists them"
            raise ApiError(404, what, code="model_not_found", param="model") from None

    async def _answer(
        self, asked: ChatRequest | TextRequest, listed: Listed | None, prompts: Sequence[list[int]], request: Request
    ) -> Any:
        if self.state != "ok":
            raise ApiError(503, self.state)
        wanted = len(prompts) * asked.each
        if self._engine.waiting + wanted > MOST_WAITING:
            what = f"{self._engine.waiting} answers wait already, {MOST_WAITING} may; try again in {AGAIN_S} s"
            raise ApiError(503, what, code="overloaded", again_s=AGAIN_S)
        limits = await _refusing(
            lambda: [self._limit(asked, len(ids)) for ids in prompts],
            "messages" if isinstance(asked, ChatRequest) else "prompt",
        )
        self._check_logprobs(asked, sum(map(len, prompts)), sum(limits))
        said: asyncio.Queue[tuple[int, Said]] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        first = await self._ask(asked, listed)
        asks = [
            replace(
                first,
                prompt=ids,
                say=partial(_hand_over, loop, said, number * asked.each + turn),
                max_new_tokens=limit,
                seed=None if asked.seed is None else asked.seed + turn,
                form=None if first.form is None else first.form.copy(),
            )
            for number, (ids, limit) in enumerate(zip(prompts, limits, strict=True))
            for turn in range(asked.each)
        ]
        await _refusing(lambda: self._engine.ask(*asks))
        choices = [self._choice(asked, ask, number) for number, ask in enumerate(asks)]
        reply = Reply(asked.model, sum(map(len, prompts)), choices, chat=isinstance(asked, ChatRequest))
        headers = {"x-loractl-not-used": ", ".join(asked.unused)} if asked.unused else {}
        if asked.stream:
            events = self._events(reply, said, first.cancelled, usage=asked.usage_wanted)
            headers["cache-control"] = "no-cache"
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        await self._take_all(reply, said, first.cancelled, request)
        # off the event loop: a thousand log-probabilities take a while
        return await asyncio.to_thread(lambda: JSONResponse(reply.whole(), headers=headers))

    def _limit(self, asked: ChatRequest | TextRequest, prompt: int) -> int:
        """Tokens that the answer to a prompt of this length may have. Raises TooLong, ApiError."""
        room = self._engine.room(prompt, 0 if asked.limit == 0 else 1)
        if asked.limit is not None and asked.limit > room:
            what = f"{prompt} tokens are asked and {asked.limit} wanted; the answer may have {room} at the most"
            raise ApiError(400, what, code="context_length_exceeded", param=asked.limit_key)
        return min(DEFAULT_TOKENS, room) if asked.limit is None else asked.limit

    def _check_logprobs(self, asked: ChatRequest | TextRequest, prompts: int, answers: int) -> None:
        """Raises ApiError for more than memory should hold."""
        if asked.likely is None:
            return
        tokens = asked.each * (answers + (prompts if asked.echoed else 0))
        if tokens * (1 + asked.likely) > MOST_LOGPROBS:
            what = f"log-probabilities of up to {tokens} tokens, with {asked.likely} likely ones each, are too many"
            raise ApiError(400, f"{what}: {MOST_LOGPROBS} numbers are the most", param="logprobs")

    def _choice(self, asked: ChatRequest | TextRequest, ask: Ask, number: int) -> ReplyChoice:
        text = ""
        if isinstance(asked, TextRequest) and asked.echo:
            given = asked.prompt[number // asked.each]
            text = given if isinstance(given, str) else self._tokenizer.decode(given)
        return ReplyChoice(
            number,
            reader=CallReader(self._calls) if ask.marks and self._calls is not None else None,
            texts=None if asked.likely is None else self._texts,
            text=text,
        )

    async def _ask(self, asked: ChatRequest | TextRequest, listed: Listed | None) -> Ask:
        """What all of a request's answers share."""
        folder = None if listed is None else await _refusing(lambda: self._library.fetch(listed))
        schema = asked.schema_wanted
        form = None if schema is None else await _refusing(lambda: self._engine.forms.of(schema), "response_format")
        tools = asked.tools if isinstance(asked, ChatRequest) and asked.tool_choice != "none" else None
        calls = self._demanded(asked) if isinstance(asked, ChatRequest) else None
        if calls is not None:
            form = await _refusing(lambda: self._engine.forms.of_call(*calls), "tool_choice")
        return Ask(
            prompt=(),
            say=lambda said: None,
            max_new_tokens=0,
            adapter=listed,
            folder=folder,
            temperature=self._temperature if asked.temperature is None else asked.temperature,
            top_p=1.0 if asked.top_p is None else asked.top_p,
            top_k=max(0, asked.top_k or 0),
            min_p=asked.min_p or 0.0,
            stop=asked.stops,
            logprobs=asked.likely,
            prompt_logprobs=asked.likely is not None and asked.echoed,
            form=form,
            marks=bool(tools) and self._calls is not None,
        )

    def _demanded(self, asked: ChatRequest) -> tuple[CallForm, list[dict[str, Any]]] | None:
        """The form of a call, and the tools, one of which must be called. Raises ApiError if that is impossible."""
        if not (tools := asked.demanded):
            return None
        if asked.schema_wanted is not None:
            raise ApiError(400, "tool_choice requires a call, and response_format something else", param="tool_choice")
        if (calls := self._calls) is None:
            what = "the model's chat template writes calls in a form that is not known here, so none can be demanded"
            raise ApiError(400, what, param="tool_choice")
        return calls, tools

    @property
    def _calls(self) -> CallForm | None:
        """How the base's template writes calls; None: in no form known here."""
        return form_of(str(self._tokenizer.chat_template))

    async def _take_all(
        self, reply: Reply, said: asyncio.Queue[tuple[int, Said]], cancelled: threading.Event, request: Request
    ) -> None:
        """Read the pieces until all choices have ended. Raises ApiError."""
        left, looked = len(reply.choices), time.monotonic()
        try:
            while left:
                if time.monotonic() - looked >= GONE_S:  # also during much output
                    looked = time.monotonic()
                    if await request.is_disconnected():
                        raise ApiError(499, "the caller has gone")
                try:
                    number, piece = await asyncio.wait_for(said.get(), GONE_S)
                except TimeoutError:
                    continue
                if piece.ended in ("error", "cancelled"):
                    raise _failure(piece)
                reply.choices[number].take(piece)
                left -= piece.ended is not None
        finally:
            cancelled.set()  # a caller who leaves early frees the place

    async def _events(
        self, reply: Reply, said: asyncio.Queue[tuple[int, Said]], cancelled: threading.Event, *, usage: bool
    ) -> AsyncIterator[str]:
        """Server-sent events; a caller who leaves ends the answers."""
        left = len(reply.choices)
        try:
            while left:
                number, piece = await said.get()
                if piece.ended == "error":
                    yield _event(_failure(piece).body())
                    break
                left -= piece.ended is not None
                choice = reply.choices[number]
                choice.take(piece)
                if choice.news:
                    yield _event(reply.piece(choice))
            else:
                if usage:
                    yield _event(reply.last_piece())
            yield "data: [DONE]\n\n"
        finally:
            cancelled.set()


def _failure(piece: Said) -> ApiError:
    if piece.refused:  # only a form is refused this late
        return ApiError(400, piece.error or "", param="response_format")
    return ApiError(500, piece.error or "the answer was cancelled")


def _hand_over(
    loop: asyncio.AbstractEventLoop, said: asyncio.Queue[tuple[int, Said]], number: int, piece: Said
) -> None:
    with contextlib.suppress(RuntimeError):  # the loop has ended, and with it the caller
        loop.call_soon_threadsafe(said.put_nowait, (number, piece))


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


async def _refusing(work: Callable[[], Any], param: str | None = None) -> Any:
    """Run the call in a thread off the event loop; an error becomes an ApiError about the request's `param`."""
    try:
        return await asyncio.to_thread(work)
    except TooLong as error:
        raise ApiError(400, error.sentence, code="context_length_exceeded", param=param) from error
    except UsageError as error:
        hint = f" ({error.hint})" if error.hint else ""
        raise ApiError(400, f"{error.sentence}{hint}", param=param) from error
    except (LoractlError, DatabaseError) as error:
        what = error.sentence if isinstance(error, LoractlError) else "the database is away"
        log.error("%s", what)
        raise ApiError(503, what) from error
