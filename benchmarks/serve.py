"""32 openai clients at once, over three adapters on one base, beside the same requests one after another.

    loractl submit examples/{sentiment,summaries,questions}-lora.yaml && loractl worker --drain-when-idle
    python -m benchmarks.serve

Needs those adapters in LORACTL_HOME. Starts `loractl serve`, asks prompts of the examples' test files, in fp32 and in
bf16: one after another; all at once, but one adapter at a time; all at once, mixed. Prints seconds, generated tokens a
second, and how many answers are those that were given one after another. About five minutes on two cores.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import openai
from openai.types.chat import ChatCompletionMessageParam

ROOT = Path(__file__).parents[1]
TASKS = ("sentiment", "summaries", "questions")
CLIENTS = 32
MAX_TOKENS = 40


@dataclass(frozen=True, kw_only=True)
class Request:
    """One question for one adapter."""

    model: str
    prompt: str


@dataclass(frozen=True, kw_only=True)
class Round:
    """What a way of asking came to."""

    way: str
    seconds: float
    tokens: int
    answers: list[str]


def main() -> None:
    print(f"{CLIENTS} requests over {len(TASKS)} adapters, at most {MAX_TOKENS} tokens each.\n")
    print(f"{'':<10}{'':<34}{'SECONDS':>8}{'TOKENS/S':>10}{'RATIO':>7}  EQUAL ANSWERS")
    for dtype in ("float32", "bfloat16"):
        with serving(dtype) as url, openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            asked = requests()
            ask(client, [next(r for r in asked if r.model == task) for task in TASKS], 1)  # adapters are loaded
            alone = timed("one after another", client, [asked], 1)
            apart = [[r for r in asked if r.model == task] for task in TASKS]
            rounds = [
                alone,
                timed("all at once, adapter by adapter", client, apart, CLIENTS),
                timed("all at once, mixed", client, [asked], CLIENTS),
            ]
            for one in rounds:
                show(dtype, one, alone)


def requests() -> list[Request]:
    """Prompts that no adapter was trained on, the adapters in turn."""
    rows = {task: (ROOT / "examples" / "data" / f"{task}-test.jsonl").read_text("utf-8").splitlines() for task in TASKS}
    found = []
    for number in range(CLIENTS):
        task = TASKS[number % len(TASKS)]
        row = json.loads(rows[task][number // len(TASKS)])
        found.append(Request(model=task, prompt=f"{row['instruction']}\n\n{row['input']}"))
    return found


def timed(way: str, client: openai.OpenAI, groups: Sequence[Sequence[Request]], clients: int) -> Round:
    """The groups one after another, each with so many clients at once; answers in the order of `requests`."""
    began, found = time.monotonic(), {}
    for group in groups:
        found.update(ask(client, group, clients))
    seconds = time.monotonic() - began
    answers = [found[request] for request in requests()]
    return Round(way=way, seconds=seconds, tokens=sum(n for _, n in answers), answers=[text for text, _ in answers])


def ask(client: openai.OpenAI, asked: Sequence[Request], clients: int) -> dict[Request, tuple[str, int]]:
    """(answer, tokens) of each request."""

    def one(request: Request) -> tuple[str, int]:
        messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": request.prompt}]
        done = client.chat.completions.create(model=request.model, messages=messages, max_tokens=MAX_TOKENS)
        assert done.usage is not None
        return done.choices[0].message.content or "", done.usage.completion_tokens

    with ThreadPoolExecutor(clients) as pool:
        return dict(zip(asked, pool.map(one, asked), strict=True))


def show(dtype: str, one: Round, alone: Round) -> None:
    equal = sum(a == b for a, b in zip(one.answers, alone.answers, strict=True))
    rate, ratio = one.tokens / one.seconds, alone.seconds / one.seconds
    print(
        f"{dtype:<10}{one.way:<34}{one.seconds:>8.1f}{rate:>10.1f}{ratio:>7.2f}  {equal} of {CLIENTS}",
        flush=True,
    )


@contextlib.contextmanager
def serving(dtype: str) -> Iterator[str]:
    named = ",".join(f"{task}={task}-lora" for task in TASKS)
    command = [str(Path(sys.executable).with_name("loractl")), "serve", "--port", "0", "--dtype", dtype]
    server = subprocess.Popen([*command, "--adapters", named], stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        for line in server.stderr:
            if found := re.match(r"Serving at (http://\S+);", line):
                yield found[1]
                return
        raise SystemExit("loractl serve did not start: are the adapters of the examples stored?")
    finally:
        server.send_signal(signal.SIGINT)
        server.wait()


if __name__ == "__main__":
    main()
