"""float16 without a card: the loss scaler's skipped steps, and the models that must not compute in it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl

from loractl.common.job.spec import JobSpec
from loractl.common.job.status import Reason
from loractl.common.memory.step import Lengths
from loractl.common.units import GIB
from loractl.worker.allowance import shows_bf16
from loractl.worker.base.arithmetic import OVERFLOWS_FP16, Precision, choose_precision
from loractl.worker.base.failure import TrainingFailed
from loractl.worker.base.processor import has_bf16
from loractl.worker.base.source import family_of
from loractl.worker.engine.optimizer import ScaledOptimizer
from loractl.worker.protocol.messages import Note, Planned, Stepped, Told
from loractl.worker.recipe import need
from loractl.worker.recipe.fit import SKIPS, Brake
from loractl.worker.recipe.progress import Recorder, Teller
from loractl.worker.recipe.recipe import _about_fp16
from loractl.worker.recipe.run import Run

from ..unit.common.memory.test_plan import SMOLLM2_135M
from .test_out_of_memory import make_order


class Training:
    """A member's optimizer and its scaler as they run in fp16, with gradients of any size."""

    def __init__(self, tmp_path: Path) -> None:
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.optimizer = ScaledOptimizer(torch.optim.SGD([self.weight], lr=0.1), torch.amp.GradScaler("cpu"))
        self.told: list[Told] = []
        (tmp_path / "data.jsonl").write_text("")
        run = Run(order=make_order(tmp_path, tmp_path, tmp_path / "data.jsonl"), tell=self.told.append)
        self.args, self.state = SimpleNamespace(fp16=True), SimpleNamespace(global_step=0)
        self.callbacks = (Brake(run), Teller(run, Recorder(1)))

    def step(self, gradient: float, loss: float = 2.0) -> None:
        self.weight.grad = None
        self.optimizer.backward(self.weight.sum())
        assert self.weight.grad is not None
        self.weight.grad = (self.weight.grad * gradient).half().float()  # the gradient as fp16 holds it, or infinity
        norm = float(self.optimizer.clip([self.weight], 1e30))
        self.optimizer.step()
        for callback in self.callbacks:
            callback.on_optimizer_step(self.args, self.state, TrainerControl(), optimizer=self.optimizer)
        self.state.global_step += 1
        for callback in self.callbacks:
            callback.on_log(self.args, self.state, TrainerControl(), logs={"loss": loss, "grad_norm": norm})


