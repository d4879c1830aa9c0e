"""The loss that makes its gradient with it is torch's cross-entropy."""

from __future__ import annotations

import pytest
import torch

from loractl.worker.engine.passes.cross_entropy import SummedLosses
from loractl.worker.engine.passes.scratch import Scratch


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_gradient_are_those_of_the_cross_entropy(smoothing: float) -> None:
    torch.manual_seed(0)
    logits, targets = (8 * torch.randn(9, 500)).requires_grad_(), torch.randint(0, 500, (9,))
    exact = logits.detach().double().requires_grad_()
    theirs = torch.nn.functional.cross_entropy(exact, targets, reduction="sum", label_smoothing=smoothing)
    ours = SummedLosses.apply(logits, targets, (9,), (smoothing,), None)[0]
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
    scratch = Scratch()
    held = scratch.take(*logits.shape).copy_(logits) if over else logits.clone()
    together, given = held.requires_grad_(), torch.tensor([0.5, 0.25, 3.0])
    sums = SummedLosses.apply(together, targets, lengths, smoothings, scratch)
    sums.backward(given)
    assert torch.equal(together, logits) != over
    begin = 0
    for length, smoothing, one, scale in zip(lengths, smoothings, sums, given, strict=True):
        part = slice(begin, begin := begin + length)
        alone = logits[part].clone().requires_grad_()
        loss = SummedLosses.apply(alone, targets[part], (length,), (smoothing,), None)
        loss.backward(scale[None])
        assert torch.equal(loss[0], one) and together.grad is not None and alone.grad is not None
        assert torch.equal(together.grad[part], alone.grad)


@pytest.mark.parametrize("scratch", [None, Scratch()])
def test_logits_in_16_bit_lose_what_they_would_in_fp32(scratch: Scratch | None) -> None:
    """Twice, since the second ones lie where the first ones lay."""
    torch.manual_seed(0)
    for count in (9, 4):
        narrow, targets = (8 * torch.randn(count, 500)).bfloat16().requires_grad_(), torch.randint(0, 500, (count,))
        wide = narrow.detach().clone().requires_grad_()
        ours = SummedLosses.apply(narrow, targets, (count,), (0.1,), scratch)
        theirs = SummedLosses.apply(wide.float(), targets, (count,), (0.1,), None)
        ours.backward(torch.tensor([0.3]))
        theirs.backward(torch.tensor([0.3]))
        assert torch.equal(ours, theirs) and narrow.grad is not None and wide.grad is not None
        assert torch.equal(narrow.grad, wide.grad)
