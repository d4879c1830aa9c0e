"""The examples are real: each job file loads, and each trains the real small model for a step."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from loractl.common.data.formats import detect_format, parse_examples
from loractl.common.data.rows import read_rows
from loractl.common.job.file import load_spec
from loractl.common.job.method import Method
from loractl.common.job.status import Reason
from loractl.worker.protocol.messages import Start
from loractl.worker.recipe.recipe import train
from loractl.worker.recipe.run import Run

from .. import warm
from ..conftest import Cli

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))
MODEL = Path(__file__).parents[2] / "models" / "SmolLM2-135M-Instruct"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_an_example_loads_and_its_data_can_be_learned_from(path: Path) -> None:
    spec = load_spec(path)
    for file in (spec.dataset.path, spec.dataset.eval_path):
        if file is not None:
            rows = read_rows(Path(file))
            format, _ = detect_format(rows, file, spec.dataset.format)
            examples, dropped = parse_examples(rows, format, file)
            assert len(examples) >= 48 and not dropped


def test_held_out_examples_are_not_trained_on() -> None:
    for path in EXAMPLES:
        spec = load_spec(path)
        sides: list[set[int]] = []
        for file in (spec.dataset.path, spec.dataset.eval_path):
            assert file is not None
            rows = read_rows(Path(file))
            examples, _ = parse_examples(rows, detect_format(rows, file, spec.dataset.format)[0], file)
            sides.append({e.likeness() for e in examples})
        assert not sides[0] & sides[1]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_an_example_trains_to_its_report(path: Path, tiny_model: Path, tmp_path: Path) -> None:
    """On a base without knowledge: what the file asks for is all there. What it teaches: the long test below. That one
    job begins from another's adapter: tests/integration/test_init_from.py."""
    few = (
        f"base_model={tiny_model}", "dataset.max_length=1024", "lora.init_from=null", "training.max_steps=2",
        "training.gradient_accumulation_steps=1", "evaluation.samples=1", "evaluation.max_rows=6",
        "evaluation.max_new_tokens=4",
    )  # fmt: skip
    spec = load_spec(path, few)
    (tmp_path / "result").mkdir()
    order = Start(
        job_id=1, attempt=1, user="t", node="n:0", gpu="cpu", device="cpu", spec=spec,
        method=Method.LORA if spec.method == "auto" else Method(spec.method), vram_planned=None, memory_limit=None,
        data_path=spec.dataset.path, data_sha256=None, eval_path=spec.dataset.eval_path,
        output_dir=str(tmp_path / "result"), checkpoint_dir=str(tmp_path / "checkpoints"), earlier_checkpoints=[],
        cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    ended = train(Run(order=order, tell=lambda _: None))
    assert ended.reason is Reason.OK, ended.message
    report = json.loads((tmp_path / "result" / "report.json").read_text())
    assert report["training"]["steps"] == 2 and report["evaluation"]["metrics"]


def test_the_demo_reports_what_succeeded_and_its_lines_work_when_typed(cli: Cli, tiny_model: Path, home: Path) -> None:
    """Its own commands are forked (bash takes a function before the PATH); the typed one is the installed command."""
    forked = shlex.join([sys.executable, "-S", "-E", str(warm.__file__)])
    function = {"BASH_FUNC_loractl%%": f'() {{ {forked} "$@"; }}'}
    root, here = MODEL.parents[1], cli.with_environment(LORACTL_HOME=str(home / "demo"), **function)
    asked = (
        f"base_model={tiny_model}",
        "dataset.max_length=1024",
        "training.max_steps=3",
        "evaluation.samples=1",
        "evaluation.max_rows=4",
    )
    demo = subprocess.Popen(
        [root / "examples" / "demo.sh", *(f"--set={text}" for text in (*asked, "evaluation.max_new_tokens=4"))],
        env=here.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert demo.stdout is not None
    for line in demo.stdout:  # the worker starts: the first job is queued, and takes a second at the least
        if line.startswith("$ loractl worker"):
            here("cancel", 1)
            break
    said = demo.stdout.read()
    assert demo.wait(timeout=10) == 1
    assert "No result yet of job 1: loractl logs JOB says why, loractl retry JOB and loractl worker go on." in said
    assert "$ loractl report 2 --answers 3\n2 booking-qlora: " in said and "report 1" not in said
    assert "job 2 running on" in said, "its progress is shown"
    assert (home / "demo-adapters" / "2" / "adapter_model.safetensors").exists()
    typed = next(line for line in said.splitlines() if line.strip().startswith("export LORACTL_HOME="))
    shown = subprocess.run(
        ["bash", "-c", f"{typed}\nloractl status 2"], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert "booking-qlora" in shown.stdout


@pytest.mark.timeout(1800)
@pytest.mark.skipif(not (MODEL / "model.safetensors").exists(), reason="make model gets SmolLM2-135M-Instruct")
@pytest.mark.long
def test_the_examples_teach_the_real_model(cli: Cli, tmp_path: Path) -> None:
    """A few steps of each example on SmolLM2: the held-out loss of the tuned model is clearly below the base's."""
    names = (
        "helpdesk-lora", "booking-qlora", "instructions-qlora", "questions-lora", "sentiment-lora", "summaries-lora",
    )  # fmt: skip
    few = [
        "--set=training.max_steps=3",
        "--set=training.per_device_train_batch_size=2",
        "--set=training.save_steps=100",
        "--set=evaluation.samples=1",
        "--set=training.warmup_steps=0",
        "--set=evaluation.max_new_tokens=2",
    ]
    for path in EXAMPLES:
        if path.stem in names:
            cli("submit", path, *few, f"--set=dataset.eval_path={_short_rows(path, 8, tmp_path)}")
    cli("worker", "--drain-when-idle", timeout=1500)
    jobs = json.loads(cli("status", "-a", "--json").stdout)
    assert len(jobs) == len(names)
    for job in jobs:
        assert job["status"] == "succeeded", job
        history = cli("status", job["job_id"], "--json").stdout
        assert "padded rows" not in history and "trains beside it" not in history, "shared lean steps take this model"
        report = json.loads(cli("report", job["job_id"], "--json").stdout)
        loss = next(m for m in report["evaluation"]["metrics"] if m["name"] == "loss")
        assert loss["reading"] == "better" and loss["tuned"] < loss["base"] - 0.3


def _short_rows(example: Path, count: int, folder: Path) -> Path:
    """A file with the shortest held-out rows of an example."""
    held_out = [json.dumps(row.value) for row in read_rows(Path(str(load_spec(example).dataset.eval_path)))]
    rows = folder / f"{example.stem}.jsonl"
    rows.write_text("".join(f"{row}\n" for row in sorted(held_out, key=len)[:count]))
    return rows


def test_data_show_marks_what_is_learned(cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    from ..models import write_job

    job = write_job(tmp_path, tiny_model)
    shown = cli("data", "show", job).stdout
    assert "Format messages: the rows have messages." in shown
    assert "<|im_start|>assistant\n[[queue: " in shown and "<|im_end|>]]" in shown
    plain, halved = (
        json.loads(cli("data", "show", job, *more, "--json").stdout)["data"]
        for more in ((), ("--set", "dataset.test_size=0.5"))
    )
    assert plain["held_out_rows"] < halved["held_out_rows"], "any key may be set, as for data check"
