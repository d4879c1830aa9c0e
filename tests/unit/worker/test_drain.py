"""The wish to stop: what a person asked last and most urgently holds."""

from __future__ import annotations

from loractl.worker.attempt.drain import Drain


def test_a_node_that_hears_of_the_first_ctrl_c_late_does_not_take_the_second_one_back() -> None:
    drain = Drain()
    assert drain.wish is None
    drain.ask("now")
    drain.ask("checkpoint")
    assert drain.wish == "now"
    drain.clear()
    drain.ask("checkpoint")
    assert drain.wish == "checkpoint"
    drain.ask("now")
    assert drain.wish == "now"
