"""A machine within the machine, for tests that install packages as root: its changes and its processes go with it.

All of the root file system below a layer of its own (overlayfs), a systemd that was started as on a real machine, a
process table, and a network with 10.0.0.5 alone, which no packet leaves; `fetch` alone is outside of it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SERVER = "10.0.0.5"

_SET_UP = """
set -e
mount -t tmpfs none "$1"
root="$1/root"
mkdir "$1/upper" "$1/work" "$root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" "$root"
mount -t proc proc "$root/proc"
mount --bind "$root/proc/sys" "$root/proc/sys" # the kernel is this machine's
mount -o remount,bind,ro "$root/proc/sys"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t cgroup2 none "$root/sys/fs/cgroup"
mount -t tmpfs none "$root/run"
mount -t tmpfs none "$root/dev"
mkdir "$root/dev/shm" "$root/dev/pts"
for name in null zero full random urandom tty; do
  touch "$root/dev/$name"
  mount --bind "/dev/$name" "$root/dev/$name"
done
ln -s /proc/self/fd "$root/dev/fd"
mkdir -p "$root/etc/systemd/system/service.d" # what a machine within a machine can't give
printf '[Service]\\nPrivateDevices=no\\nPrivateUsers=no\\n' > "$root/etc/systemd/system/service.d/sandbox.conf"
ip link set lo up
ip address add 10.0.0.5/24 dev lo
rm -f "$root"/etc/systemd/system/*.wants/*
ln -sf /dev/null "$root/etc/systemd/system/tmp.mount" # this repository may be below /tmp
echo ready
exec chroot "$root" env container=lxc /lib/systemd/systemd --unit=basic.target --show-status=false
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
    if missing := [name for name in ("unshare", "nsenter", "ip", "apt-get", "systemctl") if shutil.which(name) is None]:
        return f"lacks {missing[0]}"
    probe = ["unshare", "--mount", "--net", "--pid", "--cgroup", "--fork", "true"]
    return None if subprocess.run(probe, capture_output=True).returncode == 0 else "may not make namespaces"


@contextlib.contextmanager
def sandbox() -> Iterator[Sandbox]:
    """A new one."""
    folder = Path(tempfile.mkdtemp(prefix="loractl-sandbox-"))
    spaces = ["--mount", "--net", "--pid", "--cgroup", "--fork", "--kill-child"]
    command = ["unshare", *spaces, "bash", "-c", _SET_UP, "bash", str(folder)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline().strip() == "ready", "it was not set up"
        children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text().split()
        inside = Sandbox(int(children[0]))
        deadline = time.monotonic() + 30
        while inside.run("systemctl", "is-system-running", code=None).stdout.strip() not in ("running", "degraded"):
            assert time.monotonic() < deadline, "its systemd does not start"
            time.sleep(0.2)
        yield inside
    finally:
        holder.kill()  # and with it all that runs in there
        holder.wait()
        shutil.rmtree(folder, ignore_errors=True)
