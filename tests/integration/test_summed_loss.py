"""The loss that makes its gradient with it is torch's cross-entropy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch

from loractl.worker.engine.passes import card_kernels
from loractl.worker.engine.passes.cross_entropy import scaled, summed_losses, widened
from loractl.worker.engine.passes.scratch import Scratch


@pytest.fixture(params=[False, True], ids=["processor", "card"], autouse=True)
def _on_card(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(card_kernels, "PLACES", ("cpu",) if request.param else ())
    return


def learned(
    logits: torch.Tensor,
    targets: torch.Tensor,
    lengths: Sequence[int],
    smoothings: Sequence[float],
    scales: Sequence[float],
    scratch: Scratch | None = None,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    sums, gradient = summed_losses(widened(logits, scratch), targets, lengths, smoothings, scratch)
    return sums, scaled(gradient, lengths, [torch.tensor(scale) for scale in scales], logits.dtype)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_gradient_are_those_of_the_cross_entropy(smoothing: float) -> None:
    torch.manual_seed(0)
    logits, targets = 8 * torch.randn(9, 500), torch.randint(0, 500, (9,))
    exact = logits.double().requires_grad_()
    theirs = torch.nn.functional.cross_entropy(exact, targets, reduction="sum", label_smoothing=smoothing)
    (theirs / 7).backward()
    (ours,), gradient = learned(logits, targets, (9,), (smoothing,), (1 / 7,))
    assert float(ours) == pytest.approx(float(theirs), rel=1e-6)
    assert exact.grad is not None
    torch.testing.assert_close(gradient.double(), exact.grad, rtol=1e-5, atol=1e-7)


def test_a_target_without_a_chance_has_its_loss() -> None:
    """Its chance is 0 in fp32."""
    (loss,), gradient = learned(torch.tensor([[500.0, 0.0]]), torch.tensor([1]), (1,), (0.0,), (1.0,))
    assert float(loss) == 500 and gradient.tolist() == [[1.0, -1.0]]


@pytest.mark.parametrize("over", [False, True])
def test_trainings_behind_each_other_get_what_each_gets_alone(over: bool) -> None:
    torch.manual_seed(0)
    logits, targets = 8 * torch.randn(9, 500), torch.randint(0, 500, (9,))
    lengths, smoothings, scales = (1, 5, 3), (0.0, 0.1, 0), (0.5, 0.25, 3.0)
    scratch = Scratch()
    together = scratch.take(*logits.shape).copy_(logits) if over else logits.clone()
    sums, gradient = learned(together, targets, lengths, smoothings, scales, scratch)
    assert torch.equal(together, logits) != over
    begin = 0
    for length, smoothing, one, scale in zip(lengths, smoothings, sums, scales, strict=True):
        part = slice(begin, begin := begin + length)
        (loss,), alone = learned(logits[part].clone(), targets[part], (length,), (smoothing,), (scale,))
        assert torch.equal(loss, one) and torch.equal(gradient[part], alone)


@pytest.mark.parametrize("scratch", [None, Scratch()])
def test_logits_in_16_bit_lose_what_they_would_in_fp32(scratch: Scratch | None) -> None:
    """Twice, since the second ones lie where the first ones lay."""
    torch.manual_seed(0)
    for count in (9, 4):
        narrow, targets = (8 * torch.randn(count, 500)).bfloat16(), torch.randint(0, 500, (count,))
        (ours,), gradient = learned(narrow, targets, (count,), (0.1,), (0.3,), scratch)
        (theirs,), whole = learned(narrow.float(), targets, (count,), (0.1,), (0.3,))
        assert torch.equal(ours, theirs) and gradient.dtype == torch.bfloat16
        assert torch.equal(gradient, whole.bfloat16())
