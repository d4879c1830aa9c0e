"""loractl serve as its users meet it: through the official openai client, many at a time."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from loractl.common.queue.valkey import stop_embedded
from loractl.common.settings import load_settings
from loractl.common.store.database import connect
from loractl.worker.serving.library import Library

from ..conftest import Cli
from ..models import write_job
from .conftest import ANSWERS

openai = pytest.importorskip("openai")

SERVED = "red=red,green=2,blue=blue:latest"


@contextlib.contextmanager
def serving(cli: Cli, *arguments: object, said: list[str] | None = None, warm_start: bool = True) -> Iterator[str]:
    """The address of a server that answers; afterwards it must end at once when it is told to."""
    process = cli.start("serve", "--port", 0, *arguments, warm_start=warm_start)
    said = [] if said is None else said
    assert process.stdout is not None
    try:
        for line in process.stdout:
            said.append(line)
            if found := re.match(r"Serving at (http://\S+);", line):
                reader = threading.Thread(target=said.extend, args=(process.stdout,), daemon=True)
                reader.start()
                yield found[1]
                break
        else:
            raise AssertionError("".join(said))
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0, "".join(said)
        assert "Traceback" not in "".join(said), "".join(said)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def server(trained: Cli) -> Iterator[str]:
    asked = ("--adapters", SERVED, "--dtype", "float32", "--max-batch", 8)
    with serving(trained, *asked, warm_start=False) as url:  # once as a person starts it
        yield url


@pytest.fixture
def client(server: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server, api_key="unused", max_retries=0) as client:
        yield client


def _ask(client: openai.OpenAI, model: str, text: str, most: int = 48, **more: object) -> str:
    asked = [{"role": "user", "content": text}]
    done = client.chat.completions.create(model=model, messages=asked, max_tokens=most, **more)
    return str(done.choices[0].message.content)


def test_the_model_of_a_request_picks_the_adapter(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["base", "blue", "green", "red"]
    assert client.models.retrieve("green").job_id == 2
    done = client.chat.completions.create(
        model="red", messages=[{"role": "system", "content": "x"}, {"role": "user", "content": "what is in 4?"}]
    )
    assert done.choices[0].finish_reason == "stop" and done.model == "red"
    assert done.usage.completion_tokens > 3 and done.usage.total_tokens > done.usage.prompt_tokens > 10
    for name, answer in ANSWERS.items():
        assert _ask(client, name, "what is in 5?") == answer
    assert _ask(client, "base", "what is in 5?") not in ANSWERS.values()


def test_concurrent_clients_on_mixed_adapters_get_the_answers_that_each_gets_alone(client: openai.OpenAI) -> None:
    asked = [(name, f"what is in {n}?") for n in range(3) for name in (*ANSWERS, "base")]  # more than --max-batch
    alone = [_ask(client, *one) for one in asked]
    with ThreadPoolExecutor(len(asked)) as pool:
        together = list(pool.map(lambda one: _ask(client, *one), asked))
    assert together == alone


def test_a_stream_brings_the_same_text_in_pieces_with_its_usage(client: openai.OpenAI) -> None:
    asked = {"model": "green", "messages": [{"role": "user", "content": "what is in 5?"}], "max_tokens": 48}
    events = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    pieces = [event.choices[0].delta.content or "" for event in events if event.choices]
    assert "".join(pieces) == ANSWERS["green"] and len(pieces) > 3
    assert events[0].choices[0].delta.role == "assistant"
    assert [e.choices[0].finish_reason for e in events if e.choices][-1] == "stop"
    assert events[-1].usage.completion_tokens == client.chat.completions.create(**asked).usage.completion_tokens
    assert len({event.id for event in events}) == 1
    plain = list(client.chat.completions.create(**asked, stream=True))
    assert all(event.usage is None for event in plain)


def test_sampling_follows_temperature_and_seed_and_stops_stop(client: openai.OpenAI) -> None:
    hot = [_ask(client, "base", "what is in 5?", temperature=1.5, seed=seed) for seed in (1, 1, 2)]
    assert hot[0] == hot[1] != hot[2]
    assert _ask(client, "red", "what is in 5?", stop=[" and"]) == ANSWERS["red"].partition(" and")[0]
    cut = client.chat.completions.create(
        model="red", messages=[{"role": "user", "content": "what is in 5?"}], max_completion_tokens=2
    )
    assert cut.choices[0].finish_reason == "length" and cut.usage.completion_tokens == 2


def test_plain_completions_continue_a_text(client: openai.OpenAI) -> None:
    done = client.completions.create(model="base", prompt="queue priority", max_tokens=5)
    assert done.choices[0].finish_reason in ("length", "stop") and done.usage.completion_tokens <= 5
    parts = client.completions.create(model="base", prompt="queue priority", max_tokens=5, stream=True)
    assert "".join(event.choices[0].text for event in parts) == done.choices[0].text


TASKS = {
    "choices": """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "answers": """
output_type: generate_until
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: [" and", "\\n\\n", "?", "#", "%"], max_gen_toks: 24}
metric_list: [{metric: exact_match}]
""",
    "texts": """
output_type: loglikelihood_rolling
doc_to_target: "{{text}} {{choices[0]}}"
metric_list: [{metric: bits_per_byte}]
""",
}
"""Tasks of lm-eval of each kind that a causal model has."""


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """Evaluates a model of lm-eval on all tasks, or on some."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    folder = tmp_path_factory.mktemp("tasks")
    answers = [*ANSWERS.values()]
    rows = [{"text": f"what is in {n}?", "choices": answers, "answer": n % 3} for n in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in TASKS.items():
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}}}\n"
        (folder / f"{name}.yaml").write_text(f"{head}test_split: test\ndoc_to_text: '{{{{text}}}}'\n{task}")
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return lambda model, *names: lm_eval.simple_evaluate(
        model, tasks=[*(names or TASKS)], task_manager=manager, log_samples=True, bootstrap_iters=0
    )


def _same_scores(one: dict[str, Any], other: dict[str, Any]) -> None:
    for name, numbers in one["results"].items():
        for metric, number in numbers.items():
            if "," in metric and "_stderr" not in metric:
                assert other["results"][name][metric] == pytest.approx(number, abs=1e-4), (name, metric)
        for mine, other_s in zip(one["samples"][name], other["samples"][name], strict=True):
            assert mine["doc_id"] == other_s["doc_id"]
            for (said,), (theirs,) in zip(mine["resps"], other_s["resps"], strict=True):
                if isinstance(said, tuple):  # (log-likelihood, whether it is the likeliest)
                    assert said[0] == pytest.approx(theirs[0], abs=1e-3) and bool(said[1]) == bool(theirs[1])
                else:
                    assert said == (theirs if isinstance(theirs, str) else pytest.approx(theirs, abs=1e-3))


@pytest.mark.long
def test_lm_eval_scores_a_served_adapter_as_it_scores_the_model_itself(
    server: str, harness: Callable[..., dict[str, Any]], trained: Cli, base_of_trained: Path, tmp_path: Path
) -> None:
    """Base and adapter, each kind of task, and each way in which lm-eval sends its prompts."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    trained("adapters", "pull", "red", tmp_path / "red")
    own = {"tokenizer": str(base_of_trained), "tokenizer_backend": "huggingface"}
    ways = {
        "red": [{}, {**own, "batch_size": 4}, {**own, "tokenized_requests": False, "batch_size": 5}],
        "base": [{"batch_size": 16}],
    }
    scores = {}
    for name, several in ways.items():
        more = {"peft": str(tmp_path / "red")} if name == "red" else {}
        direct = harness(HFLM(str(base_of_trained), dtype="float32", device="cpu", batch_size=4, **more))
        for way in several:
            served = LocalCompletionsAPI(f"{server}/completions", model=name, max_length=512, max_retries=1, **way)
            _same_scores(direct, harness(served))
        without = {"tokenizer_backend": "none", "max_retries": 1, "eos_string": "<|im_end|>"}
        _same_scores(
            harness(LocalCompletionsAPI(f"{server}/completions", model=name, **without), "answers"),
            {key: {"answers": direct[key]["answers"]} for key in ("results", "samples")},
        )
        scores[name] = direct["results"]["texts"]["bits_per_byte,none"]
    assert scores["red"] != pytest.approx(scores["base"], abs=0.01), "the adapter was on for one and off for the other"


