"""The same as real processes: an exit status of the list, no traceback, no hang."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from loractl.common.errors import ExitCode
from loractl.worker.protocol.messages import encode
from loractl.worker.recipe.orders import EXIT_ORPHANED

from .. import warm
from ..conftest import LONG, Cli
from .counting import INPUTS
from .documents import FRAGMENTS, GOOD
from .test_protocol import START

PROCESSES = 24 if LONG else 8
AT_ONCE = 3
SECONDS = 60.0
"""A command that takes longer hangs, also on a busy machine."""


@pytest.fixture
def chance() -> random.Random:
    return random.Random(4)


def test_job_files_and_data_as_commands(make_cli: Callable[..., Cli], tmp_path: Path, chance: random.Random) -> None:
    """submit --dry-run reads the job file, the overrides and the data; nothing is started for it."""
    cli = make_cli()
    commands = []
    for number in range(PROCESSES):
        folder = tmp_path / str(number)
        folder.mkdir()
        suffix = chance.choice([".jsonl", ".json", ".csv", ".parquet"])
        row = json.dumps({"text": "a"}).encode() + b"\n"
        (folder / f"data{suffix}").write_bytes(_damaged(row * 3, chance) if number % 3 else chance.randbytes(200))
        job = GOOD.replace("org/data", f"data{suffix}").encode()
        (folder / "job.yaml").write_bytes(_damaged(job, chance) if number % 4 else chance.randbytes(200))
        changed = [f"--set=labels.x={chance.choice(FRAGMENTS)}".replace("\0", "")] if number % 2 else []
        commands.append([*_loractl(), "submit", "--dry-run", str(folder / "job.yaml"), *changed])
    for command, code, out, err in _run_all(commands, cli.environment):
        INPUTS["command"] += 1
        assert code in set(ExitCode), f"{command}: {code}\n{err}"
        assert "Traceback" not in out + err, f"{command}\n{err}"
        assert "this is a fault of loractl" not in err, f"{command}\n{err}"
        assert code == ExitCode.OK or err.startswith("Error: "), f"{command}\n{err}"


def test_a_trainer_that_is_told_rubbish_ends(make_cli: Callable[..., Cli], chance: random.Random) -> None:
    """A supervisor of another version, or none: the trainer ends by itself, with a sentence in the log."""
    good = encode(START).encode()
    orders = [
        b"", b"\n", b"null\n", b"[" * 100_000, b"\xff\xfe\x00\n", b'{"type": "start"}\n', good[:-20],
        b'{"type": "stop", "job_id": 1, "save": true}\n', good.replace(b'"job_id":1', b'"job_id":"x"'),
        b"9" * 10_000 + b"\n", chance.randbytes(4096),
    ]  # fmt: skip
    orders += [_damaged(good, chance).replace(b'"start"', b'"stort"') for _ in range(4)]
    command = [sys.executable, "-m", warm.OWN]
    for given, code, out, err in _run_all([command] * len(orders), make_cli().environment, orders):
        INPUTS["trainer's input"] += 1
        assert code in (1, EXIT_ORPHANED), f"{given}: {code}\n{err}"
        assert out == ""
        assert "Traceback" not in err, err


def _loractl() -> list[str]:
    return [sys.executable, "-S", "-E", str(warm.__file__)]


def _damaged(content: bytes, chance: random.Random) -> bytes:
    """The content with a piece cut out, doubled or replaced."""
    start = chance.randrange(len(content))
    piece = content[start : start + chance.randrange(20)]
    put = chance.choice([b"", piece * 2, chance.randbytes(4), chance.choice(FRAGMENTS).encode("utf-8", "replace")])
    return content[:start] + put + content[start + len(piece) :]


def _run_all(
    commands: list[list[str]], environment: dict[str, str], inputs: Sequence[bytes] = ()
) -> list[tuple[Any, int, str, str]]:
    """(command or input, exit status, stdout, stderr) of each, a few at a time. A hang fails the test."""
    done = []
    for begin in range(0, len(commands), AT_ONCE):
        group = range(begin, min(begin + AT_ONCE, len(commands)))
        running = [
            subprocess.Popen(
                commands[n],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            for n in group
        ]
        deadline = time.monotonic() + SECONDS
        try:
            for n, process in zip(group, running, strict=True):
                given = inputs[n] if inputs else b""
                out, err = process.communicate(given, timeout=max(1.0, deadline - time.monotonic()))
                shown = given if inputs else commands[n]
                done.append((shown, process.returncode, out.decode("utf-8", "replace"), err.decode("utf-8", "replace")))
        finally:
            for process in running:
                process.kill()
                process.wait()
    return done
