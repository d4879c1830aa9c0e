"""What a person who makes a mistake reads: one sentence with the place, a hint, an exit code, and never a traceback."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import sqlite3
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from .. import services
from ..conftest import Cli
from ..models import write_helpdesk

GOOD = "name: job\nbase_model: gpt2\ndataset: {path: data.jsonl}\n"
BASE = GOOD.replace("gpt2", "./base")
CLASSIFIER = GOOD + "task_type: SEQ_CLS\n"
PREFERENCE = GOOD + "task_type: preference\n"
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 99,
}
LLAMA = {"model_type": "llama", **SMALL}
MIXTRAL = {"model_type": "mixtral", **SMALL, "num_local_experts": 4, "num_experts_per_tok": 2}
HI = {"role": "user", "content": "hi"}


@dataclass(frozen=True)
class Mistake:
    name: str
    says: str  # part of what is printed
    job: str | bytes = GOOD
    data: str | bytes | None = None
    config: dict[str, object] | None = None  # config.json of the base
    command: list[str] = field(default_factory=lambda: ["submit", "job.yaml"])
    code: int = 2


def messages(*turns: dict[str, str]) -> str:
    return json.dumps({"messages": list(turns)}) + "\n"


def labelled(*labels: object) -> str:
    return "".join(json.dumps({"text": f"text {n}", "label": label}) + "\n" for n, label in enumerate(labels))


def pairs(**columns: str) -> str:
    return json.dumps(columns) + "\n"


MISTAKES = [
    # the job file
    Mistake("no such file", "nothing.yaml: no such file", command=["submit", "nothing.yaml"]),
    Mistake("unknown key", "job.yaml:4: totally_bogus: unknown key", job=GOOD + "totally_bogus: 1\n"),
    Mistake("a typing slip", "did you mean training.learning_rate?", job=GOOD + "training: {learning_rat: 0.1}\n"),
    Mistake("a missing key", "base_model: is missing", job="name: a\ndataset: {path: data.jsonl}\n"),
    Mistake("not a choice", "did you mean qlora?", job=GOOD + "method: qlor\n"),
    Mistake("not a method of a list", '"full" is not one of lora, qlora', job=GOOD + "method: [lora, full]\n"),
    Mistake("a method twice", "names the same method twice", job=GOOD + "method: [lora, lora]\n"),
    Mistake("patience for nothing", "nothing to wait for", job=GOOD + "method: qlora\nlora_patience: 2h\n"),
    Mistake("a size in bytes by mistake", "12 is not a size", job=GOOD + "resources: {max_vram: 12}\n"),
    Mistake("a bad override", "is not of the form key=value", command=["submit", "job.yaml", "--set", "oops"]),
    Mistake(
        "a revision of a folder",
        "revision: is for a base_model on the hub",
        job=GOOD.replace("gpt2", "./base") + "revision: main\n",
    ),
    Mistake(
        "a layer that is not there",
        "Hint: it has down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj; or write all-linear",
        job=BASE + "lora: {target_modules: [q_proj, c_attn]}\n",
        config=LLAMA,
    ),
    Mistake("dropout on fused experts", "set lora.lora_dropout: 0", job=BASE, config=MIXTRAL),
    Mistake(
        "a metric that generates, of a classifier",
        "rouge can't be measured, loss and labels can",
        job=CLASSIFIER + "evaluation: {metrics: [loss, rouge]}\n",
    ),
    Mistake(
        "labels for a job that answers",
        "job.yaml:3: dataset.format: classification is for task_type: SEQ_CLS",
        job=GOOD.replace("data.jsonl", "data.jsonl, format: classification"),
    ),
    Mistake(
        "a base with a password",
        "base_model https://ada:***@hub/x is neither",
        job=GOOD.replace("gpt2", "https://ada:hunter2@hub/x"),
    ),
    Mistake("tabs", "job.yaml:5: tab character not allowed", job=GOOD + "training:\n\tmax_steps: 3\n"),
    Mistake("a full fine-tune", "trains only adapters, never all weights", job=GOOD + "method: full\n"),
    Mistake(
        "bits of another tool", "write method: qlora, which holds the base in 4 bits", job=GOOD + "load_in_4bit: true\n"
    ),
    # the data
    Mistake(
        "no data file", "a path in a job file is relative to the job file", job=GOOD.replace("data.jsonl", "none.jsonl")
    ),
    Mistake(
        "broken JSON",
        "data.jsonl: row 2: is not valid JSON",
        data=messages(HI, {"role": "assistant", "content": "a"}) + "{oops\n",
    ),
    Mistake("conversations for a classifier", "learns from rows with text and label", job=CLASSIFIER),
    Mistake(
        "true and false as labels",
        'write it as text, like "true" and "false"',
        job=CLASSIFIER,
        data=labelled(True, False),
    ),
    Mistake(
        "pairs for a job that answers",
        "row 1: the rows are pairs (chosen, rejected), which task_type: preference learns from",
        data=pairs(prompt="a", chosen="b", rejected="c"),
    ),
    Mistake(
        "the same answer twice",
        "row 1: has the same answer twice: neither can be preferred",
        job=PREFERENCE,
        data=pairs(prompt="a", chosen="b", rejected="b"),
    ),
    Mistake(
        "a number for text", "content is a number, not text", data='{"messages": [{"role": "user", "content": 5}]}\n'
    ),
    # commands
    Mistake("no such job", "there is no job 99", command=["status", "99"], code=3),
    Mistake(
        "after a job that is not there",
        "after names job 999, which does not exist",
        command=["submit", "job.yaml", "--after", "999"],
        code=3,
    ),
    Mistake("cancel what is not there", "there is no job 7", command=["cancel", "7"], code=3),
    Mistake("hold what is not there", "there is no job 7", command=["hold", "7"], code=3),
    Mistake("an age below a day", "--older-than 1h is too short", command=["gc", "--older-than", "1h"]),
    Mistake("no such backup", "none.db: no such file", command=["db", "restore", "none.db"]),
    Mistake("an unknown command", "did you mean loractl status?", command=["statsu"]),
    Mistake("not a number", "there is no job abc", command=["status", "abc"], code=3),
    Mistake("a range that ends before it begins", "the smaller number first", command=["cancel", "9-3"]),
    Mistake("no config to plan from", "there is no config.json", command=["plan", "job.yaml"], code=1),
    Mistake("nothing to plan", "plan needs a job file or a job's number", command=["plan"]),
    Mistake("a card of no size", "--gpu: 'lots' is not a size", command=["plan", "job.yaml", "--gpu", "lots"]),
    Mistake("a card of a few bytes", "write 2GiB or 2MiB", command=["plan", "job.yaml", "--gpu", "2"]),
    Mistake(
        "a card with no room",
        "--solve needs a card to fit into",
        command=["plan", "job.yaml", "--gpu", "100MiB", "--solve"],
        job=BASE,
        config=LLAMA,
    ),
    Mistake("a sweep of one", "a setting with several values", command=["sweep", "job.yaml", "--set", "lora.r=8"]),
    Mistake(
        "a range without draws", "say how many: --trials", command=["sweep", "job.yaml", "--set", "lora.r=int:4..9"]
    ),
    Mistake(
        "a grid that is too large",
        "the grid has 400 points, a sweep at most 200 jobs",
        command=[
            "sweep",
            "job.yaml",
            *(f"--set={key}={','.join(map(str, range(1, 21)))}" for key in ("lora.r", "seed")),
        ],
    ),
    Mistake(
        "losses of other rows",
        "do not have in common",
        command=["sweep", "job.yaml", "--early-stop", "--set", "dataset.max_length=64,128"],
    ),
    Mistake("no such sweep", "there is no sweep 9", command=["status", "--sweep", "9"], code=3),
    Mistake("cancel of nothing", "cancel takes jobs, or a sweep, or a person's jobs", command=["cancel"]),
    Mistake("why of no job", "there is no job 99", command=["why", "99"], code=3),
    Mistake("drain what is not there", "no worker has reported heron", command=["drain", "heron", "--reason", "fan"]),
    Mistake("drain without a reason", "Missing option '--reason'", command=["drain", "heron"]),
    Mistake("undrain what is open", "heron is not drained", command=["undrain", "heron"]),
    Mistake("a label without value", "is not of the form KEY=VALUE", command=["status", "--label", "x"]),
]


@pytest.mark.here
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: m.name)
def test_a_mistake_is_answered_with_a_sentence(mistake: Mistake, cli: Cli, tmp_path: Path) -> None:
    _write(tmp_path / "job.yaml", mistake.job)
    if mistake.data is None:
        write_helpdesk(tmp_path / "data.jsonl")
    else:
        _write(tmp_path / "data.jsonl", mistake.data)
    if mistake.config is not None:
        (tmp_path / "base").mkdir()
        _write(tmp_path / "base" / "config.json", json.dumps(mistake.config))
    args = [str(tmp_path / a) if a.endswith(".yaml") else a for a in mistake.command]
    _answered(cli(*args, code=None), mistake.says, mistake.code)
    with contextlib.closing(sqlite3.connect(Path(cli.environment["LORACTL_HOME"]) / "loractl.db")) as database:
        assert database.execute("SELECT count(*) FROM jobs").fetchone() == (0,), "nothing was queued"


def test_every_mistake_in_a_file_is_told_at_once(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(
        "name: a b\nbase_model: x\nmethod: full\ndataset: {path: d.jsonl, max_len: 3}\nlora: {r: 0}\n"
    )
    told = cli("submit", tmp_path / "job.yaml", code=2).stderr
    assert [line.split(":")[2] for line in told.splitlines() if line.startswith("Error")] == ["1", "3", "4", "5"]


def test_services_that_are_away_are_named_and_exit_with_4(make_cli: Callable[..., Cli], tmp_path: Path) -> None:
    port = services.free_port()
    cli = make_cli(LORACTL_DATABASE_URL=f"postgresql://lab:hunter2@127.0.0.1:{port}/loractl")
    told = _answered(
        cli("status", code=None), "the database is unreachable at postgresql+psycopg://lab:***@127.0.0.1", 4
    )
    assert "LORACTL_DATABASE_URL" in told and "hunter2" not in told


def test_a_database_of_another_kind_or_with_another_password_is_not_called_unreachable(
    make_cli: Callable[..., Cli], postgres_server: str
) -> None:
    _answered(
        make_cli(LORACTL_DATABASE_URL="mysql://lab@host/loractl")("status", code=None),
        "LORACTL_DATABASE_URL is not the URL of a PostgreSQL or SQLite database: mysql://lab@host/loractl", 2,
    )  # fmt: skip
    nobody = re.sub(r"//[^@/]*@", "//nobody:secret@", postgres_server)
    _answered(make_cli(LORACTL_DATABASE_URL=nobody)("status", code=None), "refuses this user", 4)


def test_a_card_without_a_unit_and_a_worker_that_is_refused_are_failures(make_cli: Callable[..., Cli]) -> None:
    _answered(make_cli(LORACTL_DEVICES="sim:8")("worker", code=None), "it has no unit; write 8GiB", 2)
    for variables, says in (
        ({"LORACTL_DEVICES": "sim:0GiB"}, "LORACTL_DEVICES: a card of 0GiB holds nothing"),
        ({"LORACTL_FORK_SERVER": "2"}, "'2' is neither 1 nor 0"),
    ):
        _answered(make_cli(**variables)("worker", code=None), says, 2)


def test_options_of_an_earlier_version_s_start_script_are_accepted_with_a_warning(
    make_cli: Callable[..., Cli],
) -> None:
    """Here the worker stops at its devices."""
    for warning, variables, options in (
        ("LORACTL_KEEP_WARM has no effect", {"LORACTL_KEEP_WARM": "soon"}, ()),
        ("--keep-warm has no effect", {}, ("--keep-warm", "5min")),
        ("LORACTL_SPARE is now --fork-server or", {"LORACTL_SPARE": "0"}, ()),
        ("--spare is now --fork-server or", {}, ("--no-spare",)),
    ):
        told = make_cli(LORACTL_DEVICES="sim:0GiB", **variables)("worker", *options, code=2)
        assert f"Warning: {warning}" in told.stderr
    shown = make_cli()("worker", "--help").stdout
    assert "keep-warm" not in shown and "--spare" not in shown


def test_ctrl_c_in_wait_says_that_the_job_goes_on(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(GOOD)
    write_helpdesk(tmp_path / "data.jsonl")
    waiting = cli.start("submit", tmp_path / "job.yaml", "--wait")
    assert waiting.stdout
    while "job 1 queued" not in (line := waiting.stdout.readline()):
        assert line, "it ended before it waited"
    waiting.send_signal(signal.SIGINT)
    told, _ = waiting.communicate(timeout=60)
    assert "Job 1 continues: loractl status 1 --watch; stop it: loractl cancel 1" in told and waiting.returncode == 130
    assert json.loads(cli("status", 1, "--json").stdout)["status"] == "queued"


def test_an_empty_database_says_which_command_fills_it(
    make_cli: Callable[..., Cli], postgres_url: str, tmp_path: Path
) -> None:
    cli = make_cli(LORACTL_DATABASE_URL=postgres_url, LORACTL_ARTIFACTS_URL=(tmp_path / "store").as_uri())
    (tmp_path / "store").mkdir()
    _answered(cli("status", code=None), "run loractl db upgrade", 1)
    upgraded = cli("db", "upgrade", "--backup", "before.backup")
    assert "went from empty to " in upgraded.stdout
    assert upgraded.stderr == "before.backup was not written: the database was empty.\n"
    assert "0 running" in cli("status").stdout


def test_an_unreachable_artifact_store_queues_nothing(make_cli: Callable[..., Cli], tmp_path: Path) -> None:
    port = services.free_port()
    cli = make_cli(
        LORACTL_ARTIFACTS_URL="s3://bucket/lab",
        AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}",
        AWS_ACCESS_KEY_ID="k",
        AWS_SECRET_ACCESS_KEY="s",
        AWS_REGION="us-east-1",
    )
    (tmp_path / "job.yaml").write_text(GOOD)
    write_helpdesk(tmp_path / "data.jsonl")
    told = cli("submit", tmp_path / "job.yaml", code=None)
    _answered(told, "LORACTL_ARTIFACTS_URL", told.returncode)
    assert told.returncode in (1, 4)
    assert json.loads(cli("status", "-a", "--json").stdout) == []


def test_results_that_are_not_there_yet_are_refused_kindly(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(GOOD)
    write_helpdesk(tmp_path / "data.jsonl")
    cli("submit", tmp_path / "job.yaml")
    _answered(cli("report", 1, code=None), "job 1 has no result: it is queued", 1)
    for command in (
        ("adapters", "pull", 1, tmp_path / "new"),
        ("adapters", "show", 1),
        ("adapters", "tag", 1, "prod"),
        ("generate", 1, "hi"),
    ):
        told = _answered(cli(*command, code=None), "job 1 has no adapter: it is queued", 1)
        assert told.splitlines() == [
            "Error: job 1 has no adapter: it is queued",
            "Hint: loractl status 1 shows its state",
        ]
    _answered(cli("generate", 9, "hi", code=None), "there is no job 9", 3)
    _answered(cli("adapters", "pull", 1, tmp_path, code=None), "is not empty", 2)
    told = _answered(cli("retry", 1, code=None), "only a failed or cancelled job", 1)
    assert told.endswith("Hint: loractl status 1 shows its state\n")
    assert "is cancelled" in cli("cancel", 1).stdout
    assert "is queued again" in cli("retry", 1).stdout


def _answered(done: subprocess.CompletedProcess[str], says: str, code: int) -> str:
    told = done.stderr
    assert done.returncode == code, told
    assert says in told, told
    assert "Traceback" not in told and "Traceback" not in done.stdout
    assert told.startswith(("Error: ", "Warning: "))
    return told


def _write(path: Path, content: str | bytes) -> None:
    path.write_bytes(content.encode() if isinstance(content, str) else content)


@pytest.mark.parametrize("command", [("serve", "--base", "nothing/here"), ("web",)])
def test_a_taken_port_is_reported_before_anything_is_loaded(cli: Cli, command: tuple[str, ...]) -> None:
    cli("status")  # makes the database, without which there is no page
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = cli(*command, "--port", port, code=2).stderr
    assert f"can't listen on 127.0.0.1:{port}: address already in use" in said
    assert "choose another --host or --port" in said and "Errno" not in said
