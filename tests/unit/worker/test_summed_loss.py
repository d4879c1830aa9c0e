"""The loss that makes its gradient with it is torch's cross-entropy."""

from __future__ import annotations

import pytest
import torch

from loractl.worker.engine.passes.cross_entropy import SummedLosses


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_gradient_are_those_of_the_cross_entropy(smoothing: float) -> None:
    torch.manual_seed(0)
    logits, targets = (8 * torch.randn(9, 500)).requires_grad_(), torch.randint(0, 500, (9,))
    exact = logits.detach().double().requires_grad_()
    theirs = torch.nn.functional.cross_entropy(exact, targets, reduction="sum", label_smoothing=smoothing)
    ours = SummedLosses.apply(logits, targets, (9,), (smoothing,), False)[0]
    (theirs / 7).backward()
    (ours / 7).backward()
    assert float(ours.detach()) == pytest.approx(float(theirs), rel=1e-6)
    assert logits.grad is not None and exact.grad is not None
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("over", [False, True])
def test_trainings_behind_each_other_get_what_each_gets_alone(over: bool) -> None:
    torch.manual_seed(0)
    logits, targets = 8 * torch.randn(9, 500), torch.randint(0, 500, (9,))
    lengths, smoothings = (1, 5, 3), (0.0, 0.1, 0)
    together, given = logits.clone().requires_grad_(), torch.tensor([0.5, 0.25, 3.0])
    sums = SummedLosses.apply(together, targets, lengths, smoothings, over)
    sums.backward(given)
    assert torch.equal(together, logits) != over
    begin = 0
    for length, smoothing, one, scale in zip(lengths, smoothings, sums, given, strict=True):
        part = slice(begin, begin := begin + length)
        alone = logits[part].clone().requires_grad_()
        loss = SummedLosses.apply(alone, targets[part], (length,), (smoothing,), False)
        loss.backward(scale[None])
        assert torch.equal(loss[0], one) and together.grad is not None and alone.grad is not None
        assert torch.equal(together.grad[part], alone.grad)
