"""The loss that makes its gradient with it is torch's cross-entropy."""

from __future__ import annotations

import pytest
import torch

from loractl.worker.engine.passes.cross_entropy import SummedLoss


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_gradient_are_those_of_the_cross_entropy(smoothing: float) -> None:
    torch.manual_seed(0)
    logits, targets = (8 * torch.randn(9, 500)).requires_grad_(), torch.randint(0, 500, (9,))
    exact = logits.detach().double().requires_grad_()
    theirs = torch.nn.functional.cross_entropy(exact, targets, reduction="sum", label_smoothing=smoothing)
    ours = SummedLoss.apply(logits, targets, smoothing)
    (theirs / 7).backward()
    (ours / 7).backward()
    assert float(ours) == pytest.approx(float(theirs), rel=1e-6)
    assert logits.grad is not None and exact.grad is not None
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-5, atol=1e-7)
