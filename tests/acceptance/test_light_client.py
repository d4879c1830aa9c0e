"""The light client, installed from the wheel into an empty environment: no torch, and a client's commands all work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from loractl.scheduler.setup.line import JoinLine, new_secret

from ..models import write_helpdesk

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin/ of an environment with the wheel, which pip builds, and what it declares, nothing else."""
    folder = tmp_path_factory.mktemp("light")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=60)
    bin_folder = folder / "bin"
    pip = [sys.executable, "-m", "pip", "--python", str(bin_folder / "python"), "--disable-pip-version-check"]
    own = {**os.environ, "PIP_NO_COMPILE": "1"}  # of what is installed a command imports a tenth
    subprocess.run([*pip, "install", "--quiet", str(ROOT)], check=True, timeout=280, env=own)
    return bin_folder


def test_the_light_client_submits_and_reads_without_the_training_stack(light: Path, home: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "LORACTL_HOME": str(home), "LORACTL_USER": "tester"}

    def run(*args: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        command = [str(light / "loractl"), *args]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, cwd=tmp_path)
        assert done.returncode == code, done.stderr
        return done

    write_helpdesk(tmp_path / "data.jsonl")
    (tmp_path / "job.yaml").write_text("name: job\nbase_model: gpt2\ndataset: {path: data.jsonl}\n")
    submitted = run("submit", "job.yaml")
    assert submitted.stdout == "Job 1 (job) is queued.\n"
    assert "Warning" not in submitted.stderr, "the wake message went out"
    assert json.loads(run("status", "1", "--json").stdout)["status"] == "queued"
    assert "queued by tester" in run("show", "1").stdout
    assert "is cancelled" in run("cancel", "1").stdout
    told = json.loads(run("doctor", "--json").stdout)["checks"]
    assert {line["check"] for line in told if line["level"] == "skipped"} == {"models", "cards"}
    for command in (["worker"], ["data", "show", "job.yaml"]):
        told = run(*command, code=1).stderr
        assert "needs the training stack" in told and "pip install 'loractl[worker]'" in told
    assert subprocess.run([str(light / "python"), "-c", "import torch"], capture_output=True).returncode != 0
    package = next((light.parent / "lib").glob("python*/site-packages/loractl"))
    for file in (  # what db roles, lab init and join read
        "common/store/roles.sql", "common/store/entrance/invitations.sql", "scheduler/setup/compose.yaml",
        "scheduler/setup/loractl-worker.service",
    ):  # fmt: skip
        assert (package / file).read_bytes() == (ROOT / file).read_bytes(), file
    line = line_of_a_lab()
    assert "pip install 'loractl[postgres]'" in run("join", line, code=2).stderr, "before the line is used"


def line_of_a_lab() -> str:
    number, secret = new_secret()
    fields = {"host": "127.0.0.1", "port": 1, "database": "loractl", "number": number, "secret": secret}
    return JoinLine(**fields, tls={}).text()  # type: ignore[arg-type]
