"""A training that is longer than its allocations, on a real Slurm: on one machine, as root, with ports of its own."""

from __future__ import annotations

import getpass
import math
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from loractl.common.job.status import Reason, Status
from loractl.common.store.tables import Job

from ..conftest import LORACTL, Cli
from ..models import write_job
from ..services import free_port
from .quick_lab import Lab

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        getpass.getuser() != "root" or not all(map(shutil.which, ("slurmctld", "slurmd", "sbatch", "munged"))),
        reason="Slurm is not installed, or this is not root",
    ),
]

STEPS = 2400
"""A minute and a half of a tiny model on one core that nobody else wants: longer than an allocation of a minute. A busy
machine made 410 steps in one allocation, so 700 may fit into one where nothing else runs."""

MOST = 40
"""Allocations, on a machine that is busy: with a load of 8 on two cores it took 17."""


@dataclass(frozen=True)
class Slurm:
    """A cluster of this machine."""

    environment: dict[str, str]

    def run(self, *command: str) -> str:
        return subprocess.run(command, env=self.environment, check=True, capture_output=True, text=True).stdout

    def sbatch(self, folder: Path, script: str, *options: str) -> str:
        """The number of the allocation, whose output is in FOLDER/NUMBER.out."""
        file = folder / "job.sh"
        file.write_text(f"#!/bin/bash\n{script}\n")
        said = self.run("sbatch", "--parsable", f"--output={folder}/%j.out", *options, str(file))
        return said.strip()

    def ended(self, number: str) -> bool:
        return number not in self.run("squeue", "--noheader", "--format=%i").split()


