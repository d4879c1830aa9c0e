"""Runs a system command to its end, and reports its output if it fails."""

from __future__ import annotations

import os
import shutil
import subprocess

from loractl.common.errors import LoractlError

LIMIT_S = 1800
"""A package manager on a slow connection."""


def run(*command: str, stdin: str = "", **environment: str) -> str:
    """Its output. No argument is a secret: others see a process's arguments. Raises LoractlError."""
    if shutil.which(command[0]) is None:
        raise LoractlError(f"{command[0]} is not on this machine")
    env = {**os.environ, "LC_ALL": "C.UTF-8", **environment}
    try:
        done = subprocess.run(
            command, input=stdin, capture_output=True, text=True, errors="replace", env=env, cwd="/", timeout=LIMIT_S
        )
    except subprocess.TimeoutExpired:
        raise LoractlError(f"{command[0]} has not ended after {LIMIT_S // 60} min") from None
    if done.returncode:
        told = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()] or ["nothing was said"]
        raise LoractlError(f"{' '.join(command[:3])} ended with {done.returncode}: {told[-1].strip()}")
    return done.stdout.strip()
