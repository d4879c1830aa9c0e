"""loractl from its wheel in an empty environment, without the clone: the light client has no torch, the whole works."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from importlib.metadata import Distribution
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from loractl.scheduler.lab.line import JoinLine, new_secret

from ..models import write_helpdesk

ROOT = Path(__file__).parents[2]


PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
FLOORS = ("common", "scheduler", "worker", "migrations")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As README.md builds it, but for the build's own environment."""
    for left in (ROOT / "build", ROOT / "src" / "loractl.egg-info"):  # what has gone would stay in the wheel
        shutil.rmtree(left, ignore_errors=True)
    return _built(ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def light(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _installed(wheel, tmp_path_factory.mktemp("light"))


def _built(source: Path, folder: Path) -> Path:
    built = [*PIP, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    subprocess.run(built, check=True, timeout=280)
    (wheel,) = folder.glob("*.whl")
    return wheel


def _installed(wheel: Path, folder: Path, *extras: str) -> Path:
    """bin/ of an environment with the wheel and what it declares with these extras, nothing else."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=60)
    bin_folder = folder / "bin"
    named = f"{wheel}[{','.join(extras)}]" if extras else str(wheel)
    own = {**os.environ, "PIP_NO_COMPILE": "1"}  # of what is installed a command imports a tenth
    into = [*PIP, "--python", str(bin_folder / "python"), "install", "--quiet", "--no-deps", named]
    subprocess.run(into, check=True, timeout=60, env=own)
    (packages,) = (folder / "lib").glob("python*/site-packages")
    (installed,) = packages.glob("loractl-*.dist-info")
    for declared in _declared(Distribution.at(installed), extras).values():
        _link(declared, packages)
    return bin_folder


def _declared(distribution: Distribution, extras: Sequence[str]) -> dict[str, Distribution]:
    """By name, what it needs with these extras alone, and what that needs: the copies that the tests run with."""
    found: dict[str, Distribution] = {}
    left = [(distribution, extra) for extra in ("", *extras)]
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


@pytest.mark.long
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
    assert "queued by tester" in run("status", "1", "--full").stdout
    assert "is cancelled" in run("cancel", "1").stdout
    told = json.loads(run("doctor", "--json").stdout)["checks"]
    assert {line["check"] for line in told if line["level"] == "skipped"} == {"models", "cards"}
    for command in (["worker"], ["data", "show", "job.yaml"]):
        told = run(*command, code=1).stderr
        assert "needs the training stack" in told and "pip install 'loractl[worker]'" in told
    assert subprocess.run([str(light / "python"), "-c", "import torch"], capture_output=True).returncode != 0
    line = line_of_a_lab()
    assert "pip install 'loractl[postgres]'" in run("join", line, code=2).stderr, "before the line is used"


def test_the_wheel_has_every_file_of_the_clone(wheel: Path) -> None:
    files = [path for floor in FLOORS for path in (ROOT / floor).rglob("*") if path.is_file()]
    named = [path.relative_to(ROOT) for path in files if path.parent.name != "__pycache__"]
    assert {".py", ".sql", ".mako", ".jinja", ".css", ".js", ".svg", ".service", ".yaml"} == {f.suffix for f in named}
    with ZipFile(wheel) as archive:
        for file in named:
            assert archive.read(f"loractl/{file}") == (ROOT / file).read_bytes(), file


@pytest.mark.long
def test_the_source_archive_makes_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    build = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=ROOT, check=True, capture_output=True, timeout=280)
    (archive,) = tmp_path.glob("*.tar.gz")
    assert _contents(_built(archive, tmp_path)) == _contents(wheel)


@pytest.mark.long
def test_the_whole_works_without_the_clone(
    wheel: Path, alone_inviting: None, postgres_url: str, redis_url: str, tiny_model: Path, home: Path, tmp_path: Path
) -> None:
    """README.md's first screen as it is typed, on a model without knowledge; the tables, and a lab's first step."""
    bin_folder = _installed(wheel, tmp_path / "whole", "worker", "postgres", "s3", "web")
    environment = {**os.environ, "LORACTL_HOME": str(home), "LORACTL_DEVICES": "cpu"}
    command = str(bin_folder / "loractl")

    def run(*args: str, **more: str) -> str:
        done = subprocess.run(
            [command, *args], env={**environment, **more}, capture_output=True, text=True, timeout=250, cwd=tmp_path
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    needs = [*PIP, "--python", str(bin_folder / "python"), "install", "--no-index", "--dry-run", "loractl[worker,web]"]
    assert subprocess.run(needs, capture_output=True, timeout=60).returncode == 0, "as the commands' hints say"
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    few = ("dataset.max_length=1024", "training.max_steps=2", "evaluation.samples=1", "evaluation.max_new_tokens=4")
    sets = [f"--set={text}" for text in (f"base_model={tiny_model}", "evaluation.max_rows=6", *few)]
    screen = (ROOT / "README.md").read_text("utf-8").partition("```console\n")[2].partition("```")[0]
    typed = [line.split() for line in re.findall(r"^\$ loractl (.+?)(?: +#.*)?$", screen, re.MULTILINE)]
    assert [words[0] for words in typed] == ["submit", "worker", "status", "report", "web"]
    said = [run(*words, *(sets if words[0] == "submit" else ())) for words in typed[:-1]]
    assert said[0] in screen and "succeeded" in said[2] and "MEASURE " in said[3]
    run("report", "1", "--html", "report.html")
    run("db", "upgrade")
    page = subprocess.Popen(
        [command, *typed[-1], "--port", "0"],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        assert page.stdout is not None
        address = page.stdout.readline().split()[3]
        for part in ("", "jobs/1", "adapters", "static/page.css"):
            assert urllib.request.urlopen(address + part, timeout=20).status == 200, part
    finally:
        page.send_signal(signal.SIGINT)
        page.communicate(timeout=20)
    services = {"LORACTL_DATABASE_URL": postgres_url, "LORACTL_REDIS_URL": redis_url}
    store = {"LORACTL_ARTIFACTS_URL": (tmp_path / "store").as_uri()}
    assert "loractl join join-" in run("lab", "init", **services, **store)
    assert "--packages" in run("lab", "init", "--help")


def _contents(wheel: Path) -> dict[str, bytes]:
    with ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def line_of_a_lab() -> str:
    number, secret = new_secret()
    fields = {"host": "127.0.0.1", "port": 1, "database": "loractl", "number": number, "secret": secret}
    return JoinLine(**fields, tls={}).text()  # type: ignore[arg-type]