TICKET = {
    "type": "object",
    "properties": {"queue": {"enum": ["gpu", "network"]}, "urgent": {"type": "boolean"}},
    "required": ["queue", "urgent"],
    "additionalProperties": False,
}
"""A schema that no adapter here was trained on."""


def test_an_answer_is_held_to_its_schema_beside_others_that_are_not(client: openai.OpenAI) -> None:
    pytest.importorskip("llguidance")
    form = {"type": "json_schema", "json_schema": {"name": "ticket", "schema": TICKET, "strict": True}}
    held = {"response_format": form, "most": 300}
    asked = [("red", {}), ("red", held), ("base", held), ("blue", {**held, "temperature": 1.5, "seed": 3}), ("red", {})]
    with ThreadPoolExecutor(len(asked)) as pool:
        free, *tickets, again = pool.map(lambda one: _ask(client, one[0], "what is in 5?", **one[1]), asked)
    assert free == again == ANSWERS["red"], "a held answer changes no other"
    for ticket in map(json.loads, tickets):
        assert ticket["queue"] in ("gpu", "network") and type(ticket["urgent"]) is bool
        assert ticket.keys() == {"queue", "urgent"}
    any_object = _ask(client, "red", "what is in 5?", response_format={"type": "json_object"})
    assert any_object.startswith("{")


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        ({"model": "pink"}, "NotFoundError", "there is no model 'pink' here"),
        ({"model": "red", "n": 129}, "BadRequestError", "n must be at most 128"),
        ({"model": "red", "tools": [{"type": "function", "function": {"name": "f"}}]}, "BadRequestError", "tools"),
        ({"model": "red", "response_format": {"type": "xml"}}, "BadRequestError", "response_format.type"),
        ({"model": "red", "temperature": 3}, "BadRequestError", "temperature"),
        ({"model": "red", "messages": []}, "BadRequestError", "messages"),
        ({"model": "red", "max_tokens": 0}, "BadRequestError", "max_tokens"),
        ({"model": "red", "max_tokens": 100_000}, "BadRequestError", "the answer may have"),
        ({"model": "red", "stop": "x" * 300}, "BadRequestError", "stop"),
        (
            {"model": "red", "messages": [{"role": "user", "content": "long " * 2000}]},
            "BadRequestError",
            "the prompt has",
        ),
        ({"model": "red", "messages": [{"role": "teacher", "content": "x"}]}, "BadRequestError", "messages[0].role"),
        ({"model": "red", "extra_body": {"top_k": -3}}, "BadRequestError", "top_k must be at least -1"),
    ],
)
def test_what_can_not_be_done_is_refused_in_the_apis_own_form(
    client: openai.OpenAI, wrong: dict, error: str, says: str
) -> None:
    asked = {"messages": [{"role": "user", "content": "x"}], **wrong}
    with pytest.raises(getattr(openai, error)) as refused:
        client.chat.completions.create(**asked)
    assert says in refused.value.message
    assert refused.value.code and refused.value.param


