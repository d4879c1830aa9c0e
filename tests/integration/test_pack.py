"""Several trainings on one base: each is what it would be alone, bit for bit, whatever happens to the others."""

from __future__ import annotations

import gc
import itertools
import json
import random
import threading
import time
import weakref
from collections.abc import Callable, Sequence
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
from loractl.worker.engine.engine import Engine, Session
from loractl.worker.engine.loop import MemberRows, TrainingLoop
from loractl.worker.engine.passes import attention as rows_apart
from loractl.worker.engine.passes import wide
from loractl.worker.engine.passes.choice import shared_base
from loractl.worker.engine.passes.shared import SharedBase, SharedPass
from loractl.worker.recipe.kinds import trained_kind

from ..models import make_tiny_model
from .test_engine import Case, Course, Watch
from .test_loss import Preference, pairs, plainly, preference

CPU = torch.device("cpu")

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
        self.beta: dict[str, float] = {}  # of the trainings by name that learn preferences
        self.base = self.load()

    def load(self) -> SharedBase:
        case = self._case("base", ({}, {}))
        shared = shared_base(load_base(str(self._model), Method(self._method), "cpu", case.precision), case.precision)
        assert shared is not None
        return shared

    def loop(
        self, session: Session, name: str, settings: Settings, course: Course, *more: TrainerCallback
    ) -> TrainingLoop:
        """A training on the lab's base. Those of one name and seed are the same training."""
        case = self._case(name, settings)
        seed, loss = case.spec.training.seed, trained_kind(case.spec).loss(case.spec)
        learned = MemberRows(
            train=rows(9, seed, mute=seed == MUTE, lengths=self.lengths),
            held_out=rows(5, seed + 100, lengths=self.lengths),
        )
        if name in self.beta:
            learned = MemberRows(train=pairs(9, seed, self.lengths), held_out=pairs(5, seed + 100, self.lengths))
            loss = preference([*learned.train, *learned.held_out], self.beta[name])

        def made() -> SharedPass:
            torch.manual_seed(seed)
            model = add_adapter(self.base.view(), case.spec, Method(self._method))
            for parameter in (p for n, p in model.named_parameters() if "lora_B" in n):
                parameter.data.normal_(std=0.05)  # else the first factor has no gradient in the first step
            compute_in(model, case.precision)
            return SharedPass(self.base, model, session.streams, loss=loss)

        return TrainingLoop(session, session.run(made), case.arguments(), learned, (Watch(course), *more))

    def alone(self, name: str, settings: Settings, *more: TrainerCallback) -> Course:
        course = Course()
        with Engine().session(CPU) as session:
            self.loop(session, name, settings, course, *more).run()
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


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class Together:
    """Trainings of one engine, each in a thread of its own."""

    def __init__(self, lab: Lab, patience: float = 200.0) -> None:
        """Whoever was in a pass is waited for: which ones meet does not hang on how busy the machine is."""
        self.engine, self._lab = Engine(patience=patience), lab
        self.failed: dict[str, BaseException] = {}
        self.passes: list[int] = []  # of how many each was, tried again ones too
        self._threads: list[threading.Thread] = []
        learn = lab.base.learn
        lab.base.learn = lambda pieces, **how: self.passes.append(len(pieces)) or learn(pieces, **how)  # type: ignore[method-assign, func-returns-value]

    def start(
        self,
        name: str,
        settings: Settings,
        course: Course,
        *more: TrainerCallback,
        resume: Path | None = None,
        change: Callable[[TrainingLoop], None] = lambda loop: None,
        delay: Callable[[], None] = lambda: None,
    ) -> None:
        """Train in a thread. `delay` is called before each micro-batch."""
        self.start_as(
            name, lambda session: self._lab.loop(session, name, settings, course, *more), resume, change, delay
        )

    def start_as(
        self,
        name: str,
        make: Callable[[Session], TrainingLoop],
        resume: Path | None = None,
        change: Callable[[TrainingLoop], None] = lambda loop: None,
        delay: Callable[[], None] = lambda: None,
    ) -> None:
        def train() -> None:
            try:
                with self.engine.session(CPU) as session:
                    loop, learn = make(session), session.learn
                    change(loop)
                    if resume is not None:
                        loop.resume(resume)
                    session.learn = lambda *of: (delay(), learn(*of))[1]  # type: ignore[method-assign, func-returns-value]
                    loop.run()
            except Exception as error:  # noqa: BLE001  looked at by the test
                self.failed[name] = error

        self._threads.append(threading.Thread(target=train, name=name))
        self._threads[-1].start()

    def meeting(self, count: int) -> Callable[[], None]:
        """A delay that lets the first micro-batches of so many trainings wait for the engine at the same time."""
        met = threading.Barrier(count, action=lambda: self._hold(count))
        seen = set[threading.Thread]()

        def delay() -> None:
            if threading.current_thread() not in seen:
                seen.add(threading.current_thread())
                met.wait(60)

        return delay

    def _hold(self, count: int) -> None:
        begun = threading.Event()

        def wait() -> None:
            begun.set()
            wait_for(lambda: self.engine.waiting >= count)

        def hold() -> None:
            with self.engine.session(CPU) as session:
                session.run(wait)

        self._threads.append(threading.Thread(target=hold))
        self._threads[-1].start()
        assert begun.wait(60)

    def end(self) -> None:
        for thread in self._threads:
            thread.join(timeout=120)
        assert not [thread for thread in self._threads if thread.is_alive()]


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
    courses = {name: Course() for name in [*MEMBERS, "gone", "poisoned"]}
    together, begun = Together(lab), threading.Event()
    for name in ("evaluated", "accumulating"):
        together.start(name, MEMBERS[name], courses[name], At(1, begun.set))
    together.start("gone", MEMBERS["large"], courses["gone"], Failing())
    together.start("poisoned", ({}, {"seed": 9, "max_steps": 2}), courses["poisoned"], change=poison)
    assert begun.wait(60)
    for name in ("large", "DoRA"):
        together.start(name, MEMBERS[name], courses[name])
    together.end()
    assert together.failed.keys() == {"gone"} and isinstance(together.failed["gone"], ZeroDivisionError)
    for name, course in alone.items():
        same(courses[name], course)
    assert not bool(torch.isfinite(courses["poisoned"].gradients[0][0]).all())
    assert max(together.passes) > 2


