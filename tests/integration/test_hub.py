"""What the loaders make of the hub's answers, through the real clients and against a hub of one's own."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import errors
from safetensors import safe_open

from loractl.common.errors import DataError
from loractl.common.job.method import Method
from loractl.worker.base.arithmetic import choose_precision
from loractl.worker.base.failure import TrainingFailed
from loractl.worker.base.model import load_base, load_tokenizer
from loractl.worker.base.source import check_folder, model_errors
from loractl.worker.data.origin import load_pinned

from ..conftest import ROOT
from ..hub import Hub
from ..models import weights_of, write_helpdesk
from ..unit.factories import another_person

# in a process of its own: the clients read the hub's address and their cache's place once
LOAD = """
import gc, json, os, sys
import datasets, transformers.models.llama.modeling_llama  # once for all who answer
from tests.integration.test_hub import answer

gc.disable()

for line in sys.stdin:
    if not (child := os.fork()):  # each line is answered as by a new process
        for asked in json.loads(line):
            print("ANSWER", json.dumps(answer(*asked)), flush=True)
        os._exit(0)
    print("ENDED", os.waitpid(child, 0)[1], flush=True)
"""
MISSING = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Hub:
    """A hub with a model and data sets."""
    folder = tmp_path_factory.mktemp("hub")
    hub = Hub(folder / "hub")
    rows = write_helpdesk(folder / "rows.jsonl", 12).read_text()
    hub.commit("models", "org/tiny", tiny_model)
    hub.commit("models", "org/gated", tiny_model)
    hub.commit("models", "org/empty", {"README.md": "no model yet"})
    hub.commit("datasets", "org/desk", {"train.jsonl": rows, "test.jsonl": rows.partition("\n")[0]})
    hub.commit("datasets", "org/desk", {"train.jsonl": rows * 2}, branch="next")
    hub.commit("datasets", "org/gated", {"train.jsonl": rows})
    hub.commit("datasets", "org/broken", {"train.jsonl": rows + '{"messages": [\n'})
    hub.gated = {"org/gated"}
    return hub


Asked = tuple[str, str, str | None]


def answer(what: str, name: str, revision: str | None) -> tuple[str, str]:
    """Reason and sentence of a load."""

    def load() -> Any:
        return load_base(name, Method.LORA, "cpu", choose_precision("cpu"), revision)

    try:
        if what == "model":
            load_tokenizer(name, revision)
            return "ok", str(load().config.hidden_size)
        rows, commit = load_pinned(name, revision or "")
        return "ok", f"{sum(1 for _ in rows)} rows of {commit}"
    except TrainingFailed as error:
        return error.reason.value, error.sentence
    except DataError as error:
        return "bad_data", error.sentence


@dataclass(frozen=True)
class Box:
    """A machine that asks the hub, each time by a process of its own, and what it has cached."""

    cache: Path
    ask: Callable[..., list[tuple[str, str]]]


@pytest.fixture(scope="module")
def asking_box(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    cache = tmp_path_factory.mktemp("box") / "hf"
    with hub.serving() as url, asking({"HF_ENDPOINT": url, "HF_HOME": str(cache)}) as ask_here:
        yield Box(cache, ask_here)


@pytest.fixture
def box(asking_box: Box, hub: Hub) -> Box:
    """With nothing in its cache."""
    shutil.rmtree(asking_box.cache, ignore_errors=True)
    hub.fails = None
    hub.requests.clear()
    return asking_box


@contextlib.contextmanager
def asking(environment: Mapping[str, str]) -> Iterator[Callable[..., list[tuple[str, str]]]]:
    """To ask several times, each time a process of its own: what they import is imported once."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", LOAD]
    with subprocess.Popen(
        command, env={**kept, **environment}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin and process.stdout
        said, told = process.stdin, process.stdout

        def answers(*asked: Asked) -> list[tuple[str, str]]:
            print(json.dumps(asked), file=said, flush=True)
            lines = list(itertools.takewhile(lambda line: not line.startswith("ENDED"), told))
            found = [json.loads(line.removeprefix("ANSWER ")) for line in lines if line.startswith("ANSWER ")]
            assert len(found) == len(asked), lines
            return [(reason, sentence) for reason, sentence in found]

        yield answers
        said.close()
        assert process.wait(timeout=60) == 0


def test_each_refusal_of_the_hub_has_its_reason_and_its_sentence(box: Box) -> None:
    answers = box.ask(
        ("model", "org/none", None),
        ("model", "org/tiny", "v9"),
        ("model", "org/tiny", MISSING),
        ("model", "org/gated", None),
        ("model", "org/empty", None),
        ("data", "org/none", "train"),
        ("data", "org/gated", "train"),
        ("data", "org/desk@v9", "train"),
        ("data", "org/desk@next", "test"),
        ("data", "org/broken", "train"),
    )
    assert {reason for reason, _ in answers[:5]} == {"model_not_found"}
    assert {reason for reason, _ in answers[5:]} == {"bad_data"}
    for (_, sentence), expected in zip(
        answers,
        [
            "base_model org/none can't be loaded: the hub has no such name",
            "base_model org/tiny can't be loaded: the hub has no such revision",
            "base_model org/tiny can't be loaded: the hub has no such revision",
            "base_model org/gated can't be loaded: it is gated: its owner must give this worker's account",
            "base_model org/empty can't be loaded: it has no config.json on the hub",
            "org/none: is neither a file here nor a data set on the hub: the hub has no such name",
            "org/gated: can't be read from the hub: Dataset 'org/gated' is a gated dataset",
            "org/desk@v9: can't be read from the hub: the hub has no such revision",
            "org/desk@next: has no such split on the hub: Unknown split",
            "org/broken: can't be read from the hub: ",
        ],
        strict=True,
    ):
        assert sentence.startswith(expected), sentence


@pytest.mark.parametrize("name", ["RepositoryNotFoundError", "RevisionNotFoundError", "GatedRepoError", "LocalEntry"])
def test_what_the_hub_says_leaves_a_sentence_and_no_traceback(name: str) -> None:
    """The trainer writes an error's cause into the job's log."""
    answer = SimpleNamespace(headers={}, request=None, status_code=404)
    error = ConnectionError("no route") if name == "LocalEntry" else getattr(errors, name)("no", response=answer)
    with pytest.raises(TrainingFailed, match="base_model org/none") as failed, model_errors("org/none"):
        raise error
    assert failed.value.__cause__ is None
    with pytest.raises(TrainingFailed) as failed, model_errors("/lab/none"):
        raise OSError("what a library has to say of a folder")
    assert failed.value.__cause__ is not None


@pytest.mark.parametrize(
    ("closed", "advice"),
    [("base/model.safetensors", "chmod -R a+rX {base}"), ("base", "chmod -R a+rX {base}"), ("", "chmod a+x {folder}")],
)
def test_a_base_that_the_worker_may_not_read_is_not_said_to_be_missing(closed: str, advice: str) -> None:
    """safetensors says "No such file" of each file that it can't open."""
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        base.mkdir()
        (base / "model.safetensors").write_bytes(weights_of("a person's"))
        (base / "config.json").write_text("{}")
        Path(folder).chmod(0o755)
        (Path(folder) / closed).chmod(0)
        with another_person(), pytest.raises(TrainingFailed) as failed, model_errors(str(base)):
            check_folder(str(base))
            safe_open(base / "model.safetensors", "pt")
    place = Path(folder) / closed
    said = f"{place} can't be read by the worker's user; ask its owner for: {advice.format(base=base, folder=folder)}"
    assert failed.value.sentence == f"base_model {base} can't be loaded: {said}"


def test_a_hub_that_fails_is_away_and_what_is_cached_will_do(hub: Hub, box: Box, tmp_path: Path) -> None:
    asked = ("model", "org/tiny", None), ("data", "org/desk", "train"), ("data", "org/desk@next", "train")
    assert box.ask(("data", "org/desk", "train[:25%]+test"))[0][1].startswith("4 rows of ")
    main, following = (hub.find("datasets", "org/desk", name)[0] for name in ("main", "next"))
    fetched = box.ask(*asked)
    assert fetched == [("ok", "64"), ("ok", f"12 rows of {main}"), ("ok", f"24 rows of {following}")]
    hub.fails = HTTPStatus.SERVICE_UNAVAILABLE
    box.cache.rename(tmp_path / "kept")
    for reason, sentence in box.ask(*asked):
        assert reason == "trainer_error" and "the hub can't be reached" in sentence
    shutil.rmtree(box.cache, ignore_errors=True)
    (tmp_path / "kept").rename(box.cache)
    hub.requests.clear()
    pinned = ("data", f"org/desk@{following}", "train")
    cached = box.ask(*asked, pinned)
    assert (cached[0], cached[2], cached[3]) == (fetched[0], fetched[2], fetched[2])
    # datasets would give the newest commit that it has, which is of the other branch
    assert cached[1][0] == "trainer_error" and f"another commit ({following})" in cached[1][1]
    assert len(hub.requests) <= 6, "nobody waits for each of the files that a repository may have"
    offline = [answer(*one) for one in asked[:2]]  # as this process is, with another cache
    assert [reason for reason, _ in offline] == ["model_not_found", "bad_data"]
    assert all("HF_HUB_OFFLINE" in sentence for _, sentence in offline)
