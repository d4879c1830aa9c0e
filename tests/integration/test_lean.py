"""The lean forward pass against the padded one: the same losses and gradients, without the waste."""

from __future__ import annotations

import gc
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import set_seed
from transformers.modeling_flash_attention_utils import _is_packed_sequence
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from loractl.common.job.method import Method
from loractl.common.job.spec import JobSpec
from loractl.common.job.status import Reason
from loractl.common.memory.step import HEAD_CHUNK
from loractl.common.units import gib
from loractl.worker.base import lora
from loractl.worker.base.arithmetic import Precision, choose_precision, compute_in, draws, evaluating
from loractl.worker.base.failure import TrainingFailed
from loractl.worker.base.lora import add_adapter
from loractl.worker.base.model import Learner, load_base, load_tokenizer
from loractl.worker.data.prepared import pack
from loractl.worker.data.tokens import IGNORED, TokenRow
from loractl.worker.engine.loss import MicroBatch, learned_in
from loractl.worker.engine.passes import attention as row_module
from loractl.worker.engine.passes import choice, wide
from loractl.worker.engine.passes.attention import ShortRows
from loractl.worker.engine.passes.check_cache import CheckCache
from loractl.worker.engine.passes.choice import forward_pass, rows_together
from loractl.worker.engine.passes.lean import LeanPass
from loractl.worker.engine.passes.padded import PaddedPass, check_apart
from loractl.worker.evaluation.row_losses import score_rows
from loractl.worker.protocol.messages import Note, Planned, Stepped
from loractl.worker.recipe.kinds import trained_kind

from .conftest import Recipe
from .test_engine import PAD, rows
from .test_options import losses

FP32, BF16 = choose_precision("cpu", "float32"), choose_precision("cpu", "bfloat16")
SMALL: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": PAD,
}  # fmt: skip
SLIDING: dict[str, Any] = {"sliding_window": 4}  # shorter than the rows

FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": SLIDING,
    "Qwen3": {},
    "Gemma2": {**SLIDING, "query_pre_attn_scalar": 8},  # caps of logits and scores, so eager attention
    "Gemma3Text": SLIDING,
    "Granite": {"logits_scaling": 3.0, "embedding_multiplier": 2.0},
    "Cohere": {"logit_scale": 0.3},
    "Mixtral": {"num_local_experts": 4},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "GPTNeoX": {},
}


def base_of(family: str, **sizes: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family.removesuffix('Text')}{'Text' * family.endswith('Text')}Config")
    name = "GPT2LMHeadModel" if family == "GPT2" else f"{family.removesuffix('Text')}ForCausalLM"
    kind = getattr(transformers, name)
    return kind(
        config(
            **({} if family == "GPT2" else SMALL | sizes),
            **FAMILIES[family],
            **({"vocab_size": 300} if family == "GPT2" else {}),
        )
    )


def spec_of(method: str = "lora", **sections: Any) -> JobSpec:
    lora = {"r": 4, "lora_dropout": 0.0, **sections.pop("lora", {})}
    job = {"name": "t", "base_model": "m", "method": method, "dataset": {"path": "x.jsonl"}, "lora": lora, **sections}
    return JobSpec.model_validate(job)


def adapted(base: Any, spec: JobSpec, precision: Precision = FP32) -> Any:
    """A model whose adapter changes something: B is zero at first, and A would have no gradient."""
    model = add_adapter(base, spec, Method(spec.method)).train()
    compute_in(model, precision)
    drawn = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=drawn)
    return model


def learned(forward: Any, some: list[TokenRow]) -> tuple[float, list[torch.Tensor]]:
    """The loss of a micro-batch that is half of its window, and the gradients that it leaves."""
    batch = MicroBatch(rows=some, learned=2 * learned_in(some), pieces=2)
    forward.model.zero_grad()
    loss = float(forward.learn(batch, torch.autograd.backward))
    return loss, [p.grad.clone() for p in forward.model.parameters() if p.grad is not None]