def poison(loop: TrainingLoop) -> None:
    next(p for n, p in loop.model.named_parameters() if "lora_B" in n).data.fill_(torch.nan)


class At(TrainerCallback):
    """Calls something at the end of a step."""

    def __init__(self, step: int, call: Callable[[], None]) -> None:
        self._step, self._call = step, call

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self._step:
            self._call()


@pytest.mark.parametrize("base", ["lora in bf16, checkpointing", "nf4"])
def test_which_trainings_meet_in_a_pass_decides_nothing(tiny_model: Path, tmp_path: Path, base: str) -> None:
    """Each asks when it likes, and nobody waits: passes are of those that happen to meet."""
    lab, chance = Lab(tiny_model, tmp_path, **BASES[base], max_steps=5), random.Random(tiny_model.name + base)
    settings: dict[str, Settings] = {f"{n}": ({"lora_dropout": 0.1}, {"seed": 10 + n}) for n in range(4)}
    alone = {name: lab.alone(name, chosen) for name, chosen in settings.items()}
    together, courses = Together(lab, patience=0.0), {name: Course() for name in settings}
    for name, chosen in settings.items():
        together.start(name, chosen, courses[name], delay=lambda: time.sleep(chance.uniform(0, 0.02)))
    together.end()
    assert not together.failed and len(set(together.passes)) > 1
    for name, course in alone.items():
        same(courses[name], course)


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


@pytest.mark.parametrize(
    ("base", "widened"), [("lora in fp32", False), ("lora in bf16, checkpointing", True), ("nf4", False)]
)
def test_trainings_of_several_losses_are_what_each_is_alone(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str, widened: bool
) -> None:
    """Two that learn preferences, and two of tokens; where products are widened, they share the head's chunks."""
    monkeypatch.setattr(wide, "multiplies_wide", lambda: widened)
    lab = Lab(tiny_model, tmp_path, **BASES[base], max_steps=2, eval_steps=2)
    lab.beta = {"sharp": 0.5, "preferences": 0.1}
    members: dict[str, Settings] = {
        "sharp": ({"lora_dropout": 0.1}, {"seed": 5, "per_device_train_batch_size": 3}),
        "tokens": ({}, {"seed": 6}),
        "preferences": ({}, {"seed": 7, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}),
        "smoothed": ({"r": 4}, {"seed": 8, "label_smoothing_factor": 0.1}),
    }
    _same_together(lab, members, passes=(4, 4, 1, 1))