def test_what_only_describes_the_caller_is_taken(client: openai.OpenAI) -> None:
    assert _ask(client, "red", "what is in 5?", user="ada", n=1, frequency_penalty=0, store=False) == ANSWERS["red"]


def test_a_caller_who_leaves_frees_the_place(server: str, client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="base", messages=[{"role": "user", "content": "x"}], max_tokens=450, stream=True
    )
    next(iter(stream))
    stream.close()
    assert _idle(server)
    with pytest.raises(openai.APITimeoutError):
        _ask(client.with_options(timeout=0.5), "base", "x", max_completion_tokens=450)
    assert _idle(server), "nor does one who does not stream"


def _idle(server: str) -> bool:
    import urllib.request

    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with urllib.request.urlopen(server.removesuffix("/v1") + "/health") as answer:
            if json.load(answer) == {"status": "ok", "running": 0, "waiting": 0}:
                return True
        time.sleep(0.1)
    return False


def test_a_page_in_a_browser_cannot_reach_it_by_a_name_of_its_own(server: str) -> None:
    import urllib.error
    import urllib.request

    asked = urllib.request.Request(f"{server}/models", headers={"Host": "evil.example:80"})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(asked)
    assert refused.value.code == 403


def test_a_key_is_asked_for_and_required_beyond_this_machine(trained: Cli) -> None:
    refused = trained("serve", "--adapters", "red", "--host", "0.0.0.0", code=2)
    assert "no key is set" in refused.stderr and "set LORACTL_API_KEY" in refused.stderr
    with serving(trained.with_environment(LORACTL_API_KEY="s3cret"), "--adapters", "red") as url:
        with openai.OpenAI(base_url=url, api_key="other", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError):
                client.models.list()
            with pytest.raises(openai.AuthenticationError):
                _ask(client, "red", "x")
        with openai.OpenAI(base_url=url, api_key="s3cret", max_retries=0) as client:
            assert _ask(client, "red", "what is in 5?") == ANSWERS["red"]


