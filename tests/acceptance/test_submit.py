"""What submit does before it queues anything, and a job like another one."""

from __future__ import annotations

import contextlib
import http.server
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .. import services
from ..conftest import Cli
from ..models import write_helpdesk
from .test_bad_inputs import LLAMA


def write_files(folder: Path) -> Path:
    write_helpdesk(folder / "data.jsonl")
    (folder / "base").mkdir()
    (folder / "base" / "config.json").write_text(json.dumps(LLAMA))
    job = folder / "job.yaml"
    job.write_text("name: job\nbase_model: ./base\ndataset: {path: data.jsonl}\ntraining: {max_steps: 5}\n")
    return job


def test_a_job_like_another_takes_its_stored_rows_and_what_is_said_otherwise(cli: Cli, tmp_path: Path) -> None:
    job = write_files(tmp_path)
    cli("submit", job)
    (tmp_path / "data.jsonl").unlink()
    told = cli("submit", "--like", 1, "--set=training.learning_rate=0.001", "--set=training.num_train_epochs=2").stdout
    assert told == "Job 2 (job) is queued, like job 1.\n"
    first, second = (json.loads(cli("status", number, "--json").stdout) for number in (1, 2))
    assert second["data"] == first["data"]
    assert second["events"][0]["text"].endswith(", like job 1")
    asked = {**first["spec"]["training"], "learning_rate": 0.001, "num_train_epochs": 2, "max_steps": None}
    assert second["spec"] == {**first["spec"], "training": asked}
    assert "has no instruction" in cli("submit", "--like", 1, "--set=dataset.format=alpaca", code=2).stderr
    assert "no job 9" in cli("submit", "--like", 9, code=3).stderr
    assert "submit takes job files, or --like JOB" in cli("submit", job, "--like", 1, code=2).stderr


def test_nothing_is_stored_or_queued_before_all_is_checked(cli: Cli, home: Path, tmp_path: Path) -> None:
    job, wrong = write_files(tmp_path), tmp_path / "wrong.yaml"
    wrong.write_text(job.read_text() + "lora: {target_modules: [wq]}\n")
    assert "wq is not a linear layer" in cli("submit", job, wrong, code=2).stderr
    open_redis = cli.with_environment(LORACTL_REDIS_URL="redis://lab.example.org:6379/0")
    told = open_redis("submit", job, code=2).stderr
    assert told.startswith("Error: LORACTL_REDIS_URL names lab.example.org without a password")
    assert json.loads(cli("status", "-a", "--json").stdout) == []
    assert not (home / "artifacts" / "datasets").exists()


def test_a_database_that_can_not_be_used_is_refused_before_a_word_about_the_rows(cli: Cli, tmp_path: Path) -> None:
    job, rows = write_files(tmp_path), tmp_path / "data.jsonl"
    rows.write_text(rows.read_text() * 2)
    assert cli("submit", "--dry-run", job).stderr.startswith("Warning: data.jsonl: ")
    wrong = cli.with_environment(LORACTL_DATABASE_URL="mysql://lab@host/loractl")
    for command in (("submit", job), ("submit", "--dry-run", job), ("sweep", job, "--set=lora.r=4,8")):
        assert wrong(*command, code=2).stderr.startswith("Error: LORACTL_DATABASE_URL is not the URL of"), command
    away = cli.with_environment(LORACTL_DATABASE_URL=f"postgresql://lab@127.0.0.1:{services.free_port()}/loractl")
    assert away("submit", job, code=4).stderr.startswith("Error: the database is unreachable")


@pytest.mark.fresh
def test_a_dry_run_refuses_what_submit_refuses_and_makes_nothing(
    make_cli: Callable[..., Cli], home: Path, tmp_path: Path
) -> None:
    job, cli = write_files(tmp_path), make_cli()
    layers, tiny = "--set=lora.target_modules=[wq]", "--set=resources.max_vram=100MiB"
    for wrong, said in ((layers, "wq is not a linear layer"), (tiny, "its resources.max_vram is 0.1")):
        assert said in cli("submit", "--dry-run", job, wrong, code=2).stderr
        assert said in cli("sweep", "--dry-run", job, wrong, "--set=lora.r=4,8", code=2).stderr
    told = cli("submit", "--dry-run", job)
    assert told.stdout.startswith("name: job\n") and "Not checked: weights and tokenizer of" in told.stderr
    assert not (home / "loractl.db").exists() and not (home / "run").exists()
    away = cli.with_environment(LORACTL_DATABASE_URL=f"postgresql://lab@127.0.0.1:{services.free_port()}/loractl")
    said = "Not checked: what the database knows, like lora.init_from: the database is unreachable"
    assert said in away("submit", "--dry-run", job).stderr
    cli("submit", job)
    assert "there is no job 9" in cli("submit", "--dry-run", job, "--set=lora.init_from=9", code=3).stderr


