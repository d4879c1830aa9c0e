"""The lean pass beside peft's own, before a box trusts it: what is sound passes, what is broken trains by peft's."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from loractl.common.job.method import Method
from loractl.common.job.status import Reason
from loractl.worker.base.arithmetic import Precision
from loractl.worker.base.model import Learner, load_base
from loractl.worker.engine.passes import choice, fused
from loractl.worker.engine.passes.check_cache import CheckCache
from loractl.worker.engine.passes.choice import difference, forward_pass
from loractl.worker.engine.passes.lean import LeanPass
from loractl.worker.engine.passes.padded import PaddedPass
from loractl.worker.engine.saved_state import read_streams
from loractl.worker.protocol.messages import Note, Planned
from loractl.worker.recipe.kinds import trained_kind

from .conftest import Recipe
from .test_engine import PAD
from .test_lean import BF16, FP32, base_of, spec_of

WEIGHTS = Path("result") / "adapter" / "adapter_model.safetensors"


def learner_of(folder: Path, method: str, precision: Precision, **sections: Any) -> tuple[Learner, Any]:
    from loractl.worker.base.arithmetic import compute_in
    from loractl.worker.base.lora import add_adapter

    spec = spec_of(method, **sections)
    model = add_adapter(load_base(str(folder), Method(method), "cpu", precision), spec, Method(method))
    compute_in(model, precision)

    class Tokenizer:
        pad_token_id = PAD

    return Learner(model=model, tokenizer=Tokenizer(), precision=precision), spec


KINDS: dict[str, dict[str, Any]] = {
    "answers": {"lora": {"lora_dropout": 0.1}},
    "packed": {"training": {"packing": True}},
    "pairs": {"task_type": "preference", "lora": {"lora_dropout": 0.1}},
    "orpo": {"task_type": "preference", "preference": {"loss_type": "orpo"}},
    "DoRA": {"lora": {"use_dora": True, "lora_dropout": 0.1}},
    "smoothed": {"training": {"label_smoothing_factor": 0.1}},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_sound_pass_differs_by_rounding_and_leaves_no_trace(
    tiny_model: Path, method: str, precision: Precision, kind: str
) -> None:
    learner, spec = learner_of(tiny_model, method, precision, **KINDS[kind])
    model, loss = learner.model.train(), trained_kind(spec).loss(spec)
    before, streams = {n: p.detach().clone() for n, p in model.named_parameters()}, read_streams(model.device)
    lean, own = LeanPass(model, precision, loss=loss), PaddedPass(model, PAD, loss=loss)
    chances = [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    assert difference(lean, own, precision, packing=spec.training.packing) is None
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters()) and model.training
    assert torch.equal(read_streams(model.device)["torch"], streams["torch"])
    assert chances == [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    assert lean.loss is own.loss is loss and not getattr(model.get_base_model().model, "gradient_checkpointing", False)


@pytest.mark.long
@pytest.mark.parametrize("family", ["Mixtral", "Gemma2", "Cohere", "GPT2"])
def test_other_families_are_sound_too(family: str) -> None:
    from .test_lean import adapted

    model = adapted(base_of(family), spec_of())
    assert difference(LeanPass(model, FP32), PaddedPass(model, PAD), FP32, packing=False) is None


def wrong_scale(monkeypatch: pytest.MonkeyPatch, model: Any = None) -> None:
    """The second layer that is asked computes its adapter's part with another factor, as a broken kernel would."""
    own, seen = fused._AdapterPart.of, list[Any]()

    def of(layer: Any) -> Any:
        seen.append(layer) if layer not in seen else None
        part = own(layer)
        return dataclasses.replace(part, scaling=2 * part.scaling) if seen.index(layer) == 1 else part

    monkeypatch.setattr(fused._AdapterPart, "of", of)


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(fused.FrozenProduct, "gradient", fail)