def test_a_training_is_measured_in_its_midst_by_the_loss_that_it_learns(tiny_model: Path, tmp_path: Path) -> None:
    lab, course = Lab(tiny_model, tmp_path, **BASES["lora in fp32"], max_steps=2, eval_steps=2), Course()
    lab.beta = {"preferences": 0.1}
    with Engine().session(CPU) as session:
        loop = lab.loop(session, "preferences", ({}, {}), course, Ticks(scored := list[str](), "scored"))
        loop.args.per_device_eval_batch_size = 2  # as the probe sets it, where more do not fit
        loop.run()
    assert len(scored) == 3
    (measured,) = [line["eval_loss"] for line in course.log if "eval_loss" in line]
    rows, loss = loop.rows.held_out, loop.forward.loss
    assert isinstance(loss, Preference) and len(rows) == 5
    with evaluating(loop.model), torch.no_grad():
        assert measured == pytest.approx(float(plainly(loop.model, rows, loss)) / len(rows), rel=1e-5)


THREE: dict[str, Settings] = {
    f"{rows} rows": (
        {"target_modules": ["q_proj", "v_proj", *more]},
        {"seed": 5 + rows, "per_device_train_batch_size": rows},
    )
    for rows, more in ((1, ["k_proj"]), (2, []), (4, []))
}


def _same_together(lab: Lab, members: dict[str, Settings] = THREE, passes: Sequence[int] = (3, 3)) -> None:
    alone = {name: lab.alone(name, settings) for name, settings in members.items()}
    together, courses = Together(lab), {name: Course() for name in members}
    meeting = together.meeting(len(members))
    for name, settings in members.items():
        together.start(name, settings, courses[name], delay=meeting)
    together.end()
    assert not together.failed
    for name, course in alone.items():
        same(courses[name], course)
    assert together.passes == list(passes)  # none that failed was made up for by halves


@pytest.mark.parametrize("base", ["lora in bf16, checkpointing", "nf4"])
def test_a_checkpoint_is_resumed_in_another_pack_bit_for_bit(tiny_model: Path, tmp_path: Path, base: str) -> None:
    lab = Lab(tiny_model, tmp_path, **BASES[base], save_steps=4)
    whole, rest, other = Course(), Course(), Course()
    settings, saved = MEMBERS["evaluated"], list[Path]()
    together = Together(lab)
    keep = lambda loop: saved.append(Path(loop.args.output_dir) / "checkpoint-4")  # noqa: E731
    together.start("whole", settings, whole, change=keep)
    together.start("beside", MEMBERS["large"], other)
    together.end()
    lab.base = lab.load()  # in another process it is another one
    again = Together(lab)
    again.start("new", MEMBERS["accumulating"], Course())
    again.start("rest", settings, rest, resume=saved[0])
    again.end()
    assert not together.failed and not again.failed
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
    courses = {name: Course() for name in [*alone, "large"]}
    together, shortage = Together(lab), Shortage(lab.base, most=130)  # three rows of the large one are more
    meeting = together.meeting(3)
    for name, course in courses.items():
        together.start(name, MEMBERS[name], course, delay=meeting)
    together.end()
    assert together.failed.keys() == {"large"} and isinstance(together.failed["large"], torch.OutOfMemoryError)
    assert together.passes[0] == 3 and shortage.met >= 2, "all, and the large one alone at last"
    for name, course in alone.items():
        same(courses[name], course)


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
    with Engine().session(CPU) as session:
        stopped = lab.loop(session, "stopped", settings, Course(), End(step=3, piece=2))  # at the end of an epoch
        stopped.run()
        assert stopped.state.global_step == 3
        resumed = lab.loop(session, "rest", settings, rest)
        resumed.resume(Path(stopped.args.output_dir) / "checkpoint-3")
        resumed.run()
    assert rest.log[:-1] == whole.log[:-1]
    assert all(torch.equal(weight, whole.weights[key]) for key, weight in rest.weights.items())


@pytest.mark.parametrize("strategy", ["random", "group_by_length", "sequential"])
def test_the_tokens_of_a_part_of_an_epoch_are_those_of_its_rows(
    tiny_model: Path, tmp_path: Path, strategy: str
) -> None:
    """Not that part of all tokens: by length, the longest rows come first. Rows have 5 to 60 tokens."""
    lab = Lab(tiny_model, tmp_path, **BASES["lora in fp32"])
    lab.lengths = range(5, 61, 11)
    rows = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    settings: Settings = ({}, {"train_sampling_strategy": strategy, "max_steps": 8, **rows})
    with Engine().session(CPU) as session:
        whole = lab.loop(session, "whole", settings, Course())
        whole.run()
        stopped = lab.loop(session, "whole", settings, Course(), End(step=7, piece=1))  # the second epoch has 5 steps
        stopped.run()
        checkpoint = Path(stopped.args.output_dir) / f"checkpoint-{stopped.state.global_step}"
        _without_count(checkpoint / "training_state.json")
        resumed = lab.loop(session, "whole", settings, Course())
        resumed.resume(checkpoint)
        counts = [stopped.state.num_input_tokens_seen, resumed.state.num_input_tokens_seen]
        resumed.run()
    passed = whole.state.total_flos / (6 * whole.model.num_parameters(exclude_embeddings=True))
    assert whole.state.num_input_tokens_seen == resumed.state.num_input_tokens_seen == passed
    assert counts[0] == counts[1] > 0


