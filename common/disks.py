"""Which kind of disk a folder is on: SQLite's locks and shared memory do not work on a network file system."""

from __future__ import annotations

import re
from pathlib import Path

MOUNTS = Path("/proc/self/mountinfo")

_NETWORK = re.compile(
    r"nfs\d?|cifs|smb\d?|smbfs|afs|ceph|lustre|gpfs|beegfs|glusterfs|fuse\.(sshfs|ceph|glusterfs|s3fs|rclone)"
)


def network_disk(folder: Path) -> str | None:
    """The kind of network file system that holds the folder, like nfs4; None: a disk of this machine."""
    try:
        lines = MOUNTS.read_text().splitlines()
    except OSError:
        return None  # another system than Linux
    place, kind, depth = folder.resolve(), "", 0
    for point, found in map(_mount, lines):
        if place.is_relative_to(point) and len(point.parts) >= depth:  # a later one on the same point covers it
            kind, depth = found, len(point.parts)
    return kind if _NETWORK.fullmatch(kind) else None


def _mount(line: str) -> tuple[Path, str]:
    """Where it is mounted, and the kind of file system (proc_pid_mountinfo(5))."""
    before, _, after = line.partition(" - ")
    point = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), before.split()[4])
    return Path(point), after.split()[0]