def apart(ours: tuple[float, list[torch.Tensor]], theirs: tuple[float, list[torch.Tensor]]) -> float:
    """The larger of both relative differences, of the loss and of all gradients together."""
    mine, other = (torch.cat([g.flatten() for g in gradients]) for _, gradients in (ours, theirs))
    assert float(other.norm()) > 0
    return max(abs(ours[0] - theirs[0]) / theirs[0], float((mine - other).norm() / other.norm()))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lean_step_of_a_family_learns_what_a_padded_one_does(family: str) -> None:
    model = adapted(base_of(family), spec_of())
    lean, padded = LeanPass(model, FP32), PaddedPass(model, PAD)
    assert rows_together(lean, 40) is None
    assert apart(learned(lean, rows(5)), learned(padded, rows(5))) < 1e-5
    with evaluating(model):
        assert lean.held_out_loss(rows(3)) == pytest.approx(padded.held_out_loss(rows(3)), rel=1e-5)


def test_a_cards_rounding_is_no_sight_of_other_rows_and_sight_of_them_is() -> None:
    """A card picks other kernels for other numbers of rows; here each linear layer answers a bit otherwise by them."""
    model = adapted(base_of("Llama"), spec_of())

    def round_by_count(module: Any, inputs: Any, answer: torch.Tensor) -> torch.Tensor:
        some = torch.Generator().manual_seed(answer.shape[1])
        return answer * (1 + 2**-8 * torch.randn(answer.shape[-1], generator=some))

    for module in model.get_base_model().model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(round_by_count)
    lean, card = LeanPass(model, FP32, fuses=False), choice.tolerance_on(torch.device("cuda"))
    assert rows_together(lean, 40, choice.tolerance_on(torch.device("cpu"))) is not None
    assert rows_together(lean, 40, card) is None
    row_module.RowAttention.__call__, own = one_row_of_all, row_module.RowAttention.__call__  # type: ignore[method-assign]
    try:
        assert "see each other" in str(rows_together(lean, 40, card))
    finally:
        row_module.RowAttention.__call__ = own  # type: ignore[method-assign]


def test_a_token_that_rounding_sends_through_another_expert_is_no_sight_of_other_rows() -> None:
    model = adapted(base_of("Mixtral"), spec_of())

    def send_one_elsewhere(module: Any, inputs: Any, answer: torch.Tensor) -> torch.Tensor:
        elsewhere = torch.zeros_like(answer)
        if module.config._attn_implementation == row_module.NAME:
            elsewhere[:, answer.shape[1] - 2] = answer.abs().max()
        return answer + elsewhere

    layer = model.get_base_model().model.layers[0].mlp
    layer.config = model.get_base_model().config
    layer.register_forward_hook(send_one_elsewhere)
    lean = LeanPass(model, FP32)
    assert rows_together(lean, 40) is None


def one_row_of_all(self: Any, module: Any, query: Any, key: Any, value: Any, mask: Any = None, **how: Any) -> Any:
    """Attention that does not tell rows apart."""
    return self._kernel(module)(module, query, key, value, None, **how)