def _without_count(state: Path) -> None:
    """As an older version wrote it."""
    text = json.loads(state.read_text())
    progress = dict(text["dict"])["progress"]
    progress["dict"] = [item for item in progress["dict"] if item[0] != "num_input_tokens_seen"]
    state.write_text(json.dumps(text))


def test_an_evaluation_of_one_changes_no_gradient_of_others(tiny_model: Path, tmp_path: Path) -> None:
    """bitsandbytes repacks an NF4 layer's weights on its first forward in eval mode, and gradients are wrong then."""
    lab = Lab(tiny_model, tmp_path, **BASES["nf4"])
    weights = [p.detach().clone() for p in lab.base.model.parameters()]
    settings: Settings = ({"r": 4}, {"max_steps": 4, "logging_steps": 1})
    alone, beside, evaluated = lab.alone("alone", settings), Course(), Course()
    together = Together(lab)
    together.start("beside", settings, beside)
    together.start("evaluated", ({}, {"eval_steps": 1, "max_steps": 3}), evaluated)
    together.end()
    assert not together.failed
    assert sum("eval_loss" in line for line in evaluated.log) == 3
    same(beside, alone)
    assert all(torch.equal(a, b) for a, b in zip(weights, lab.base.model.parameters(), strict=True))


def test_an_evaluation_is_sliced_between_the_steps_of_others(tiny_model: Path, tmp_path: Path) -> None:
    lab = Lab(tiny_model, tmp_path, **BASES["lora in fp32"])
    together, order, meeting = Together(lab), list[str](), None
    meeting = together.meeting(2)
    small = lambda loop: setattr(loop.args, "per_device_eval_batch_size", 1)  # noqa: E731  five rows are held out
    settings: Settings = ({}, {"max_steps": 2, "eval_steps": 1})
    together.start("beside", ({}, {"max_steps": 30}), Course(), Ticks(order, "step"), delay=meeting)
    together.start("evaluated", settings, Course(), Ticks(order, "scored"), change=small, delay=meeting)
    together.end()
    begun, ended = order.index("scored"), len(order) - order[::-1].index("scored")
    assert not together.failed and "step" in order[begun:ended]
    assert order.count("scored") == 2 * 5


class Ticks(TrainerCallback):
    """Notes steps, or batches that are evaluated."""

    def __init__(self, order: list[str], what: str) -> None:
        self._order, self._what = order, what

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._what == "step":
            self._order.append("step")

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._order.append("scored")


def test_members_that_need_padding_train_beside_the_others(tiny_model: Path, tmp_path: Path) -> None:
    """In exact mode a member equals the Trainer, in a pack too."""
    lab = Lab(tiny_model, tmp_path, **BASES["lora in fp32"])
    exact = Case(tiny_model, tmp_path / "exact", "lora", {"lora_dropout": 0.2}, {"gradient_accumulation_steps": 2})
    theirs, ours = exact.by_trainer(), Course()
    together = Together(lab)
    together.start("lean", MEMBERS["large"], Course())
    together.start_as("exact", lambda session: exact.loop(session, Watch(ours)))
    together.end()
    assert not together.failed
    same(ours, theirs)


def test_nothing_of_a_member_stays_in_the_base(tiny_model: Path, tmp_path: Path) -> None:
    lab = Lab(tiny_model, tmp_path, **BASES["lora in fp32"])
    with Engine().session(CPU) as session:
        loop = lab.loop(session, "a", MEMBERS["large"], Course())
        loop.run()
        tensors = [weakref.ref(parameter) for parameter in loop.trained]
        del loop
        gc.collect()
    assert tensors and not [ref for ref in tensors if ref() is not None]


def test_pieces_of_work_draw_their_own_random_numbers(tiny_model: Path, tmp_path: Path) -> None:
    """An evaluation and answers after each training, between the steps of the others."""
    lab = Lab(tiny_model, tmp_path, **BASES["lora in fp32"])
    names = ("evaluated", "accumulating", "large")
    alone = {name: lab.alone(name, MEMBERS[name]) for name in names}
    courses, together, drawn = {name: Course() for name in names}, Together(lab), dict[str, torch.Tensor]()

    def after(loop: TrainingLoop, name: str) -> None:
        train = loop.run

        def run() -> None:
            train()
            for row in loop.rows.held_out:
                loop.session.run(lambda row=row: loop._score([row]))
                drawn[name] = loop.session.run(lambda: torch.rand(7))  # generating answers draws, too

        loop.run = run  # type: ignore[method-assign]

    for name in names:
        together.start(name, MEMBERS[name], courses[name], change=lambda loop, name=name: after(loop, name))
    together.end()
    assert not together.failed and len(drawn) == 3
    for name, course in alone.items():
        same(courses[name], course)