def test_a_base_that_no_worker_can_load_is_refused_before_anything_is_queued(
    cli: Cli, tiny_model: Path, tmp_path: Path
) -> None:
    job, base = write_files(tmp_path), tmp_path / "tiny"
    with (tmp_path / "data.jsonl").open("a") as rows:
        turns = ({"role": "user", "content": "long " * 300}, {"role": "assistant", "content": "yes"})
        rows.write(json.dumps({"messages": turns}) + "\n")
    shutil.copytree(tiny_model, base)
    weights = base / "model.safetensors"
    whole = weights.read_bytes()

    def refused(model: str) -> str:
        return cli("submit", job, f"--set=base_model={model}", code=2).stderr

    long = cli("sweep", job, "--set=base_model=./tiny", "--set=dataset.on_overflow=error", "--set=lora.r=4,8", code=2)
    assert (
        "tokens, dataset.max_length is 1024\nHint: raise dataset.max_length, or set dataset.on_overflow" in long.stderr
    )
    answer = "has no token to learn within dataset.max_length (1024)"
    assert f"{answer}\nHint: raise dataset.max_length, or set dataset.on_overflow: drop" in refused("./tiny")
    assert f"there is no base_model {tmp_path / 'tinny'}\nHint: did you mean {base}?" in refused("./tinny")
    weights.write_bytes(whole[:-100])
    assert f"has {len(whole) - 100} bytes, and {len(whole)} by its header: it was cut off" in refused("./tiny")
    weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "model.safetensors is not a safetensors file" in refused("./tiny")
    weights.write_bytes(whole)
    index = base / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}))
    assert "lacks model-2.safetensors, which model.safetensors.index.json names" in refused("./tiny")
    index.unlink()
    (base / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    assert "has weights and no tokenizer" in refused("./tiny")
    (tmp_path / "tokenizer.json").rename(base / "tokenizer.json")
    (base / "config.json").write_text("{")
    assert "config.json can't be read: Expecting property name" in refused("./tiny")
    (base / "config.json").rename(base / "adapter_config.json")
    assert "holds an adapter\nHint: name the base model itself" in refused("./tiny")
    assert json.loads(cli("status", "-a", "--json").stdout) == []


def test_what_only_the_box_can_know_is_said_and_the_hub_is_asked_for_a_name(
    make_cli: Callable[..., Cli], tmp_path: Path
) -> None:
    job = write_files(tmp_path)
    told = make_cli()("submit", job).stderr
    assert (
        f"Not checked: weights and tokenizer of {tmp_path / 'base'}, not on this machine. The worker will check it."
        in told
    )
    with hub({"/api/models/org/there": 200, "/api/models/org/theer": 404, "/api/models/org/busy": 503}) as url:
        cli = make_cli(HF_ENDPOINT=url, HF_HOME=str(tmp_path / "hf"), HF_HUB_OFFLINE="0")
        told = {name: cli("submit", job, f"--set=base_model=org/{name}").stderr for name in ("there", "theer", "busy")}
    assert "there" not in told["there"].partition("Follow")[0]
    assert "Warning: the hub shows no base_model org/theer to this machine: it is mistyped, or private" in told["theer"]
    both = "there is no folder of this name next to the job file, and the hub can't be reached"
    assert f"Not checked: base_model org/busy: {both}. The worker will check it." in told["busy"]


def test_a_folder_that_is_not_here_or_holds_no_model_is_refused_where_the_workers_are_here(
    cli: Cli, upgraded_postgres: str, tmp_path: Path
) -> None:
    job, empty = write_files(tmp_path), tmp_path / "empty"
    empty.mkdir()

    def refused(model: str) -> str:
        return cli("submit", "--dry-run", job, f"--set=base_model={model}", code=2).stderr

    assert f"there is no base_model {tmp_path / 'models' / 'nix'}\n" in refused("./models/nix")
    assert "there is no base_model /" in refused("~/nix-nowhere")
    assert f"base_model {empty} holds no model\nHint: a model's folder has config.json" in refused("./empty")
    assert "is neither a folder here nor a name on the hub" in refused("models/deep/nix")
    assert "is neither a folder here nor a name on the hub" in refused("https://huggingface.co/org/model/tree/main")
    lab = cli.with_environment(LORACTL_DATABASE_URL=upgraded_postgres)
    told = lab("submit", "--dry-run", job, "--set=base_model=./empty").stderr
    assert f"Warning: base_model {empty} holds no model on this machine; every worker needs one" in told
    named = lab("submit", "--dry-run", job, "--set=base_model=https://huggingface.co/org/model").stdout
    assert "base_model: org/model\n" in named


@contextlib.contextmanager
def hub(answers: dict[str, int]) -> Iterator[str]:
    """A server that answers HEAD as the hub would."""

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(answers.get(self.path, 500))
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
