"""A pack of several trainings: each is what it would be alone, bit for bit, whatever happens to the others."""

from __future__ import annotations

import gc
import itertools
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM, TrainerCallback

from loractl.common.job.method import Method
from loractl.worker.base.arithmetic import compute_in, evaluating
from loractl.worker.base.lora import add_adapter
from loractl.worker.base.model import load_base
from loractl.worker.data.tokens import IGNORED, TokenRow
from loractl.worker.engine.loop import run
from loractl.worker.engine.member import MemberRows, PackMember
from loractl.worker.engine.pack import Ending, Pack
from loractl.worker.engine.passes import rows as rows_apart
from loractl.worker.engine.passes.choice import shared_base
from loractl.worker.engine.passes.shared import SharedBase, SharedPass
from loractl.worker.engine.relay import Relay
from loractl.worker.engine.streams import RandomStreams

from ..models import make_tiny_model
from .test_engine import Case, Course, Watch

MUTE = 2  # the seed of a training that learns nothing of some rows

Settings = tuple[dict[str, Any], dict[str, Any]]  # of a job's lora section, and of its training section


def rows(count: int, seed: int, *, mute: bool = False, lengths: range = range(33, 61)) -> list[TokenRow]:
    """Rows of `lengths` tokens; with `mute`, nothing is learned of every third one."""
    taken = [lengths[(n * 17 + seed * 5) % len(lengths)] for n in range(count)]
    ids = [[3 + (n * 37 + at * 11 + seed) % 250 for at in range(length)] for n, length in enumerate(taken)]
    return [
        TokenRow(number=n, input_ids=row, labels=[IGNORED] * unlearned + row[unlearned:])
        for n, row in enumerate(ids)
        for unlearned in [len(row) if mute and n % 3 == 1 else len(row) // 3]
    ]


class Lab:
    """One base, and trainings on it."""

    def __init__(self, model: Path, folder: Path, method: str, dtype: str, **training: Any) -> None:
        self._model, self._folder, self._method, self._dtype = model, folder, method, dtype
        self._training, self._numbers = training, itertools.count()
        self.lengths = range(33, 61)  # tokens of a row
        self.base = self.load()

    def load(self) -> SharedBase:
        case = self._case("base", ({}, {}))
        shared = shared_base(load_base(str(self._model), Method(self._method), "cpu", case.precision), case.precision)
        assert shared is not None
        return shared

    def member(
        self,
        name: str,
        settings: Settings,
        course: Course,
        *more: TrainerCallback,
        resume: Path | None = None,
        streams: RandomStreams | None = None,
    ) -> PackMember:
        """A training on the lab's base. Members of one name and seed are the same training."""
        case = self._case(name, settings)
        streams = streams or RandomStreams(torch.device("cpu"))
        streams.take_over()
        torch.manual_seed(case.spec.training.seed)
        model = add_adapter(self.base.view(), case.spec, Method(self._method))
        for parameter in (p for n, p in model.named_parameters() if "lora_B" in n):
            parameter.data.normal_(std=0.05)  # else the first factor has no gradient in the first step
        compute_in(model, case.precision)
        seed = case.spec.training.seed
        forward = SharedPass(self.base, model, case.spec.training.label_smoothing_factor, streams)
        learned = MemberRows(
            train=rows(9, seed, mute=seed == MUTE, lengths=self.lengths),
            held_out=rows(5, seed + 100, lengths=self.lengths),
        )
        member = PackMember(forward, case.arguments(), learned, (Watch(course), *more))
        if resume is not None:
            member.resume(resume)
        return member

    def alone(self, name: str, settings: Settings, *more: TrainerCallback) -> Course:
        course = Course()
        run([self.member(name, settings, course, *more)])
        return course

    def _case(self, name: str, settings: Settings) -> Case:
        training = {"dtype": self._dtype, "exact": False, "learning_rate": 0.01, "max_steps": 6, **self._training}
        return Case(
            self._model,
            self._folder / f"{name}-{next(self._numbers)}",
            self._method,
            settings[0],
            {**training, **settings[1]},
        )


def lead(pack: Pack, until: Callable[[], bool] = lambda: False) -> list[Ending]:
    endings: list[Ending] = []
    while pack.members and not until():
        endings += pack.step()
    return endings


def same(ours: Course, theirs: Course, steps: int | None = None) -> None:
    assert ours.log[:-1] == theirs.log[:-1]
    same_gradients(ours, theirs, steps)
    assert ours.weights.keys() == theirs.weights.keys() and len(ours.weights) > 0
    assert all(torch.equal(weight, theirs.weights[key]) for key, weight in ours.weights.items())


def same_gradients(ours: Course, theirs: Course, steps: int | None = None) -> None:
    pairs = list(zip(ours.gradients[:steps], theirs.gradients[:steps], strict=True))
    assert pairs and all(float(torch.cat([g.flatten() for g in mine]).norm()) > 0 for mine, _ in pairs)
    assert all(torch.equal(a, b) for mine, other in pairs for a, b in zip(mine, other, strict=True))


MEMBERS: dict[str, Settings] = {
    "evaluated": (
        {"r": 4, "lora_dropout": 0.1}, {"seed": 1, "eval_steps": 2, "train_sampling_strategy": "group_by_length"},
    ),
    "accumulating": (
        {"r": 8, "target_modules": ["q_proj", "down_proj"], "use_rslora": True},
        {"seed": MUTE, "gradient_accumulation_steps": 3, "per_device_train_batch_size": 1, "max_steps": 3},
    ),
    "large": (
        {"r": 16, "lora_dropout": 0.3},
        {"seed": 3, "per_device_train_batch_size": 3, "label_smoothing_factor": 0.1},
    ),
    "DoRA": ({"r": 2, "use_dora": True, "target_modules": ["v_proj"]}, {"seed": 4, "max_steps": 3}),
}  # fmt: skip

BASES: dict[str, dict[str, Any]] = {
    "lora in fp32": {"method": "lora", "dtype": "float32"},
    "lora in bf16, checkpointing": {"method": "lora", "dtype": "bfloat16", "gradient_checkpointing": True},
    "nf4": {"method": "qlora", "dtype": "bfloat16"},
    "nf4, checkpointing": {"method": "qlora", "dtype": "bfloat16", "gradient_checkpointing": True},
}


@pytest.mark.parametrize("base", BASES)
def test_a_member_is_what_it_would_be_alone_whoever_comes_and_goes(tiny_model: Path, tmp_path: Path, base: str) -> None:
    """Over the ends of epochs, with one that joins late, one that leaves early, one whose weights are no numbers."""
    lab = Lab(tiny_model, tmp_path, **BASES[base])
    alone = {name: lab.alone(name, settings) for name, settings in MEMBERS.items()}
    together = {name: Course() for name in [*MEMBERS, "gone", "poisoned"]}
    pack = Pack()
    for name in ("evaluated", "accumulating"):
        pack.join(lab.member(name, MEMBERS[name], together[name]))
    gone = lab.member("gone", MEMBERS["large"], together["gone"])
    pack.join(gone)
    poisoned = lab.member("poisoned", ({}, {"seed": 9, "max_steps": 2}), together["poisoned"])
    next(p for n, p in poisoned.model.named_parameters() if "lora_B" in n).data.fill_(torch.nan)
    pack.join(poisoned)
    assert pack.step() == []
    pack.join(lab.member("large", MEMBERS["large"], together["large"]))
    assert pack.step() == [Ending(member=poisoned, error=None)]
    pack.leave(gone)
    pack.join(lab.member("DoRA", MEMBERS["DoRA"], together["DoRA"]))
    endings = lead(pack)
    assert len(endings) == len(MEMBERS) and not [ending.error for ending in endings if ending.error]
    for name, course in alone.items():
        same(together[name], course)
    assert not bool(torch.isfinite(together["poisoned"].gradients[0][0]).all())


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough that a processor with tiles adds up a row's products in pieces, by the number of rows."""
    folder = make_tiny_model(tmp_path_factory.mktemp("models") / "wide", layers=1, hidden=1152, biases=True)
    model = LlamaForCausalLM.from_pretrained(folder)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("base", ["lora in bf16, checkpointing", "nf4"])
def test_products_of_a_wide_base_are_those_of_a_training_alone(wide_model: Path, tmp_path: Path, base: str) -> None:
    """Of layers that all adapt, that some adapt, and that nobody adapts."""
    _same_together(Lab(wide_model, tmp_path, **BASES[base], max_steps=2))


@pytest.mark.parametrize("base", ["lora in fp32", "nf4"])
def test_a_micro_batch_of_a_few_tokens_is_what_it_would_be_alone(tiny_model: Path, tmp_path: Path, base: str) -> None:
    """A library has kernels of its own for a few rows."""
    lab = Lab(tiny_model, tmp_path, **BASES[base], max_steps=2)
    lab.lengths = range(2, 4)
    _same_together(lab)


@pytest.mark.parametrize("base", ["lora in fp32", "lora in bf16, checkpointing"])
def test_experts_see_the_tokens_of_one_training_at_a_time(tmp_path: Path, base: str) -> None:
    folder = make_tiny_model(tmp_path / "experts")
    sizes = {"hidden_size": 1152, "moe_intermediate_size": 768, "head_dim": 64, "vocab_size": 400}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    experts = Qwen3MoeConfig(num_experts=4, num_experts_per_tok=2, mlp_only_layers=[], **sizes, **heads)
    Qwen3MoeForCausalLM(experts).save_pretrained(folder)
    _same_together(Lab(folder, tmp_path, **BASES[base], max_steps=2))


def test_how_a_row_attends_does_not_depend_on_the_rows_of_others(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 33 to 60 tokens, some by plain products and some by the fused kernel."""
    monkeypatch.setattr(rows_apart, "SHORT", 45)
    _same_together(Lab(tiny_model, tmp_path, **BASES["lora in bf16, checkpointing"], max_steps=2))


def _same_together(lab: Lab) -> None:
    members: dict[str, Settings] = {
        f"{rows} rows": (
            {"target_modules": ["q_proj", "v_proj", *more]},
            {"seed": 5 + rows, "per_device_train_batch_size": rows},
        )
        for rows, more in ((1, ["k_proj"]), (2, []), (4, []))
    }
    alone = {name: lab.alone(name, settings) for name, settings in members.items()}
    together, passes = {name: Course() for name in members}, list[int]()
    learn = lab.base.learn
    lab.base.learn = lambda pieces, **how: passes.append(len(pieces)) or learn(pieces, **how)  # type: ignore[method-assign, func-returns-value]
    run([lab.member(name, settings, together[name]) for name, settings in members.items()])
    for name, course in alone.items():
        same(together[name], course)
    assert passes == [3, 3]  # none that failed was made up for by halves


@pytest.mark.parametrize("base", ["lora in bf16, checkpointing", "nf4"])
def test_a_checkpoint_is_resumed_in_another_pack_bit_for_bit(tiny_model: Path, tmp_path: Path, base: str) -> None:
    lab = Lab(tiny_model, tmp_path, **BASES[base], save_steps=4)
    whole, rest, other = Course(), Course(), Course()
    settings = MEMBERS["evaluated"]
    saved = lab.member("whole", settings, whole)
    run([saved, lab.member("beside", MEMBERS["large"], other)])
    lab.base = lab.load()  # in another process it is another one
    pack = Pack()
    pack.join(lab.member("new", MEMBERS["accumulating"], Course()))
    pack.step()
    resumed = lab.member("rest", settings, rest, resume=Path(saved.args.output_dir) / "checkpoint-4")
    pack.join(resumed)
    lead(pack)
    assert rest.log[:-1] == whole.log[:-1] and len(rest.gradients) == 2
    assert all(torch.equal(weight, whole.weights[key]) for key, weight in rest.weights.items())


class Shortage:
    """Takes the memory away of every backward pass over more than so many tokens, when half of it is done."""

    def __init__(self, base: SharedBase, most: int) -> None:
        self._most, self.met = most, 0
        block = base._words.get_submodule("model.layers.1.mlp.down_proj")
        block.register_full_backward_hook(self._fail)

    def _fail(self, module: Any, inputs: Any, outputs: Any) -> None:
        if outputs[0].shape[-2] > self._most:
            self.met += 1
            raise torch.OutOfMemoryError("no room for a pass of all")


def test_a_pass_without_memory_is_tried_again_in_halves_and_who_fails_alone_ends_alone(
    tiny_model: Path, tmp_path: Path
) -> None:
    """Dropout draws, and gradients of a window half done, are those of a pass that never failed."""
    lab = Lab(tiny_model, tmp_path, **BASES["lora in fp32"])
    alone = {name: lab.alone(name, MEMBERS[name]) for name in ("evaluated", "accumulating")}
    together = {name: Course() for name in [*alone, "large"]}
    shortage = Shortage(lab.base, most=130)  # three rows of the large one are more
    pack = Pack()
    for name in together:
        pack.join(lab.member(name, MEMBERS[name], together[name]))
    large = pack.members[-1]
    (first,) = pack.step()
    assert first.member is large and isinstance(first.error, torch.OutOfMemoryError)
    assert shortage.met == 3, "all, the half with the large one, and that alone: each once"
    assert not [ending for ending in lead(pack) if ending.error]
    for name, course in alone.items():
        same(together[name], course)


class End(TrainerCallback):
    """Stops a training in the middle of a window, with a checkpoint."""

    def __init__(self, step: int, piece: int) -> None:
        self._place, self._seen = (step, piece), (0, 0)

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        step, piece = self._seen
        self._seen = (state.global_step, piece + 1 if step == state.global_step else 1)
        if self._seen == self._place:
            control.should_training_stop = control.should_save = True


def test_a_stop_between_micro_batches_leaves_a_checkpoint_that_resumes_bit_for_bit(
    tiny_model: Path, tmp_path: Path
) -> None:
    lab = Lab(tiny_model, tmp_path, **BASES["lora in fp32"])
    strategy = {"train_sampling_strategy": "group_by_length", "max_steps": 5}
    settings = ({"lora_dropout": 0.2}, {**MEMBERS["accumulating"][1], **strategy})
    whole, rest = lab.alone("whole", settings), Course()
    stopped = lab.member("stopped", settings, Course(), End(step=3, piece=2))  # at the end of an epoch
    run([stopped])
    assert stopped.state.global_step == 3
    run([lab.member("rest", settings, rest, resume=Path(stopped.args.output_dir) / "checkpoint-3")])
    assert rest.log[:-1] == whole.log[:-1]
    assert all(torch.equal(weight, whole.weights[key]) for key, weight in rest.weights.items())


def test_an_evaluation_of_one_changes_no_gradient_of_others(tiny_model: Path, tmp_path: Path) -> None:
    """bitsandbytes repacks an NF4 layer's weights on its first forward in eval mode, and gradients are wrong then."""
    lab = Lab(tiny_model, tmp_path, **BASES["nf4"])
    weights = [p.detach().clone() for p in lab.base.model.parameters()]
    settings: Settings = ({"r": 4}, {"max_steps": 4, "logging_steps": 1})
    alone, beside, evaluated = lab.alone("alone", settings), Course(), Course()
    pack = Pack()
    pack.join(lab.member("beside", settings, beside))
    pack.join(lab.member("evaluated", ({}, {"eval_steps": 1, "max_steps": 3}), evaluated))
    lead(pack)
    assert sum("eval_loss" in line for line in evaluated.log) == 3
    same(beside, alone)
    assert all(torch.equal(a, b) for a, b in zip(weights, lab.base.model.parameters(), strict=True))


def test_an_evaluation_is_sliced_between_the_steps_of_others(tiny_model: Path, tmp_path: Path) -> None:
    lab = Lab(tiny_model, tmp_path, **BASES["lora in fp32"])
    pack, beside = Pack(), Course()
    pack.join(lab.member("beside", ({}, {"max_steps": 8}), beside))
    evaluated = lab.member("evaluated", ({}, {"max_steps": 2, "eval_steps": 1}), Course())
    evaluated.args.per_device_eval_batch_size = 1  # five rows are held out
    pack.join(evaluated)
    lead(pack, until=lambda: evaluated.state.global_step == 2)
    assert len(beside.gradients) == 1 + 5 + 1


def test_members_that_need_padding_train_beside_the_others(tiny_model: Path, tmp_path: Path) -> None:
    """In exact mode a member equals the Trainer, in a pack too."""
    lab = Lab(tiny_model, tmp_path, **BASES["lora in fp32"])
    exact = Case(tiny_model, tmp_path / "exact", "lora", {"lora_dropout": 0.2}, {"gradient_accumulation_steps": 2})
    theirs, ours = exact.by_trainer(), Course()
    pack = Pack()
    pack.join(lab.member("lean", MEMBERS["large"], Course()))
    pack.join(exact.member(Watch(ours)))
    lead(pack)
    same(ours, theirs)


def test_nothing_of_a_member_stays_in_the_base(tiny_model: Path, tmp_path: Path) -> None:
    lab = Lab(tiny_model, tmp_path, **BASES["lora in fp32"])
    member = lab.member("a", MEMBERS["large"], Course())
    run([member])
    tensors = [weakref.ref(parameter) for parameter in member.trained]
    del member
    gc.collect()
    assert tensors and not [ref for ref in tensors if ref() is not None]


def test_trainings_in_threads_take_turns_and_are_what_they_would_be_alone(tiny_model: Path, tmp_path: Path) -> None:
    """With an evaluation after each, of which the others wait for a slice at a time, and one that fails."""
    lab = Lab(tiny_model, tmp_path, **BASES["lora in fp32"])
    names = ("evaluated", "accumulating", "large")
    alone = {name: lab.alone(name, MEMBERS[name]) for name in names}
    together, relay, failed = {name: Course() for name in names}, Relay(), []

    def train(name: str) -> None:
        with relay.leg(torch.device("cpu")) as leg:
            member = lab.member(name, MEMBERS[name], together[name], streams=leg.streams)
            leg.train(member)
            for row in member.rows.held_out:
                with evaluating(member.model):
                    member.forward.held_out_loss([row])
                torch.rand(7)  # generating answers draws, too
                leg.pause()

    def fail() -> None:
        with relay.leg(torch.device("cpu")) as leg:
            member = lab.member("failing", ({}, {"seed": 9}), Course(), Failing(), streams=leg.streams)
            try:
                leg.train(member)
            except ZeroDivisionError:
                failed.append(leg)

    threads = [threading.Thread(target=train, args=(name,)) for name in names] + [threading.Thread(target=fail)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not [thread for thread in threads if thread.is_alive()] and len(failed) == 1
    for name, course in alone.items():
        same(together[name], course)


class Failing(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            raise ZeroDivisionError
