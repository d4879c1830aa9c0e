"""The light client, installed from the wheel into an empty environment: no torch, and a client's commands all work."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import Distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from loractl.scheduler.setup.line import JoinLine, new_secret

from ..models import write_helpdesk

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin/ of an environment with the wheel, which pip builds and installs, and what it declares, nothing else."""
    folder = tmp_path_factory.mktemp("light")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=60)
    bin_folder = folder / "bin"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    shutil.rmtree(ROOT / "build", ignore_errors=True)  # a module that has gone would stay in the wheel
    built = [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(built, check=True, timeout=280)
    (wheel,) = folder.glob("*.whl")
    own = {**os.environ, "PIP_NO_COMPILE": "1"}  # of what is installed a command imports a tenth
    into = [*pip, "--python", str(bin_folder / "python"), "install", "--quiet", "--no-deps", str(wheel)]
    subprocess.run(into, check=True, timeout=60, env=own)
    (packages,) = (folder / "lib").glob("python*/site-packages")
    (installed,) = packages.glob("loractl-*.dist-info")
    for declared in _declared(Distribution.at(installed)).values():
        _link(declared, packages)
    return bin_folder


def _declared(distribution: Distribution) -> dict[str, Distribution]:
    """By name, what it needs without extras, and what that needs: the copies that the tests run with."""
    found: dict[str, Distribution] = {}
    left = [(distribution, "")]
    while left:
        needs, extra = left.pop()
        for requirement in map(Requirement, needs.requires or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                name = canonicalize_name(requirement.name)
                new = name not in found
                found[name] = Distribution.from_name(name)
                assert requirement.specifier.contains(found[name].version, prereleases=True), requirement
                left += [(found[name], "")] * new + [(found[name], wanted) for wanted in requirement.extras]
    return found


def _link(distribution: Distribution, packages: Path) -> None:
    """Let its packages and modules be in another environment, too."""
    for name in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
        (packages / name).symlink_to(Path(str(distribution.locate_file(name))))


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
