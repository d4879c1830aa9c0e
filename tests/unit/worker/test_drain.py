"""The wish to stop: what a person asked last and most urgently holds."""

from __future__ import annotations

from loractl.worker.attempt.workplace import Drain


def test_a_first_ctrl_c_that_comes_late_does_not_undo_the_second_one() -> None:
    drain = Drain()
    assert drain.wish is None
    drain.ask("now")
    drain.ask("checkpoint")
    assert drain.wish == "now"


def test_an_undrain_does_not_undo_the_worker_s_stop() -> None:
    drain = Drain()
    drain.ordered = True
    assert (drain.wish, drain.asked) == ("checkpoint", None)
    drain.ask("checkpoint")
    drain.ordered = False
    assert drain.wish == "checkpoint"
    other = Drain()
    other.ordered = True
    other.ordered = False
    assert other.wish is None
