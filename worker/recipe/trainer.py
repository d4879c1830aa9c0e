"""The trainer process: reads its order from stdin, trains one attempt, reports on stdout, ends.

    python -m loractl.worker.recipe.trainer

With `--fork-server DEVICE` it imports all that trainers need, and forks them (fork_server.py). A trainer ends when its
stdin closes, so a killed supervisor leaves no orphan on the device. Signals are left to the supervisor. Libraries'
output goes to stderr, which is the job's log.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
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
from loractl.worker.protocol.messages import FORK_SERVER, Again, Ended, Start, Told, encode

from .fork_server import serve
from .orders import StopOrder, listen, next_order
from .other_ranks import LINK_LOST, OtherRanks

Tell = Callable[[Told], None]
Recipe = Callable[[Start, StopOrder, Tell], Ended | Again]


def main(run: Recipe | None = None) -> int:
    """Serve one attempt; the exit status is 0 if its end could be reported. `run`: a recipe other than loractl's."""
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(ignored, signal.SIG_IGN)  # the supervisor stops us through stdin
    load = _load if run is None else lambda: None  # another recipe itself imports what it needs
    if sys.argv[1:2] == [FORK_SERVER] and not serve(sys.argv[2], load):
        return 0  # it was the server; its forks go on here, each with its own pipes
    commands, channel = _take_pipes()
    lock = threading.Lock()

    def tell(message: Told) -> None:
        with lock:
            channel.write(encode(message))
            channel.flush()

    if not isinstance(order := next_order(commands), Start):
        return 1
    tell((run or _run)(order, listen(commands), tell))
    return 0


def _run(order: Start, stop: StopOrder, tell: Tell) -> Ended | Again:
    """Train; on several cards along with the other ranks' processes, which this one leads."""
    gang = OtherRanks(order, tell) if order.ranks and order.rank == 0 else None
    _load()
    ended = _trained(order if gang is None else gang.order, stop, tell)
    return ended if gang is None or isinstance(ended, Again) else gang.settle(ended)


def _trained(order: Start, stop: StopOrder, tell: Tell) -> Ended | Again:
    """Every way to fail becomes a reason and a sentence, with the traceback in the log."""
    from loractl.worker.base.failure import TrainingFailed, explain
    from loractl.worker.base.gauge import hold_to
    from loractl.worker.engine.ranks.link import is_lost

    from .gang import follow
    from .recipe import train
    from .run import Run, Stopped

    run = Run(order=order, tell=tell, stop=stop)

    def ended(reason: Reason, message: str) -> Ended:
        return Ended(job_id=order.job_id, reason=reason, message=message, peaks=run.gauge.look())

    try:
        hold_to(order.memory_limit, order.device, order.gpu)
        return train(run) if order.rank == 0 else follow(run)
    except Stopped:
        return ended(Reason.DRAINED if stop.saves.is_set() else Reason.CANCELLED, "stopped when asked to")
    except DataError as error:
        return ended(Reason.BAD_DATA, error.with_hint)
    except TrainingFailed as error:
        if error.__cause__ is not None:  # a library's; without one, the sentence says it all
            traceback.print_exception(error.__cause__)
        return ended(error.reason, error.sentence).model_copy(update={"withdrawn": error.withdrawn})
    except Exception as error:  # noqa: BLE001  after any error the job's row must say why
        # the last place that can name the failure: the whole traceback goes to the log, the sentence to the job's row
        traceback.print_exc()
        if order.ranks and is_lost(error):
            return ended(Reason.TRAINER_ERROR, LINK_LOST)
        reason, message = explain(error, own_limit=order.device == "cpu" and order.memory_limit is not None)
        if reason is Reason.OUT_OF_MEMORY and run.again is not None:
            return run.again
        if reason is Reason.TRAINER_ERROR and Stage.EVALUATING in run.stages:
            reason = Reason.EVALUATION_FAILED
        return ended(reason, message)


def _load() -> None:
    """Import the training stack; a second call only lets warnings be logged again."""
    _import()
    tell_once()


@functools.cache
def _import() -> None:
    gc.disable()  # the imports create a million objects that stay to the end: scanning them costs 1.5 s of CPU
    quieten()
    tell_once()
    load_kernels()
    from . import recipe  # noqa: F401

    gc.freeze()
    gc.enable()


def _take_pipes() -> tuple[IO[str], IO[str]]:
    """Keep the protocol's pipes for ourselves: other output goes to stderr, and no library can wait for an answer."""
    sys.stdout.flush()
    commands, channel = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    return commands, channel


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):  # the supervisor is gone: nobody is left to report to
        sys.exit(main())