def test_without_a_list_every_stored_adapter_of_the_base_is_served_also_one_tagged_later(
    trained: Cli, base_of_trained: Path
) -> None:
    with (
        serving(trained, "--base", base_of_trained, "--adapter-memory", "100KiB") as url,
        openai.OpenAI(base_url=url, api_key="x", max_retries=0) as client,
    ):
        names = {model.id for model in client.models.list()}
        assert {"base", "1", "2", "3", "4", "red:latest", "green:latest", "blue:latest"} <= names
        for _ in range(2):  # 100 KiB hold two of the three: each comes back after it was evicted
            assert {name: _ask(client, name, "what is in 5?") for name in ANSWERS} == ANSWERS
        trained("adapters", "tag", 2, "served")
        assert _ask(client, "green:served", "what is in 5?") == ANSWERS["green"]
        trained("adapters", "untag", "green:served")
        time.sleep(2.5)  # the list of what is stored is so old at the most
        with pytest.raises(openai.NotFoundError):
            _ask(client, "green:served", "what is in 5?")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ([], 2, "there is nothing to serve"),
        (["--adapters", "pink"], 3, "no adapter pink:latest is stored"),
        (["--adapters", "a=red,a=green"], 2, "the name a is taken"),
        (["--adapters", "base=red"], 2, "the name base is taken"),
        (["--adapters", ","], 2, "--adapters names none"),
        (["--adapters", "red", "--base", "/elsewhere"], 2, "not for /elsewhere"),
        (["--adapters", "red", "--host", "example.org"], 2, "is not an address"),
        (["--adapters", "red", "--adapter-memory", "lots"], 2, "--adapter-memory: 'lots'"),
    ],
)
def test_a_server_that_can_not_start_says_why(trained: Cli, arguments: list[str], code: int, says: str) -> None:
    done: subprocess.CompletedProcess[str] = trained("serve", *arguments, code=code)
    assert says in done.stderr and "Traceback" not in done.stderr


def test_where_no_card_has_room_serve_and_generate_refuse_with_a_sentence(trained: Cli) -> None:
    small = trained.with_environment(LORACTL_DEVICES="sim:1GiB")
    for command in (("serve", "--adapters", "red", "--port", 0), ("generate", "red", "hello")):
        refused = small(*command, code=1).stderr
        assert re.search(r"Error: this takes \d\.\d GiB, and card 0 has 1\.0 free next to its jobs\n", refused), refused
        assert "Hint: wait for a job to end (loractl gpus)" in refused
    assert trained.with_environment(LORACTL_DEVICES="sim:1GiB,8GiB")("generate", "red", "hello").stdout.strip()


