"""A machine within the machine, for tests that install packages as root: its changes and its processes go with it.

All of the root file system below a layer of its own (overlayfs), a process table, and a network with 10.0.0.5
alone, which no packet leaves; `fetch` alone is outside of it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SERVER = "10.0.0.5"

_SET_UP = """
set -e
mount -t tmpfs none "$1"
mkdir "$1/upper" "$1/work" "$1/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" "$1/root"
mount -t proc proc "$1/root/proc"
mount --rbind /dev "$1/root/dev"
mount -t tmpfs none "$1/root/run"
ip link set lo up
ip address add 10.0.0.5/24 dev lo
echo "$$"
exec chroot "$1/root" sleep 3600
"""


@dataclass(frozen=True)
class Sandbox:
    """Runs commands in it."""

    process: int  # the one that holds it, by this machine's numbers

    def fetch(self, *packages: str) -> None:
        """Let apt find these packages and what they need."""
        outside = ["nsenter", "--target", str(self.process), "--mount", "--pid", "--root", "--wd=/"]
        command = ["apt-get", "install", "--yes", "--download-only", *packages]
        subprocess.run([*outside, *command], check=True, capture_output=True)

    def run(
        self, *command: object, code: int | None = 0, stdin: str = "", **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """A command's output; its exit status must be `code`, unless that is None."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("LORACTL_", "AWS_", "PG"))}
        enter = ["nsenter", "--target", str(self.process), "--mount", "--net", "--pid", "--root", "--wd=/"]
        done = subprocess.run(
            [*enter, *map(str, command)], input=stdin, capture_output=True, text=True, timeout=280,
            env={**kept, "HOME": "/root", "LC_ALL": "C.UTF-8", **environment},
        )  # fmt: skip
        assert code in (None, done.returncode), f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done


def cannot() -> str | None:
    """Why this machine can't have one."""
    if os.geteuid() != 0:
        return "needs root"
    if missing := [name for name in ("unshare", "nsenter", "ip", "apt-get") if shutil.which(name) is None]:
        return f"no {missing[0]} on this machine"
    probe = ["unshare", "--mount", "--net", "--pid", "--fork", "true"]
    return None if subprocess.run(probe, capture_output=True).returncode == 0 else "may not make namespaces"


@contextlib.contextmanager
def sandbox() -> Iterator[Sandbox]:
    """A new one."""
    folder = Path(tempfile.mkdtemp(prefix="loractl-sandbox-"))
    command = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "bash", "-c", _SET_UP, "bash", folder]
    holder = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline().strip() == "1", "it was not set up"
        children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text().split()
        yield Sandbox(int(children[0]))
    finally:
        holder.kill()  # and with it all that runs in there
        holder.wait()
        shutil.rmtree(folder, ignore_errors=True)
