"""What a node and its fork server agree on: how the server is started, and what one asks and the other answers.

    python -m loractl.worker.recipe.trainer --fork-server cpu

The server's standard input is a Unix socket that keeps packets apart (SOCK_SEQPACKET). Once everything is imported the
server sends READY. A request comes with three open files: the new trainer's standard input, output and error. The
trainer's place for its marks is PLACEHOLDER, the last variable in the block that `/proc/PID/environ` shows.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

FORK_SERVER = "--fork-server"
"""The argument before the kind of device."""

READY = b"ready"

PACKET = 4096
"""Bytes; no request and no answer is nearly as long."""

PLACEHOLDER = "LORACTL_WAITS"
"""Long enough, with its value, to be overwritten by LORACTL_JOB with the longest number."""

PLACEHOLDER_VALUE = "-" * 24


class ForkRequest(BaseModel):
    """Node: fork a trainer for this attempt."""

    model_config = ConfigDict(frozen=True)

    job_id: int
    mark: str  # of the attempt, for the environment


class ForkAnswer(BaseModel):
    """Server: the new trainer, or why there is none."""

    model_config = ConfigDict(frozen=True)

    pid: int | None = None
    refusal: str = ""