SETTINGS: dict[str, dict[str, Any]] = {
    "checkpointing": {"training": {"gradient_checkpointing": True}},
    "smoothed labels": {"training": {"label_smoothing_factor": 0.2}},
    "packed rows": {"training": {"packing": True}},
    "a trained head": {"lora": {"modules_to_save": ["lm_head"]}},
    "a trained embedding": {"lora": {"modules_to_save": ["embed_tokens"]}},
    "DoRA": {"lora": {"use_dora": True}},
    "eager": {"training": {"attn_implementation": "eager"}},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_lean_step_with_an_option_learns_what_a_padded_one_does(tiny_model: Path, name: str) -> None:
    spec = spec_of(**SETTINGS[name])
    attention, loss = spec.training.attn_implementation, trained_kind(spec).loss(spec)
    model = adapted(load_base(str(tiny_model), Method.LORA, "cpu", FP32, attention=attention), spec)
    if spec.training.gradient_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    some = pack(rows(7), 64) if spec.training.packing else rows(7)
    ways = LeanPass(model, FP32, loss=loss), PaddedPass(model, PAD, loss=loss)
    ours, theirs = (learned(way, some) for way in ways)
    assert apart(ours, theirs) < 1e-5


def test_a_lean_step_on_nf4_learns_what_a_padded_one_does(tiny_model: Path) -> None:
    spec = spec_of("qlora", training={"dtype": "float32"})
    model = adapted(load_base(str(tiny_model), Method.QLORA, "cpu", FP32), spec)
    assert apart(learned(LeanPass(model, FP32), rows(5)), learned(PaddedPass(model, PAD), rows(5))) < 1e-5


def test_the_rest_of_an_nf4_base_keeps_its_16_bit_and_is_fp32_in_exact_mode(tiny_model: Path) -> None:
    precision = choose_precision("cpu", "bfloat16")
    for exact, kind in ((False, torch.bfloat16), (True, torch.float32)):
        base = load_base(str(tiny_model), Method.QLORA, "cpu", precision)
        model = add_adapter(base, spec_of("qlora", training={"exact": exact}), Method.QLORA)
        rest = {p.dtype for name, p in model.named_parameters() if "norm" in name or "embed" in name}
        assert rest == {kind}


def test_the_head_sees_learned_tokens_alone_in_chunks(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(load_base(str(tiny_model), Method.LORA, "cpu", FP32), spec_of())
    seen: list[int] = []
    model.get_base_model().lm_head.register_forward_hook(lambda m, i, out: seen.append(out[..., 0].numel()))
    some = rows(30)
    assert learned_in(some) > HEAD_CHUNK
    learned(LeanPass(model, FP32), some)
    assert sum(seen) == learned_in(some) and max(seen) == HEAD_CHUNK


def test_a_row_without_a_learned_token_teaches_nothing(tiny_model: Path) -> None:
    model = adapted(load_base(str(tiny_model), Method.LORA, "cpu", FP32), spec_of())
    empty = TokenRow(number=1, input_ids=[5, 6, 7], labels=[IGNORED] * 3)
    first, *others = rows(3)
    alone, beside = (learned(LeanPass(model, FP32), some) for some in ([first, *others], [first, empty, *others]))
    assert apart(beside, alone) < 1e-5
    batch = MicroBatch(rows=[empty], learned=4, pieces=2)
    assert float(LeanPass(model, FP32).learn(batch, torch.autograd.backward)) == 0.0


@pytest.mark.parametrize(
    ("family", "settings", "targets", "why"),
    [
        ("Bloom", {"n_layer": 2, "n_head": 4}, "all-linear", "see each other"),
        ("Mamba", {"num_hidden_layers": 2, "state_size": 4}, ["in_proj"], "linear_attention"),
    ],
)
def test_a_family_that_needs_its_rows_apart_keeps_padding_and_says_why(
    family: str, settings: dict[str, Any], targets: Any, why: str, tiny_model: Path, tmp_path: Path
) -> None:
    config = getattr(transformers, f"{family}Config")(**settings, hidden_size=32, vocab_size=300)
    base = getattr(transformers, f"{family}ForCausalLM")(config)
    model = adapted(base, spec_of(lora={"target_modules": targets}))
    learner = Learner(model=model, tokenizer=load_tokenizer(str(tiny_model)), precision=FP32)
    checks = CheckCache(folder=tmp_path, about=[])
    for _ in range(2):  # a fault is not known: the next one looks for it again
        forward, said = forward_pass(learner, spec_of(), 40, checks=checks)
        assert isinstance(forward, PaddedPass) and said is not None and why in said


@pytest.mark.long
def test_a_base_is_tried_once_for_jobs_that_adapt_it_alike(tiny_model: Path, tmp_path: Path) -> None:
    checks, passes = CheckCache(folder=tmp_path, about=[]), list[int]()
    tokenizer = load_tokenizer(str(tiny_model))

    def tried(longest: int = 40, **lora: Any) -> int:
        spec, before = spec_of(lora=lora), len(passes)
        model = adapted(load_base(str(tiny_model), Method.LORA, "cpu", FP32), spec)
        with model.get_base_model().model.register_forward_hook(lambda *_: passes.append(1)):
            learner = Learner(model=model, tokenizer=tokenizer, precision=FP32)
            forward, why = forward_pass(learner, spec, longest, checks=checks)
        assert isinstance(forward, LeanPass) and why is None
        return len(passes) - before

    assert tried() > 0
    assert tried(r=8, lora_alpha=64) == 0 == tried(longest=100)
    assert tried(target_modules=["q_proj"]) > 0 and tried(use_dora=True) > 0
    assert tried(use_dora=True) == 0


@pytest.mark.long
def test_a_held_out_loss_has_no_part_for_a_router() -> None:
    model = adapted(base_of("Mixtral"), spec_of())
    with evaluating(model):
        plain = LeanPass(model, FP32).held_out_loss(rows(3))
        model.config.output_router_logits = True
        assert PaddedPass(model, PAD).held_out_loss(rows(3)) == pytest.approx(plain, rel=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("fuses", [True, False])
@pytest.mark.parametrize(
    ("family", "drawn"),
    [("Starcoder2", "residual_dropout"), ("Mixtral", "router_jitter_noise"), ("GPT2", "resid_pdrop")],
)
def test_a_base_that_draws_random_numbers_itself_draws_them_again_in_a_recomputed_block(
    family: str, drawn: str, fuses: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    off = {"attention_dropout": 0.0, "residual_dropout": 0.0, "embedding_dropout": 0.0}
    monkeypatch.setitem(FAMILIES, family, {**FAMILIES.get(family, off), drawn: 0.1})
    spec = spec_of(lora={"lora_dropout": 0.2, "target_modules": TARGETS.get(family, ["q_proj", "v_proj"])})

    def passed(every: int) -> tuple[float, list[torch.Tensor]]:
        forward = LeanPass(without_stopping(base_of(family), spec), FP32, fuses=fuses)
        if every:
            forward.recompute_blocks(every)
        set_seed(3)
        return learned(forward, rows(5))

    assert draws(base_of(family))
    (loss, gradients), again = passed(0), passed(1)
    assert again[0] == loss and all(torch.equal(*pair) for pair in zip(again[1], gradients, strict=True))
    set_seed(4)
    forward = LeanPass(without_stopping(base_of(family), spec), FP32, fuses=fuses)
    assert learned(forward, rows(5))[0] != loss


TARGETS = {"GPT2": ["c_attn", "c_fc"]}


def without_stopping(base: Any, spec: JobSpec) -> Any:
    """An adapted model that draws, as a kind of training may ask for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora, "stop_draws", lambda base: None)
        return adapted(base, spec)


@pytest.mark.parametrize("kind", ["default", "dynamic", "longrope"])
def test_positions_that_turn_by_the_longest_row_are_the_model_s_own(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 32}
    turned = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, **(factors if kind == "longrope" else {})}
    monkeypatch.setitem(FAMILIES, "Llama", {"rope_parameters": turned, "max_position_embeddings": 32})
    model = adapted(base_of("Llama"), spec_of())
    assert max(len(row.input_ids) for row in rows(5)) > 32
    forward = LeanPass(model, FP32)
    assert forward.fuses and apart(learned(forward, rows(5)), learned(PaddedPass(model, PAD), rows(5))) < 1e-5


@pytest.mark.parametrize("more", [{}, {"modules_to_save": ["norm", "lm_head"]}])
@pytest.mark.parametrize(
    ("family", "experts", "fuses"), [("Mixtral", 4, False), ("JetMoe", 4, True), ("Llama", 0, True)]
)
def test_only_plain_linear_layers_are_fused(
    family: str, experts: int, fuses: bool, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And none that is trained itself."""
    monkeypatch.setitem(FAMILIES, family, {"num_local_experts": experts} if experts else {})
    targets: Any = ["kv_proj"] if family == "JetMoe" else "all-linear"
    model = adapted(base_of(family), spec_of(lora={"target_modules": targets, **more}))
    forward = LeanPass(model, FP32)
    assert forward.fuses == fuses
    ours, theirs = learned(forward, rows(5)), learned(PaddedPass(model, PAD), rows(5))
    assert apart(ours, theirs) < 1e-5
    assert len(ours[1]) == sum(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("family", ["Llama", "Granite"])
def test_no_logits_are_held_that_nobody_needs_any_more(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the head widens its weight: not beside scaled ones, and not in the decoder's backward pass."""
    monkeypatch.setattr(wide, "multiplies_wide", lambda: True)
    forward = LeanPass(adapted(base_of(family).bfloat16(), spec_of(), BF16), BF16)
    softmax, held = torch.softmax, list[int]()
    some = rows(30)
    words = SMALL["vocab_size"]
    assert learned_in(some) > HEAD_CHUNK

    def as_large() -> set[int]:
        """Where tensors lie that are as large as a chunk of logits."""
        places = [thing.untyped_storage() for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
        return {place.data_ptr() for place in places if place.nbytes() > 4 * 180 * words}

    def look(*_: Any) -> None:
        held.append(len(as_large() - before))

    def looked_at(logits: torch.Tensor, *how: Any, **more: Any) -> torch.Tensor:
        if logits.shape[-1] == words:
            look()
        return softmax(logits, *how, **more)

    before = as_large()
    monkeypatch.setattr(torch, "softmax", looked_at)
    forward.model.get_base_model().get_submodule("model.layers.1.mlp.down_proj").register_full_backward_hook(look)
    learned(forward, some)
    assert held == [1, 1, 0]


def test_rows_are_scored_alike(tiny_model: Path) -> None:
    model = adapted(load_base(str(tiny_model), Method.LORA, "cpu", FP32), spec_of())
    tokenizer = load_tokenizer(str(tiny_model))
    some = [TokenRow(number=r.number, input_ids=[*r.input_ids, 2], labels=[*r.labels, 2]) for r in rows(9)]
    with evaluating(model):
        ours = score_rows(model, tokenizer, some, 4, scorer=LeanPass(model, FP32))
        theirs = score_rows(model, tokenizer, some, 4)
    for name in ("loss", "tokens", "stop_loss", "stops", "right"):
        assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=1e-5), name
    assert ours.stops.sum() > 0


@pytest.mark.long
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_lean_training_ends_where_an_exact_one_does(recipe: Recipe, tmp_path: Path, method: str) -> None:
    told = {}
    for name in ("lean", "exact"):
        asked = {"dtype": "float32", "exact": name == "exact", "lora": {"lora_dropout": 0.0}, "max_steps": 6}
        ended, told[name] = recipe(
            name, method=method, eval_steps=3, evaluation={"samples": 0, "metrics": ["loss"]}, **asked
        )
        assert ended.reason is Reason.OK
    for metric in ("loss", "eval_loss"):
        lean, exact = (losses(told[name], metric) for name in ("lean", "exact"))
        assert lean == pytest.approx(exact, rel=1e-5) and len(lean) > 1
    reports = [json.loads((tmp_path / name / "result" / "report.json").read_text()) for name in told]
    lean_loss, exact_loss = (report["evaluation"]["metrics"][0]["tuned"] for report in reports)
    assert lean_loss == pytest.approx(exact_loss, rel=1e-4)
    assert not [m for m in told["lean"] if isinstance(m, Note) and m.kind == "engine"]


@pytest.mark.long
def test_a_model_in_which_packed_examples_see_each_other_is_refused() -> None:
    padded, packs = _padded(), pack(rows(2), 64)
    check_apart(padded, packs)
    own = padded.model.get_base_model()
    forward = own.forward
    own.forward = lambda position_ids=None, **rest: forward(**rest)  # as a model that does not look at positions
    with pytest.raises(TrainingFailed, match="packed examples see each other") as failure:
        check_apart(padded, packs)
    assert failure.value.reason is Reason.BAD_SPEC


def _padded() -> PaddedPass:
    return PaddedPass(adapted(base_of("Llama"), spec_of()), PAD)


def _by_position(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, position_ids: Any, **how: Any
) -> tuple[torch.Tensor, None]:
    """Attention in place of FlashAttention 2's, called by transformers' own rule for rows of several examples."""
    lengths = [query.shape[2]]
    if _is_packed_sequence(position_ids, len(query)):
        borders = [*(position_ids[0] == 0).nonzero()[:, 0].tolist(), query.shape[2]]
        lengths = [end - begin for begin, end in itertools.pairwise(borders)]
    parts = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
    attend = torch.nn.functional.scaled_dot_product_attention
    rows = [attend(*part, is_causal=True, scale=how["scaling"], enable_gqa=True) for part in parts]
    return torch.cat(rows, dim=2).transpose(1, 2), None


def test_attention_of_a_model_s_own_is_refused_however_little_rows_move_logits() -> None:
    """BLOOM's are too large for another row in sight to stand out from rounding."""
    config = transformers.BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=4)
    torch.manual_seed(0)
    model = add_adapter(transformers.BloomForCausalLM(config), spec_of(), Method.LORA)
    assert rows_together(LeanPass(model, FP32), 40) == "the model's attention is code of its own"


def test_packed_rows_are_apart_where_positions_count_in_a_batch_of_one_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    padded, packs = _padded(), pack(rows(7), 64)
    expected = learned(padded, packs)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "flash_attention_2", _by_position)
    monkeypatch.setattr(padded.model.config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(TrainingFailed, match="packed examples see each other"):
        check_apart(padded, packs)  # in the form in which rows pass, which is several at once
    flash = PaddedPass(padded.model, PAD)
    check_apart(flash, packs)
    assert len(packs) > 1 and apart(learned(flash, packs), expected) < 1e-5


@pytest.mark.long
def test_the_history_says_why_rows_are_padded_and_each_message_how_far_the_evaluation_is(recipe: Recipe) -> None:
    _, told = recipe(max_steps=1, neftune_noise_alpha=5, evaluation={"samples": 1, "max_new_tokens": 2})
    far = [(m.evaluated, m.to_evaluate) for m in told if isinstance(m, Stepped) and m.to_evaluate is not None]
    assert far == sorted(far) and far[0][0] < far[0][1] == far[-1][0]
    (said,) = [m.text for m in told if isinstance(m, Note) and m.kind == "engine"]
    assert said == "trains with padded rows: NEFTune's noise is made for padded rows"


def test_a_model_that_proves_to_need_padding_is_planned_anew_with_it(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(choice, "rows_together", lambda *_: "rows behind each other would see each other in this model")
    keys = {"max_steps": 1, "dtype": "float32", "evaluation": {"samples": 0, "metrics": ["loss"]}}
    ended, told = recipe(cache_dir=tmp_path, **keys)  # no other test has tried the base there
    assert ended.reason is Reason.OK
    lean, padded = [m.lora for m in told if isinstance(m, Planned) and m.base is None]
    assert lean and padded and padded > lean
    said = [m.text for m in told if isinstance(m, Note) and m.kind in ("engine", "plan")]
    assert said[0].startswith("trains with padded rows: rows behind each other would see")
    assert said[1:] == [f"with padded rows it needs {gib(padded)} GiB by its plan, not {gib(lean)}"]


@pytest.mark.long
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (9, 3)])
def test_short_rows_attend_in_bf16_as_in_fp32(heads: tuple[int, int]) -> None:
    """The answer and all three gradients, against torch's kernel in fp32 on each row alone."""
    lengths, width, drawn = (1, 33, 70, 7), 16, torch.Generator().manual_seed(0)
    count = sum(lengths)
    states = [torch.randn(1, n, count, width, generator=drawn) for n in (heads[0], heads[1], heads[1])]
    given = torch.randn(1, count, heads[0], width, generator=drawn)
    ours = [state.bfloat16().requires_grad_() for state in states]
    answer = ShortRows.apply(*ours, lengths, 0.3)
    answer.backward(given.bfloat16())
    theirs = [state.bfloat16().float().requires_grad_() for state in states]
    rows = zip(*(state.split(lengths, 2) for state in theirs), strict=True)
    attend = torch.nn.functional.scaled_dot_product_attention
    expected = torch.cat([attend(*row, is_causal=True, scale=0.3, enable_gqa=True) for row in rows], 2).transpose(1, 2)
    expected.backward(given.bfloat16().float())
    pairs = [(answer, expected), *((a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))]
    assert all(mine.dtype == torch.bfloat16 and mine.shape == other.shape for mine, other in pairs)
    assert max(float((a.float() - b).detach().norm() / b.detach().norm()) for a, b in pairs) < 0.01


@pytest.mark.long
def test_a_lean_step_in_bf16_attends_by_products_and_is_as_near_to_fp32(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(precision: Precision) -> tuple[float, list[torch.Tensor]]:
        torch.manual_seed(0)  # of the first factor
        model = adapted(load_base(str(tiny_model), Method.LORA, "cpu", precision), spec_of(), precision)
        return learned(LeanPass(model, precision), rows(7))

    exact, products = step(FP32), step(BF16)
    monkeypatch.setattr(row_module, "SHORT", 0)
    kernel = step(BF16)
    assert 0 < apart(products, exact) < 1.2 * apart(kernel, exact) and apart(products, kernel) > 0
