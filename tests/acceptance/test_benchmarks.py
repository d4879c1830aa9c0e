"""Every benchmark runs, in its smallest form. What it measures on this machine says nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..models import write_helpdesk

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"

SMALLEST = {
    "base_measured": "lora.r=4,16",
    "baselines": "{trace} --fleet 24GiB,80GiB",
    "budget": "roomy",
    "cards": "",
    "claim": "100",
    "commands": "100 --on sqlite",
    "durations": "",
    "engine": "{model} {rows} fp32 1",
    "fleet": "--nodes 8 --jobs 4 --seconds 10",
    "fork_server": "{tiny} 4",
    "gang": "--steps 2 --rows 5",
    "growth": "10",
    "lab_trace": "",
    "memory_trace": "llama",
    "operators": "{model} fp32 1",
    "placement": "{trace} --cards 24 --predictions exact",
    "queue": "--jobs 1",
    "queue on PostgreSQL": "--jobs 1 --postgresql",
    "rows": "100 1",
    "seeds": "{model} {rows}",
    "startup": "1",
    "sweep": "lora.r=4,16",
    "usage": "1000 100",
    "web": "100",
}
"""The words after each."""

ASKING = {
    "engine": "the following arguments are required: MODEL, ROWS, BASES, BATCH",
    "memory_plan": "the following arguments are required: measured",
    "operators": "the following arguments are required: MODEL, FORMATS, ROWS",
    "preferences": "the following arguments are required: MODEL, PAIRS, BASES, BATCH, PYTHON",
    "seeds": "the following arguments are required: MODEL, ROWS",
    "serve": "loractl serve did not start: are the adapters of the examples stored?",
}
"""What it says without its arguments, or without what must be there beforehand."""


def test_every_benchmark_is_listed() -> None:
    there = {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - {"__init__", "traces"}
    assert there == {name.split()[0] for name in SMALLEST} | ASKING.keys()


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not (MODEL / "model.safetensors").exists(), reason="make model gets SmolLM2-135M-Instruct")
@pytest.mark.parametrize("name", SMALLEST)
def test_a_benchmark_runs_in_its_smallest_form(name: str, tiny_model: Path, tmp_path: Path) -> None:
    write_helpdesk(tmp_path / "rows.jsonl")
    if "{trace}" in SMALLEST[name]:
        made = _run("lab_trace", [], tmp_path)
        (tmp_path / "trace.csv").write_text("".join(made.stdout.splitlines(keepends=True)[:40]))
    given = {"tiny": tiny_model, "model": MODEL, "rows": tmp_path / "rows.jsonl", "trace": tmp_path / "trace.csv"}
    done = _run(name.split()[0], SMALLEST[name].format(**given).split(), tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.long
@pytest.mark.parametrize("name", ASKING)
def test_a_benchmark_that_needs_something_says_what(name: str, tmp_path: Path) -> None:
    done = _run(name, [], tmp_path)
    assert done.returncode and ASKING[name] in done.stderr and "Traceback" not in done.stderr, done.stderr


def _run(name: str, words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("LORACTL_")}
    small = {"LORACTL_HOME": str(folder / "home"), "SEEDS": "0,1", "STEPS": "2", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *words],
        env={**inherited, **small}, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