def test_an_error_crosses_threads_without_what_it_held(tiny_model: Path, tmp_path: Path) -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def fail() -> None:
        tensor = torch.ones(3)
        held.append(weakref.ref(tensor))
        raise ZeroDivisionError("mine")

    with Engine().session(CPU) as session, pytest.raises(ZeroDivisionError, match="mine") as raised:
        session.run(fail)
    assert held[0]() is None
    assert any("in fail" in note for note in raised.value.__notes__), "where it was raised is told"


def test_a_long_piece_lets_others_go_first_and_is_one_at_a_time() -> None:
    order: list[str] = []
    engine = Engine()
    begun, asked = threading.Event(), threading.Event()

    def long(session: Session, name: str) -> None:
        order.append(f"{name} begins")
        begun.set()
        assert asked.wait(30)
        wait_for(lambda: engine.waiting == 2) if name == "a" else None
        with torch.no_grad():
            session.pause()
            assert not torch.is_grad_enabled()
        order.append(f"{name} ends")

    def short() -> None:
        assert torch.is_grad_enabled()
        order.append("short")

    with engine.session(CPU) as a, engine.session(CPU) as b, engine.session(CPU) as c:
        threads = [threading.Thread(target=a.run_long, args=(lambda: long(a, "a"), lambda: None))]
        threads[0].start()
        assert begun.wait(30)
        threads += [
            threading.Thread(target=b.run_long, args=(lambda: long(b, "b"), lambda: None)),
            threading.Thread(target=c.run, args=(short,)),
        ]
        threads[1].start()
        threads[2].start()
        asked.set()
        for thread in threads:
            thread.join(30)
    assert order == ["a begins", "short", "a ends", "b begins", "b ends"]


@pytest.mark.parametrize("casts", [False, True])
@pytest.mark.parametrize("name", ["DoRA", "exact"])
def test_steps_within_a_long_piece_see_no_factor_as_it_was_before_a_step(
    tiny_model: Path, tmp_path: Path, name: str, casts: bool
) -> None:
    """Torch keeps the casts of weights until a thread's outermost autocast ends, be it switched off: answers of a job
    without modules trained in full are in such a one."""
    lab = Lab(tiny_model, tmp_path, **BASES["lora in bf16, checkpointing"])
    numbers = itertools.count()

    def loop(session: Session, course: Course) -> TrainingLoop:
        if name == "exact":  # and so by peft's own code
            how = {"dtype": "bfloat16", "learning_rate": 0.01, "max_steps": 4}
            case = Case(tiny_model, tmp_path / f"exact-{next(numbers)}", "lora", {"lora_dropout": 0.2}, how)
            return case.loop(session, Watch(course))
        return lab.loop(session, name, MEMBERS[name], course)

    alone, within, together = Course(), Course(), Together(lab)
    with Engine().session(CPU) as session:
        loop(session, alone).run()
    begun, over = threading.Event(), threading.Event()

    def answer() -> None:
        begun.set()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=casts), torch.no_grad():
            while not over.is_set():
                session.pause()
            assert torch.is_autocast_enabled("cpu") == casts
        assert not torch.is_autocast_enabled("cpu") and torch.autocast_increment_nesting() == 1
        torch.autocast_decrement_nesting()

    with together.engine.session(CPU) as session:
        thread = threading.Thread(target=session.run_long, args=(answer, lambda: None))
        thread.start()
        assert begun.wait(60)
        together.start_as(name, lambda session: loop(session, within))
        together.end()
        over.set()
        thread.join(60)
    assert not together.failed
    same(within, alone)


def test_who_waits_for_a_long_piece_of_another_can_be_stopped() -> None:
    engine, go_on = Engine(), threading.Event()
    with engine.session(CPU) as a, engine.session(CPU) as b:
        thread = threading.Thread(target=a.run_long, args=(lambda: go_on.wait(30), lambda: None))
        thread.start()

        def stop() -> None:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            b.run_long(lambda: pytest.fail("it was stopped"), stop)
        go_on.set()
        thread.join(30)


class Failing(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            raise ZeroDivisionError
