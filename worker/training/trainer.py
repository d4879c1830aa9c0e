"""The trainer process: reads orders from stdin, runs the recipe, tells what happens on stdout.

    python -m loractl.worker.training.trainer

With `--spare DEVICE` it imports all it needs and waits until a job takes it (protocol/spare.py).
It ends when its stdin closes, so a killed supervisor leaves no orphan on the device. Signals are the supervisor's
business. All that a library prints goes to stderr, which becomes the job's log.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import IO

from loractl.common.errors import DataError
from loractl.common.job.status import Reason, Stage
from loractl.worker.base.kernels import load_kernels
from loractl.worker.base.quiet import quieten, tell_once
from loractl.worker.protocol.card_error import card_error
from loractl.worker.protocol.messages import Ended, Start, Stop, Take, Told, decode_order, encode
from loractl.worker.protocol.spare import READY, SPARE

from .spare import Marks, prepare

EXIT_ORPHANED = 9

Orders = queue.SimpleQueue[Start | Stop | Take]
Tell = Callable[[Told], None]
Recipe = Callable[[Start, Orders, Tell], Ended]


def main(run: Recipe | None = None) -> int:
    """Serve one job; the exit status is 0 when its end could be told. `run`: another recipe than loractl's own."""
    for ignored in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)  # the supervisor stops us through stdin
    marks = Marks() if sys.argv[1:2] == [SPARE] else None
    commands, channel = _take_pipes()
    orders: Orders = queue.SimpleQueue()
    lock = threading.Lock()

    def tell(message: Told) -> None:
        with lock:
            channel.write(encode(message))
            channel.flush()

    threading.Thread(target=_listen, args=(commands, orders), name="orders", daemon=True).start()
    if marks is not None:
        prepare(sys.argv[2], _load if run is None else _nothing)
        channel.write(READY)
        channel.flush()
        order = orders.get()
        if not isinstance(order, Take):
            return 1
        channel.write(marks.become(order))
        channel.flush()
    order = orders.get()
    if not isinstance(order, Start):
        return 1
    tell((run or _run)(order, orders, tell))
    return 0


def _run(order: Start, orders: Orders, tell: Tell) -> Ended:
    """Train; every way to fail becomes a reason and a sentence, with the traceback in the log."""
    _load()
    from loractl.worker.base.failure import TrainingFailed
    from loractl.worker.base.gauge import hold_to

    from .recipe import train
    from .run import Run, Stopped

    run = Run(order=order, tell=tell)

    def obey() -> None:
        while isinstance(message := orders.get(), Stop):
            if message.save:
                run.save_on_stop.set()
            run.stop.set()

    threading.Thread(target=obey, name="stop", daemon=True).start()

    def ended(reason: Reason, message: str) -> Ended:
        return Ended(job_id=order.job_id, reason=reason, message=message, peaks=run.gauge.look())

    try:
        hold_to(order.memory_limit, order.device, order.gpu)
        return train(run)
    except Stopped:
        return ended(Reason.DRAINED if run.save_on_stop.is_set() else Reason.CANCELLED, "stopped when asked to")
    except DataError as error:
        hint = f" ({error.hint})" if error.hint else ""
        return ended(Reason.BAD_DATA, f"{error.sentence}{hint}")
    except TrainingFailed as error:
        traceback.print_exc()
        return ended(error.reason, error.sentence)
    except Exception as error:  # noqa: BLE001  after any error the job's row must say why
        # the last place that can name the failure: the whole traceback goes to the log, the sentence to the job's row
        traceback.print_exc()
        reason, message = _explain(error, own_limit=order.device == "cpu" and order.memory_limit is not None)
        if reason is Reason.TRAINER_ERROR and Stage.EVALUATING in run.stages:
            reason = Reason.EVALUATION_FAILED
        return ended(reason, message)


def _load() -> None:
    """Import the training stack; a second time it does next to nothing."""
    gc.disable()  # the imports make a million objects that stay to the end: looking through them costs 1.5 s of CPU
    quieten()
    tell_once()
    load_kernels()
    from . import recipe  # noqa: F401

    gc.freeze()
    gc.enable()


def _nothing() -> None:
    """Another recipe imports what it needs itself."""


def _explain(error: Exception, *, own_limit: bool) -> tuple[Reason, str]:
    """The reason and the sentence for an error that was not caught closer to its cause.

    `own_limit`: this process's RAM is held to a limit, so that it ran out of that and not of the box's RAM.
    """
    from loractl.worker.base.gauge import in_a_sentence, is_card_full, is_out_of_memory

    lines = [line for line in str(error).splitlines() if line.strip()]
    first, text = (lines[0] if lines else "no message"), str(error)
    if is_card_full(error) or (own_limit and is_out_of_memory(error)):
        return Reason.OUT_OF_MEMORY, in_a_sentence(error)
    if is_out_of_memory(error):
        return Reason.HOST_OUT_OF_MEMORY, "the box has not enough RAM for this job"
    # torch and safetensors wrap the operating system's error in their own
    wrapped = any(words in text for words in ("No space left on device", "os error 28", "PytorchStreamWriter failed"))
    if wrapped or (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)):
        return Reason.DISK_FULL, f"no space is left for {getattr(error, 'filename', None) or 'the job’s files'}"
    if (said := card_error(text)) is not None:
        return said
    return Reason.TRAINER_ERROR, f"{type(error).__name__}: {first}"


def _listen(commands: IO[str], orders: Orders) -> None:
    """Queue what the supervisor sends; without a supervisor that can be understood, end the process."""
    try:
        for line in commands:
            orders.put(decode_order(line))
    except ValueError as error:
        sys.stderr.write(f"the supervisor sent what this trainer can't read: {error}\n")
    os._exit(EXIT_ORPHANED)  # not sys.exit: the main thread may sit in a CUDA call


def _take_pipes() -> tuple[IO[str], IO[str]]:
    """Keep the protocol's pipes for ourselves: other prints go to stderr, and no library can wait for an answer."""
    sys.stdout.flush()
    commands, channel = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    return commands, channel


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):  # the supervisor is gone: no one is left to tell
        sys.exit(main())
