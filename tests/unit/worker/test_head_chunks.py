"""Which tokens pass the head together."""

from __future__ import annotations

from loractl.worker.engine.passes.lean import _chunks


def test_small_pieces_pass_the_head_together_and_a_few_tokens_alone() -> None:
    def tokens(parts: list[tuple[int, float]]) -> list[list[tuple[int, int]]]:
        return [[(n, piece.stop - piece.start) for n, piece in group] for group in _chunks(parts)]

    assert tokens([(100, 0.0), (100, 0.0), (100, 0.0)]) == [[(0, 100), (1, 100)], [(2, 100)]]
    assert tokens([(40, 0.0), (31, 0.0), (0, 0.0), (40, 0.0)]) == [[(1, 31)], [(0, 40), (3, 40)]]
    assert tokens([(40, 0.0), (40, 0.1)]) == [[(0, 40)], [(1, 40)]]
    assert tokens([(300, 0.0), (256, 0.0)]) == [[(0, 256)], [(0, 44)], [(1, 256)]]
