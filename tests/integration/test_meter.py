"""What is measured of a pass on a processor: its own computing, whatever else the machine does."""

from __future__ import annotations

import time

import torch

from loractl.worker.engine.engine import EVERY_S, FIRST, PassMeter

CPU = torch.device("cpu")


def test_a_pass_that_waited_for_the_processor_cost_no_more() -> None:
    told: list[tuple[int, int, float, float]] = []
    meter = PassMeter(lambda *of: told.append(of))
    for _ in range(FIRST):
        with meter.around(64, 1, CPU):
            pass
    assert not told, "the first ones fill memory"
    with meter.around(64, 1, CPU):
        time.sleep(0.3)  # as while others compute
        until = time.process_time() + 0.05
        while time.process_time() < until:
            pass
    ((tokens, members, seconds, wall),) = told
    assert (tokens, members) == (64, 1)
    assert 0.05 / torch.get_num_threads() <= seconds < 0.2
    assert wall >= 0.35, "a time limit is about the clock"
    with meter.around(64, 1, CPU):
        pass
    assert len(told) == 1, f"one in {EVERY_S} s is measured"
