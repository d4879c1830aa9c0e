"""A preparation in a separate process, so that the trainings in ours keep the interpreter for themselves.

The process gets the order on its stdin and ends with it, and so with us. It has the attempt's marks and no card.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections import deque
from pathlib import Path

from loractl.common.job.spec import JobSpec
from loractl.common.job.status import Reason
from loractl.worker.allowance import kernel_kills, kernel_kills_since
from loractl.worker.base.failure import TrainingFailed
from loractl.worker.base.source import model_errors, source_of
from loractl.worker.data.prepared import PreparedData
from loractl.worker.protocol.exit_reason import exit_reason
from loractl.worker.protocol.messages import Ended, Start, encode, told_in
from loractl.worker.recipe.idle_process import JOB_VARIABLE, RUN_VARIABLE
from loractl.worker.recipe.run import Run

from .handover import read_handover

PROCESS = "loractl.worker.recipe.preparation"

LARGE_BYTES = 1_000_000
"""From this file size on, data are prepared in a separate process. In a thread a MB costs the others' steps about 0.7 s
(medians of three on two busy cores, SmolLM2-135M). A process needs about 4 s of a busy box's CPU to start, which costs
nobody anything if cores are free."""

LOOK_S = 0.02
"""Seconds between two checks whether it has ended. A stop is noticed at once."""


LINE_LIMIT = 64 * 1024
"""Characters of a line in one message: a line may be longer than the supervisor takes."""

END_LINES = 40
"""The last lines, which say why it ended."""


def is_large(order: Start) -> bool:
    """Whether it takes long to prepare the order's data: large files, and anything from the hub."""
    named = (order.data_path, *order.more_paths, order.eval_path, order.final_path, order.regression_path)
    paths = [Path(path) for path in named if path is not None]
    size = sum(path.stat().st_size for path in paths if path.is_file())
    return size >= LARGE_BYTES or not all(path.is_absolute() for path in paths)


def prepare_aside(run: Run) -> PreparedData:
    """The data of a job, prepared while others train. Raises TrainingFailed with the process's reason, Stopped.

    Its files are mapped, and deleted when this returns.
    """
    folder = Path(tempfile.mkdtemp(prefix="data-", dir=Path(run.order.output_dir).parent))
    try:
        ended = _run(run, folder)
        if ended.reason is not Reason.OK:
            raise TrainingFailed(ended.reason, ended.message, aside=True)
        return read_handover(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(run: Run, folder: Path) -> Ended:
    """Watch the process to its end; a stop ends it."""
    order = run.order.model_copy(update={"spec": _pinned(run.spec)})
    log, kills = folder / "log.txt", kernel_kills()
    told = os.fdopen(os.memfd_create("end"), encoding="utf-8", errors="replace")  # a pipe or a disk can fill up
    with log.open("w", encoding="utf-8") as printed:
        process = subprocess.Popen(
            [sys.executable, "-m", PROCESS, str(folder)],
            stdin=subprocess.PIPE,
            stdout=told,
            stderr=printed,
            encoding="utf-8",
            env=_environment(order),
        )
    assert process.stdin is not None
    try:
        run.say(f"prepares its data alongside the others, in process {process.pid}")
        try:
            process.stdin.write(encode(order))
            process.stdin.flush()
        except BrokenPipeError:
            pass  # how it ended says why
        while process.poll() is None:
            if run.stop.wait(LOOK_S):
                run.check_stop()
    finally:
        process.kill()
        process.communicate()
        with told:
            told.seek(0)
            said = told.read()
        printed_last = _hand_on(log, run)
    for line in said.splitlines():
        if isinstance(message := told_in(line), Ended):
            return message
    limited = order.device == "cpu" and order.memory_limit is not None
    killed = kernel_kills_since(kills)
    why = exit_reason(process.returncode, printed_last, kernel_kills=killed, limited=limited)
    return Ended(job_id=order.job_id, **{**why, "message": f"while it prepared its data, {why['message']}"})


def _pinned(spec: JobSpec) -> JobSpec:
    """The order with this process's commit of the base: a branch may have moved. Raises TrainingFailed."""
    with model_errors(spec.base_model):
        where = source_of(spec.base_model, spec.revision)
    return spec.model_copy(update={"revision": where.get("revision", spec.revision)})


def _hand_on(log: Path, run: Run) -> list[str]:
    """Write the output into the job's log, one message per line; returns the last lines."""
    last = deque[str](maxlen=END_LINES)
    with log.open(encoding="utf-8", errors="replace") as printed:
        while line := printed.readline(LINE_LIMIT):
            run.write(line)
            last.append(line)
    return list(last)


def _environment(order: Start) -> dict[str, str]:
    marks = {JOB_VARIABLE: str(order.job_id)} | ({RUN_VARIABLE: order.mark} if order.mark else {})
    alone = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **marks, **alone}