NF4, PLAIN = "1", "2"
"""The jobs of `two_kinds`."""


@pytest.fixture(scope="module")
def two_kinds(trained: Cli, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cli]:
    """A lab with two adapters on one base: one trained over NF4, one not. Both have learned half."""
    folder = tmp_path_factory.mktemp("kinds")
    home = Path(tempfile.mkdtemp(prefix="loractl-"))
    lab = trained.with_environment(LORACTL_HOME=str(home))
    base = shutil.copytree(tiny_model, folder / "base")
    rows = [{"instruction": f"what is in {n}?", "input": "", "output": ANSWERS["red"]} for n in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for method in ("qlora", "lora"):
        job = write_job(folder, base, name=f"kind-{method}", method=method, data="rows.jsonl")
        wanted = (
            "training.max_steps=12",
            "training.save_steps=60",
            "evaluation.samples=4",
            "evaluation.metrics=[loss]",
        )
        lab("submit", job, *(f"--set={one}" for one in wanted))
    lab("worker", "--drain-when-idle", timeout=300)
    yield lab
    stop_embedded(load_settings({"LORACTL_HOME": str(home)}))
    shutil.rmtree(home, ignore_errors=True)


@pytest.mark.long
def test_answers_come_in_the_arithmetic_of_training_and_another_one_is_named(two_kinds: Cli) -> None:
    """Of two adapters on one base one must give way: the second. In NF4 the first one's answers are its report's."""
    answers = json.loads(two_kinds("report", NF4, "--json").stdout)["evaluation"]["answers"]
    asked, wanted = [each["prompt"] for each in answers], [each["tuned"] for each in answers]
    assert len(asked) == 4
    said: list[str] = []
    with (
        serving(two_kinds, "--adapters", f"{NF4},{PLAIN}", said=said) as url,
        openai.OpenAI(base_url=url, api_key="x") as client,
    ):
        facts = {model.id: (model.trained_in, model.as_trained) for model in list(client.models.list())[1:]}
        assert facts == {NF4: ("NF4", True), PLAIN: ("dtype auto", False)}
        assert {model.served_in for model in client.models.list()} == {"NF4"}
        assert [_ask(client, NF4, text, most=8).strip() for text in asked] == wanted
    assert [line for line in said if line.startswith("Warning: ")] == [
        "Warning: trained on a base in dtype auto, and answer here on one in NF4: "
        f"kind-lora (job {PLAIN}); not all of their answers will be those of their reports.\n"
    ]
    done = two_kinds("generate", NF4, "--max-new-tokens", 8, "--json", *asked)
    assert [each["answer"].strip() for each in json.loads(done.stdout)] == wanted and "Warning" not in done.stderr


@pytest.mark.long
def test_an_adapter_of_steps_before_lean_ones_is_served_as_it_was_trained(two_kinds: Cli) -> None:
    settings = load_settings(two_kinds.environment)
    assert [str(Library(settings).find(name).arithmetic) for name in (NF4, PLAIN)] == ["NF4", "dtype auto"]
    with connect(settings).begin() as connection:
        connection.execute(text("UPDATE attempts SET engine = 1"))
    old = [str(Library(settings).find(name).arithmetic) for name in (NF4, PLAIN)]
    with connect(settings).begin() as connection:
        connection.execute(text("UPDATE attempts SET engine = 2"))
    assert old == ["NF4, all else in fp32", "dtype auto"]


@pytest.mark.long
def test_a_matrix_says_which_adapters_were_trained_in_another_arithmetic(two_kinds: Cli) -> None:
    done = two_kinds("matrix", "--adapters", f"{NF4},{PLAIN}", "--samples", 0, "--no-load-in-4bit")
    assert "Trained on a base in another arithmetic than " in done.stdout and f": {NF4}.\n" in done.stdout
    assert "Warning: trained on a base in NF4, and answer here on one in " in done.stderr
    assert f": kind-qlora (job {NF4}); not all" in done.stderr