@pytest.mark.parametrize("precision", [FP32, BF16], ids=["fp32", "bf16"])
def test_a_wrong_scale_in_one_product_is_found(
    tiny_model: Path, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, spec = learner_of(tiny_model, "lora", precision)
    wrong_scale(monkeypatch)
    forward, why = forward_pass(learner, spec, 40)
    assert isinstance(forward, PaddedPass) and why is not None and "its gradient of" in why


def test_only_the_recomputed_form_may_be_broken(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learner, spec = learner_of(tiny_model, "lora", FP32)
    own = LeanPass.recompute_blocks

    def spoil(lean: LeanPass, every: int = 1) -> None:
        own(lean, every)
        wrong_scale(monkeypatch)

    monkeypatch.setattr(LeanPass, "recompute_blocks", spoil)
    forward, why = forward_pass(learner, spec, 40)
    assert isinstance(forward, PaddedPass) and why is not None


def test_what_was_found_is_remembered_be_it_good_or_bad(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass that fails may spoil the process that tries it: the next one must not try again."""
    tried = list[int]()
    monkeypatch.setattr(choice, "difference", lambda *a, **k: (tried.append(1), difference(*a, **k))[1])

    def asked(folder: str, **sections: Any) -> tuple[type, str | None, int]:
        before = len(tried)
        learner, spec = learner_of(tiny_model, "lora", FP32, **sections)
        forward, why = forward_pass(learner, spec, 40, checks=CheckCache(folder=tmp_path / folder, about=[]))
        return type(forward), why, len(tried) - before

    assert [asked("good"), asked("good")] == [(LeanPass, None, 1), (LeanPass, None, 0)]
    assert asked("good", training={"packing": True})[2] == 1 == asked("good", task_type="preference")[2]
    with monkeypatch.context() as patch:
        failing(patch, RuntimeError("no kernel image is available"))
        first = asked("bad")
    assert first[::2] == (PaddedPass, 1) and "it fails (no kernel image is available)" in str(first[1])
    assert asked("bad") == (PaddedPass, first[1], 0)


def test_a_lack_of_memory_is_no_fault_of_the_pass(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longest batches are tried next, in which memory makes the micro-batch smaller."""
    learner, spec = learner_of(tiny_model, "lora", FP32)
    checks, tried = CheckCache(folder=tmp_path, about=[]), list[str | None]()
    with monkeypatch.context() as patch:
        failing(patch, torch.OutOfMemoryError("no room"))
        forward, why = forward_pass(learner, spec, 40, checks=checks)
    assert isinstance(forward, LeanPass) and why is None
    assert all(parameter.grad is None for parameter in learner.model.parameters())
    monkeypatch.setattr(choice, "difference", lambda *_, **__: tried.append(None))
    forward_pass(learner, spec, 40, checks=checks)
    assert tried == [None], "the next job compares the passes"


@pytest.mark.parametrize(
    ("said", "remembered"),
    [("uncorrectable ECC error encountered", False), ("an illegal memory access was encountered", True)],
)
def test_a_failing_card_is_no_fault_of_the_pass(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, remembered: bool
) -> None:
    learner, spec = learner_of(tiny_model, "lora", FP32)
    checks = CheckCache(folder=tmp_path, about=[])
    with monkeypatch.context() as patch:
        failing(patch, RuntimeError(f"CUDA error: {said}"))
        with contextlib.nullcontext() if remembered else pytest.raises(RuntimeError, match=said):
            forward_pass(learner, spec, 40, checks=checks)
    forward, why = forward_pass(learner, spec, 40, checks=checks)
    assert (type(forward), why is not None) == (PaddedPass if remembered else LeanPass, remembered)


@pytest.mark.long
def test_a_training_is_the_same_with_and_without_the_comparison(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: dict[str, Any] = {"max_steps": 2, "lora": {"lora_dropout": 0.2}}
    assert recipe("with", **keys)[0].reason is Reason.OK
    monkeypatch.setattr(choice, "difference", lambda *_, **__: None)
    assert recipe("without", **keys)[0].reason is Reason.OK
    assert (tmp_path / "with" / WEIGHTS).read_bytes() == (tmp_path / "without" / WEIGHTS).read_bytes()


@pytest.mark.long
def test_a_job_whose_lean_pass_is_broken_trains_by_peft_s_and_says_so(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: dict[str, Any] = {"max_steps": 4, "save_steps": 2, "dtype": "float32"}
    assert recipe("asked", engine="peft", **keys)[0].reason is Reason.OK
    ended, sound = recipe("sound", **keys)
    with monkeypatch.context() as patch:
        wrong_scale(patch)
        patch.setattr(choice, "_fault", lambda *_: None)
        patch.setattr(choice, "WHOLE", 1e-4)  # other code asks another question of the box
        patch.setattr("loractl.worker.engine.passes.check_cache._CODE", "broken")
        ended, told = recipe("broken", **keys)
    assert ended.reason is Reason.OK
    notes = [message.text for message in told if isinstance(message, Note)]
    assert any("trains with padded rows: on this device the lean pass does not compute what" in text for text in notes)
    assert not any("padded" in message.text for message in sound if isinstance(message, Note))
    plans = [[m.lora for m in some if isinstance(m, Planned) and m.lora] for some in (sound, told)]
    assert plans[1][-1] > plans[0][-1], "its plan is of padded rows"
    assert (tmp_path / "asked" / WEIGHTS).read_bytes() == (tmp_path / "broken" / WEIGHTS).read_bytes()


@pytest.mark.long
def test_a_checkpoint_of_another_pass_is_not_resumed_in_silence(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: dict[str, Any] = {"max_steps": 4, "save_steps": 2}
    assert recipe("lean", stop_after=2, **keys)[0].reason is Reason.DRAINED
    monkeypatch.setattr(choice, "_differs", lambda *_: "it does not")
    ended, told = recipe("other", resume="lean", **keys)
    assert ended.reason is Reason.OK
    said = "it was trained by the lean pass and continues by peft's own pass, with padded rows"
    assert any(said in message.text for message in told if isinstance(message, Note))
