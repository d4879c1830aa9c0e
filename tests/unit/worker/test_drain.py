"""The wish to stop: what a person asked last and most urgently holds."""

from __future__ import annotations

from loractl.worker.attempt.workplace import Drain


def test_a_node_that_hears_of_the_first_ctrl_c_late_does_not_take_the_second_one_back() -> None:
    drain = Drain()
    assert drain.wish is None
    drain.ask("now")
    drain.ask("checkpoint")
    assert drain.wish == "now"


def test_the_end_of_a_person_s_order_does_not_take_the_worker_s_stop_back() -> None:
    drain = Drain()
    drain.order(True)
    assert (drain.wish, drain.asked) == ("checkpoint", None)
    drain.ask("checkpoint")
    drain.order(False)
    assert drain.wish == "checkpoint"
    other = Drain()
    other.order(True)
    other.order(False)
    assert other.wish is None