@pytest.fixture
def slurm() -> Iterator[Slurm]:
    folder, host = Path(tempfile.mkdtemp(prefix="slurm-")), os.uname().nodename.partition(".")[0]
    folder.chmod(0o755)  # munged has a user of its own
    for name in ("state", "spool", "key", "run"):
        (folder / name).mkdir()
    (folder / "key" / "key").write_bytes(os.urandom(1024))
    (folder / "key" / "key").chmod(0o600)
    (folder / "key").chmod(0o700)
    for name in ("key", "key/key", "run"):
        shutil.chown(folder / name, "munge", "munge")
    (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
    (folder / "slurm.conf").write_text(
        f"""ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={free_port()}
SlurmdPort={free_port()}
AuthType=auth/munge
AuthInfo=socket={folder}/run/socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
KillWait=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
NodeName={host} NodeAddr=127.0.0.1 CPUs={os.cpu_count()} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
    )
    made = Slurm({**os.environ, "SLURM_CONF": f"{folder}/slurm.conf"})
    files = {"key-file": "key/key", "seed-file": "key/seed", "log-file": "key/log"}
    files |= {"socket": "run/socket", "pid-file": "run/pid"}
    munged = ["munged", "--foreground", *(f"--{option}={folder}/{name}" for option, name in files.items())]
    with (folder / "out").open("w") as out:

        def start(*command: str) -> subprocess.Popen[bytes]:
            return subprocess.Popen(command, env=made.environment, stdout=out, stderr=out)

        as_munge = ["setpriv", "--reuid=munge", "--regid=munge", "--clear-groups"]
        daemons = [start(*as_munge, *munged)]
        try:
            _await(lambda: (folder / "run/socket").exists(), folder / "out")
            daemons += [start("slurmctld", "-D", "-c"), start("slurmd", "-D", "-c", "-N", host)]
            _await(lambda: _is_idle(made), folder / "out")
            yield made
            subprocess.run(["scancel", "--full", "--signal=KILL", "--user=root"], env=made.environment, check=False)
        finally:
            for daemon in reversed(daemons):
                daemon.terminate()
                daemon.wait(30)
            shutil.rmtree(folder)


def _is_idle(slurm: Slurm) -> bool:
    asked = subprocess.run(["sinfo", "-h", "-o", "%T"], env=slurm.environment, capture_output=True, text=True)
    return "idle" in asked.stdout


def _await(holds: Callable[[], bool], said: Path | None = None, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, said and said.read_text()[-3000:]
        time.sleep(0.1)


def test_a_training_that_is_longer_than_its_allocations_ends_as_an_uninterrupted_one(
    slurm: Slurm, lab: Lab, make_cli: Callable[..., Cli], tiny_model: Path, tmp_path: Path
) -> None:
    file = write_job(tmp_path, tiny_model)
    long = f"--set=training.max_steps={STEPS}", "--set=training.save_steps=20", "--set=training.dtype=float32"
    lab.cli("submit", file, *long)

    def allocate(name: str, options: str, *sbatch: str) -> str:
        own = {  # its box has a disk of its own, which nobody sees later
            "LORACTL_HOST": name, "LORACTL_HOME": tmp_path / name, "LORACTL_DEVICES": "cpu",
            "LORACTL_DATABASE_URL": f"sqlite:///{lab.home / 'loractl.db'}",
            "LORACTL_ARTIFACTS_URL": (lab.home / "artifacts").as_uri(), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        kept = "\n".join(f"export {key}={value}" for key, value in own.items())
        clean = "unset ${!LORACTL_@}"
        return slurm.sbatch(tmp_path, f"{clean}\n{kept}\nexec {LORACTL} worker {options}", *sbatch)

    def has_stored(attempt: int) -> Callable[[Job], bool]:
        return lambda job: (job.checkpoint or {"prefix": ""})["prefix"].startswith(f"jobs/1/checkpoints/{attempt}-")

    def given_back(number: str, attempts: int) -> int:
        """The step that is in the store, once the allocation has ended."""
        _await(lambda: slurm.ended(number))
        job, said = lab.store.jobs.get(1), (tmp_path / f"{number}.out").read_text()
        assert (job.status, job.retries_used, job.attempt) == (Status.QUEUED, 0, attempts), said
        assert lab.reasons(1) == [Reason.DRAINED] * attempts, said
        assert job.checkpoint is not None
        shutil.rmtree(tmp_path / f"n{attempts}")
        return int(job.checkpoint["step"])

    # a person's scancel: SIGTERM to every process, SIGKILL after KillWait
    number = allocate("n1", "--grace 5s", "--time=9")
    lab.until(1, has_stored(1), seconds=200)
    slurm.run("scancel", number)
    first = given_back(number, 1)

    # a notice to the batch shell, as --signal=B:USR1@60 gives it
    number = allocate("n2", "--grace 60s", "--time=9")
    lab.until(1, has_stored(2), seconds=200)
    slurm.run("scancel", "--batch", "--signal=USR1", number)
    assert given_back(number, 2) > first

    # the end that Slurm has told it, as often as it takes; on a busy machine an allocation is longer, as loading is
    minutes = math.ceil(3 * (lab.store.jobs.get(1).checkpoint_s or 0) / 60)
    ends = list[str]()
    while lab.store.jobs.get(1).status is not Status.SUCCEEDED:
        assert len(ends) < MOST, [(tmp_path / f"{one}.out").read_text() for one in ends]
        ends.append(allocate(f"n{3 + len(ends)}", "--grace 10s --drain-when-idle", f"--time={minutes}"))
        _await(lambda: slurm.ended(ends[-1]), seconds=100 + 60 * minutes)
    assert len(ends) > 1, "this machine is too fast: raise STEPS"
    assert "the worker's time is over" in (tmp_path / f"{ends[0]}.out").read_text()
    assert lab.reasons(1)[-1] is Reason.OK and set(lab.reasons(1)[:-1]) == {Reason.DRAINED}
    assert lab.store.jobs.get(1).retries_used == 0

    plain = make_cli(LORACTL_HOME=str(tmp_path / "plain"), LORACTL_DEVICES="cpu", OMP_NUM_THREADS="1")
    plain("submit", file, *long)
    plain("worker", "--drain-when-idle", timeout=600)
    weights = "jobs/1/attempt-*/adapter/adapter_model.safetensors"
    (resumed,), (whole,) = ((home / "artifacts").glob(weights) for home in (lab.home, tmp_path / "plain"))
    assert resumed.read_bytes() == whole.read_bytes()
