"""The loss that makes its gradient with it is torch's cross-entropy."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from loractl.worker.engine.passes import card_kernels
from loractl.worker.engine.passes.cross_entropy import scaled, summed_losses, widened
from loractl.worker.engine.passes.wide import Scratch


@pytest.fixture(params=[False, True], ids=["processor", "card"], autouse=True)
def _on_card(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(card_kernels, "PLACES", ("cpu",) if request.param else ())
    return


def learned(
    logits: torch.Tensor, targets: torch.Tensor, smoothing: float, scale: float, scratch: Scratch | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    summed, gradient = summed_losses(widened(logits, scratch), targets, smoothing, scratch)
    return summed, scaled(gradient, torch.tensor(scale), logits.dtype)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_gradient_are_those_of_the_cross_entropy(smoothing: float) -> None:
    torch.manual_seed(0)
    logits, targets = 8 * torch.randn(9, 500), torch.randint(0, 500, (9,))
    exact = logits.double().requires_grad_()
    theirs = torch.nn.functional.cross_entropy(exact, targets, reduction="sum", label_smoothing=smoothing)
    (theirs / 7).backward()
    ours, gradient = learned(logits, targets, smoothing, 1 / 7)
    assert float(ours) == pytest.approx(float(theirs), rel=1e-6)
    assert exact.grad is not None
    torch.testing.assert_close(gradient.double(), exact.grad, rtol=1e-5, atol=1e-7)


def test_a_target_without_a_chance_has_its_loss() -> None:
    """Its chance is 0 in fp32."""
    loss, gradient = learned(torch.tensor([[500.0, 0.0]]), torch.tensor([1]), 0.0, 1.0)
    assert float(loss) == 500 and gradient.tolist() == [[1.0, -1.0]]


def test_a_gradient_overwrites_logits_that_are_in_the_scratch() -> None:
    torch.manual_seed(0)
    logits, targets, scratch = 8 * torch.randn(9, 500), torch.randint(0, 500, (9,)), Scratch()
    own = scratch.take(*logits.shape).copy_(logits)
    (loss, gradient), (theirs, alone) = learned(own, targets, 0.1, 0.5, scratch), learned(logits, targets, 0.1, 0.5)
    assert gradient.data_ptr() == own.data_ptr() and not torch.equal(own, logits)
    assert torch.equal(loss, theirs) and torch.equal(gradient, alone)


@pytest.mark.parametrize("scratch", [None, Scratch()])
def test_logits_in_16_bit_lose_what_they_would_in_fp32(scratch: Scratch | None) -> None:
    """Twice, since the second ones lie where the first ones lay."""
    torch.manual_seed(0)
    for count in (9, 4):
        narrow, targets = (8 * torch.randn(count, 500)).bfloat16(), torch.randint(0, 500, (count,))
        ours, gradient = learned(narrow, targets, 0.1, 0.3, scratch)
        theirs, whole = learned(narrow.float(), targets, 0.1, 0.3)
        assert torch.equal(ours, theirs) and gradient.dtype == torch.bfloat16
        assert torch.equal(gradient, whole.bfloat16())