@pytest.mark.parametrize("most", ["", "AVX2"])
def test_a_node_knows_without_torch_whether_its_processor_has_bfloat16(
    most: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", most)
    assert shows_bf16() is has_bf16()
    assert most == "" or not shows_bf16()


def test_the_scaler_s_first_skips_are_no_divergence(tmp_path: Path) -> None:
    training = Training(tmp_path)
    for _ in range(8):  # 2^16 x 16 overflows; 2^11 x 16 fits
        training.step(16.0)
    assert float(training.weight) == pytest.approx(-0.1 * 16 * 3), "five steps were skipped, three counted"
    notes = [m.text for m in training.told if isinstance(m, Note)]
    assert len(notes) == 1 and notes[0].startswith("float16: step 1 changed nothing")
    steps = [m.metrics for m in training.told if isinstance(m, Stepped)]
    assert ["grad_norm" in metrics for metrics in steps] == [False] * 5 + [True] * 3, "infinity is not told"


def test_gradients_that_overflow_at_any_scale_are_a_divergence(tmp_path: Path) -> None:
    training = Training(tmp_path)
    with pytest.raises(TrainingFailed, match="overflowed float16 in 20 steps in a row up to step 20") as failure:
        for _ in range(SKIPS + 1):
            training.step(1e9)
    assert failure.value.reason is Reason.DIVERGED


def test_a_loss_that_is_not_finite_is_a_divergence_in_fp16_too(tmp_path: Path) -> None:
    with pytest.raises(TrainingFailed, match="loss became nan"):
        Training(tmp_path).step(1.0, loss=float("nan"))


@pytest.mark.long
@pytest.mark.parametrize(("family", "taken"), [("llama", torch.float16), ("gemma", torch.float16)])
@pytest.mark.parametrize("bf16", [False, True])
def test_other_models_take_float16_on_an_old_card(
    family: str, taken: torch.dtype, bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: bf16)
    assert choose_precision("cuda", "auto", family).base is (torch.bfloat16 if bf16 else taken)


@pytest.mark.long
@pytest.mark.parametrize("family", ["gemma2", "gemma3", "gemma3_text"])
def test_gemma_2_and_3_train_in_float32_on_a_card_without_bfloat16(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    assert family_of(str(tmp_path), None) == family
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    precision = choose_precision("cuda", "auto", family)
    assert (precision.base, precision.amp) == (torch.float32, None)
    assert choose_precision("cuda", "float16", family).amp == "fp16", "a job's own choice goes first"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    assert choose_precision("cuda", "auto", family).amp == "bf16"


@pytest.fixture
def old_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card without bfloat16 and without a fused kernel for heads that share keys and values: a T4."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    monkeypatch.setattr(need, "are_fused", lambda *_: False)
    monkeypatch.setattr(need, "lengths_of", lambda lengths: lengths)
    monkeypatch.setattr("loractl.worker.recipe.need.limit_to", lambda *_: None)  # which asks the card


def told_need(tmp_path: Path, family: str, given: int, gpu: str = "GPU-0", **training: object) -> Planned:
    """What the trainer tells of a job on a card, before it loads the base."""
    tmp_path.mkdir(exist_ok=True)
    config = {**SMOLLM2_135M, "model_type": family, "head_dim": 64}
    (tmp_path / "data.jsonl").write_text("")
    (tmp_path / "config.json").write_text(json.dumps(config))
    order = make_order(tmp_path / "a", tmp_path, tmp_path / "data.jsonl", **training)
    order = order.model_copy(update={"gpu": gpu, "device": "cuda", "vram_reserved": given})
    told: list[Told] = []
    need.tell_need(Run(order=order, tell=told.append), Lengths(train=256, evaluate=256))  # type: ignore[arg-type]
    (planned,) = [message for message in told if isinstance(message, Planned)]
    return planned


@pytest.mark.long
@pytest.mark.parametrize("family", ["gemma2", "qwen2", "gpt_oss", "glm4_moe", "qwen3_moe"])
def test_each_family_of_the_table_takes_float32_and_has_a_source(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    assert choose_precision("cuda", "auto", family) == Precision(base=torch.float32, amp=None)
    assert all("/" in source for source in OVERFLOWS_FP16.values())


@pytest.mark.parametrize("gpu", ["GPU-0", "SIM-0"])
def test_less_than_the_base_s_weights_is_refused_before_they_are_loaded(
    gpu: str, tmp_path: Path, old_card: None
) -> None:
    """134.5M weights in 16 bit are 0.25 GiB."""
    assert told_need(tmp_path / "a", "llama", 134515008 * 2, gpu=gpu).lora
    with pytest.raises(TrainingFailed, match=r"its base alone takes 0\.3 GiB, the card gives 0\.0 GiB") as failure:
        told_need(tmp_path / "b", "llama", 1, gpu=gpu)
    assert failure.value.reason is Reason.OUT_OF_MEMORY


def test_a_job_that_an_old_card_computes_in_float32_is_planned_so(tmp_path: Path, old_card: None) -> None:
    llama, qwen2 = (told_need(tmp_path / family, family, 64 * GIB) for family in ("llama", "qwen2"))
    asked = told_need(tmp_path / "asked", "qwen2", 64 * GIB, dtype="float32")
    assert llama.lora and qwen2.lora and qwen2.lora > llama.lora + 2 * 134e6
    assert (qwen2.lora, qwen2.qlora) == (asked.lora, asked.qlora)


def test_one_that_needs_more_in_float32_than_the_card_gives_ends_before_it_loads(
    tmp_path: Path, old_card: None
) -> None:
    with pytest.raises(TrainingFailed) as failure:
        told_need(tmp_path, "qwen2", GIB)
    assert failure.value.reason is Reason.OUT_OF_MEMORY
    assert str(failure.value) == (
        "qwen2 overflows float16, and this card has no bfloat16: in float32 it needs 1.3 GiB, the card gives 1.0 GiB"
    )
    told_need(tmp_path / "own", "qwen2", GIB, dtype="float32")  # as it was planned, whatever that was


@pytest.mark.long
def test_the_history_says_what_float16_means_for_such_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data.jsonl").write_text("")
    spec = make_order(tmp_path / "a", tmp_path, tmp_path / "data.jsonl").spec
    own = make_order(tmp_path / "b", tmp_path, tmp_path / "data.jsonl", dtype="float16").spec
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)

    def said(spec: JobSpec, family: str) -> str | None:
        precision = choose_precision("cuda", spec.training.dtype, family)
        return _about_fp16(spec, precision, family, on_gpu=True)

    no_bf16 = "and this card has no bfloat16: it trains in float32, slower"
    assert said(spec, "gemma2") == f"gemma2 overflows float16, {no_bf16}"
    assert said(own, "gemma3_text") == (
        "training.dtype: gemma3_text overflows float16; float32, or a card with bfloat16, is safer"
    )
    assert said(spec, "llama") is None
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    assert said(spec, "gemma2") is None
