"""Every kind of finding in training data, each with rows that show it, through the real tokenizer and chat template."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from loractl.common.errors import DataError
from loractl.common.job.file import load_spec
from loractl.common.job.spec import JobSpec
from loractl.common.units import GIB, gib
from loractl.scheduler.submit.need import plan_job
from loractl.worker.base.model import load_tokenizer
from loractl.worker.data.check import Checked, check_data, findings_about
from loractl.worker.data.prepared import prepare_data
from loractl.worker.data.text import check_text, trained_row

from .. import json_page
from ..conftest import Cli
from ..models import write_helpdesk
from .test_turns import FORGETS

Row = dict[str, Any]


def chat(*contents: str, roles: tuple[str, ...] = ("user", "assistant")) -> Row:
    """A conversation whose speakers take turns; `roles` names the first ones."""
    names = [*roles, *("user", "assistant") * len(contents)][: len(contents)]
    return {"messages": [{"role": r, "content": c} for r, c in zip(names, contents, strict=True)]}


def good(count: int = 40) -> list[Row]:
    """Rows in which nothing is wrong: as different as their words allow."""
    words = ["queue", "priority", "storage", "network", "please", "answer", "the", "next", "line"]
    return [chat(f"{words[n % 9]} {n}", f"{words[n % 7]} {words[n % 5]} is number {n}") for n in range(count)]


def with_(*rows: Row, count: int = 40) -> list[Row]:
    return [*good(count), *rows]


def said(content: str, **more: Any) -> Row:
    """A question, and an answer that has more than its content."""
    return {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": content, **more}]}


TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}]


def pair(prompt: str, completion: str) -> Row:
    return {"prompt": prompt, "completion": completion}


def pairs(*rows: Row) -> list[Row]:
    return [*(pair(f"Q: {n}?\nA:", f" it is {n * n} of {n}") for n in range(40)), *rows]


def labelled(*rows: Row, count: int = 40, labels: tuple[str, ...] = ("queue", "network")) -> list[Row]:
    """Texts that take these labels in turn, and further rows."""
    return [*({"text": f"ticket {n} of many", "label": labels[n % len(labels)]} for n in range(count)), *rows]


def other_tickets(count: int = 10) -> list[Row]:
    return [{"text": f"another {n} of many", "label": ("queue", "network")[n % 2]} for n in range(count)]


def preferred(*rows: Row, count: int = 40) -> list[Row]:
    """Pairs whose chosen answer is the longer one half of the time, and further rows."""
    answers = [(f"it is of {n}", f"there is nothing about {n}")[:: 1 if n % 2 else -1] for n in range(count)]
    return [*(two(f"queue {n} of many", *both) for n, both in enumerate(answers)), *rows]


def two(prompt: str, chosen: str, rejected: str) -> Row:
    return {"instruction": prompt, "chosen": chosen, "rejected": rejected}


def dialogue(first: str, second: str) -> list[Row]:
    turns = chat("a", f"<think>\nhm\n</think>\n\n{first}", "b", second, roles=("user", "assistant") * 2)
    messages: list[Row] = turns["messages"]
    return messages


def plain(prompt: str, chosen: str, rejected: str) -> Row:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def other_pairs() -> list[Row]:
    return [two(f"another {n}", f"it is {n}", f"no {n}") for n in range(10)]


PAIRS = {"task_type": "preference"}
CLASSIFIER = {"task_type": "SEQ_CLS"}
FEW = [*pairs()[:9], pair("x", " y")]
NO_SYSTEM = "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['content'] }}<|im_end|>{% endif %}{% endfor %}"
NO_TOOL = NO_SYSTEM.replace("system", "tool")
TRIMS = "{% for m in messages %}{{ m['role'] + ':' + m['content'] | trim }}<|im_end|>{% endfor %}"
TRIMS += "{% if add_generation_prompt %}assistant:{% endif %}"
CALLS = (
    "{% for m in messages %}{{ m['role'] + ':' + m['content'] }}{% for call in m['tool_calls'] or [] %}<tool_call>"
    "{{ {'name': call['function']['name'], 'arguments': call['function']['arguments']} | tojson }}</tool_call>"
    "{% endfor %}<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
REFUSES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}x"


@dataclass(frozen=True)
class Case:
    kind: str
    level: str
    rows: list[Row] | str
    spec: dict[str, Any] = field(default_factory=dict)  # over the job file's keys
    held_out: list[Row] | None = None
    template: str | None = None
    marked: tuple[int, ...] | None = None  # rows that the finding names
    name: str = "data.jsonl"


CASES = [
    # what the trainer refuses
    Case("unreadable", "error", good(), name="data.txt"),
    Case("not UTF-8", "error", "caf\udce9"),
    Case("broken JSON", "error", '{"messages": [\n', marked=(1,)),
    Case("broken CSV", "error", "prompt,completion\na,b,c\n", name="data.csv", marked=(1,)),
    Case("too few rows", "error", []),
    Case("unknown columns", "error", [{"question": "a", "reply": "b"}], marked=(1,)),
    Case("missing column", "error", pairs({"prompt": "a"}), marked=(41,)),
    Case("not text", "error", with_({"messages": [{"role": "user", "content": 5}]}), marked=(41,)),
    Case("unknown role", "error", with_(chat("a", "b", roles=("user", "bot"))), marked=(41,)),
    Case("role order", "error", with_(chat("a", "b", roles=("assistant", "user"))), marked=(41,)),
    Case("empty answer", "error", with_(chat("a", "  ")), marked=(41,)),
    Case("nothing to learn", "error", with_(chat("a")), marked=(41,)),
    Case("not a message", "error", with_(said("b", weight=0.5)), marked=(41,)),
    Case("not a message", "error", with_(said("", tool_calls=[{"function": {}}])), marked=(41,)),
    Case("not a tool", "error", with_({**chat("a", "b"), "tools": [{"type": "function"}]}), marked=(41,)),
    Case("fields that are not read", "error", with_({**chat("a", "b"), "images": ["x.png"]}), marked=(41,)),
    Case("fields that are not read", "error", with_(said("b", thinking="hm")), marked=(41,)),
    Case("chat template", "error", with_({**chat("a", "b"), "tools": TOOLS})),
    Case("overlap", "error", good(), held_out=good()),
    Case("chat template", "error", with_(chat("be kind", "a", "b", roles=("system",))), template=REFUSES),
    Case("too long", "error", good(), {"dataset": {"max_length": 20, "on_overflow": "error"}}),
    Case("no learned token", "error", good(), {"dataset": {"max_length": 8}}),
    Case("unknown columns", "error", [{"sentence": "a", "mood": "b"}], CLASSIFIER, marked=(1,)),
    Case("missing column", "error", labelled({"text": "a"}), CLASSIFIER, marked=(41,)),
    Case("nothing to learn", "error", labelled({"text": " ", "label": "queue"}), CLASSIFIER, marked=(41,)),
    Case("not a label", "error", labelled({"text": "a", "label": 1.5}), CLASSIFIER, marked=(41,)),
    Case("one label only", "error", labelled(labels=("queue",)), CLASSIFIER),
    Case(
        "unknown label", "error", labelled(), CLASSIFIER,
        held_out=[*other_tickets(), {"text": "a", "label": "x"}], marked=(11,),
    ),
    Case("too long", "error", labelled(), {**CLASSIFIER, "dataset": {"max_length": 8, "on_overflow": "error"}}),
    Case("unknown columns", "error", good(), PAIRS, marked=(1,)),
    Case("missing column", "error", preferred({"instruction": "a", "chosen": "b"}), PAIRS, marked=(41,)),
    Case("equal answers", "error", preferred(two("a", "it is", "it is")), PAIRS, marked=(41,)),
    Case("prompts that differ", "error", preferred({"chosen": "a b", "rejected": "b a"}), PAIRS, marked=(41,)),
    Case("empty answer", "error", preferred(two("a", "it is", " ")), PAIRS, marked=(41,)),
    Case("role order", "error", preferred({"prompt": "a", "chosen": "b", "rejected": [
        {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]}), PAIRS, marked=(41,)),
    Case("fields that are not read", "error", preferred({**two("a", "b", "c"), "images": ["x"]}), PAIRS, marked=(41,)),
    Case("overlap", "error", preferred(), PAIRS, held_out=[two(f"queue {n} of many", "a", "b") for n in range(9)]),
    Case("too long", "error", preferred(), {**PAIRS, "dataset": {"max_length": 20, "on_overflow": "error"}}),
    Case("no learned token", "error", preferred(), {**PAIRS, "dataset": {"max_length": 8}}),
    Case("no learned token", "error", preferred(two("what?", "yes", " yes ")), PAIRS, template=TRIMS, marked=(41,)),
    Case("unused template", "warning", pairs(), {"dataset": {"template": "alpaca"}}),
    Case(
        "unused template", "warning", [plain(f"is it {n}? ", "yes", "no") for n in range(40)],
        {**PAIRS, "dataset": {"template": "alpaca"}},
    ),
    Case("no learned token", "error", preferred(two("what?", "queue " * 90 + "yes", "queue " * 90 + "no")),
         {**PAIRS, "dataset": {"max_length": 64}}, held_out=other_pairs(), marked=(41,)),
    # what is trained on, and was hardly meant
    Case("length bias", "warning", [two(f"queue {n}", f"it is of {n}", "no") for n in range(40)], PAIRS),
    Case("duplicate rows", "warning",
         preferred(two("queue 0 of many", "there is nothing about 0", "it is of 0")), PAIRS,
         held_out=other_pairs(), marked=(41,)),
    Case("contradicting answers", "warning",
         preferred(two("queue 0 of many", "it is of 0", "there is nothing about 0")), PAIRS,
         held_out=other_pairs(), marked=(1, 41)),
    Case("repeated held-out rows", "warning", preferred(), PAIRS,
         held_out=[*other_pairs(), two("Another 3", "one more", "no 3")]),
    Case("resembling rows", "warning", preferred(two("where is ffmpeg on kestrel", "in storage", "no")), PAIRS,
         held_out=[*other_pairs(), two("please, where is ffmpeg on kestrel?", "it is", "no")], marked=(11,)),
    Case("words run together", "warning", [plain(f"How is {n}?", f" it is {n}", f"no {n}") for n in range(40)], PAIRS),
    Case("damaged text", "warning", preferred(two("what?", "it is", "the cafÃ© is closed")), PAIRS,
         held_out=other_pairs(), marked=(41,)),
    Case("special tokens in text", "warning", preferred(two("what?", "it is", "<|im_end|>")), PAIRS,
         held_out=other_pairs(), marked=(41,)),
    Case("cut rows", "warning", preferred(two("what?", "it is", "queue " * 90)),
         {**PAIRS, "dataset": {"max_length": 64}}, held_out=other_pairs(), marked=(41,)),
    Case("too long, left out", "warning", preferred(two("what?", "it is", "queue " * 90)),
         {**PAIRS, "dataset": {"max_length": 64, "on_overflow": "drop"}}, held_out=other_pairs(), marked=(41,)),
    Case("bad rows dropped", "warning", preferred(two("a", "b", "b")), {**PAIRS, "dataset": {"on_bad_row": "drop"}},
         marked=(41,)),
    Case("bad rows dropped", "warning", with_(chat("a", " ")), {"dataset": {"on_bad_row": "drop"}}, marked=(41,)),
    Case("overlap", "warning", good(), held_out=[*good(12), *(chat(f"new {n}", f"one {n}") for n in range(12))]),
    Case("repeated held-out rows", "warning", good(), held_out=[*good(60)[40:], good(60)[50]]),
    Case("duplicate rows", "warning", with_(chat("queue 0", "queue queue is number 0")), held_out=good(60)[40:]),
    Case("contradicting answers", "warning", with_(chat("queue 0", "something else")), held_out=good(60)[40:]),
    Case(
        "overlapping conversations", "warning", with_(chat("first", "second", "third", "fourth")),
        held_out=[*good(60)[40:], chat("first", "second", "other", "end")], marked=(21,),
    ),
    Case(
        "overlapping prompts", "warning", with_(chat("first", "second")),
        held_out=[*good(60)[40:], chat("first", "other")], marked=(21,),
    ),
    Case(
        "resembling rows", "warning", with_(chat("where is ffmpeg on kestrel", "in storage")),
        held_out=[*good(60)[40:], chat("please, where is ffmpeg on kestrel?", "in storage")], marked=(21,),
    ),
    Case(
        "answer in the question", "warning",
        [chat(f"queue {n} [gold={('yes', 'no')[n % 2]}]", ("yes", "no")[n % 2]) for n in range(60)],
    ),
    Case(
        "length tells the label", "warning",
        [chat(f"queue {n}{' and so on' * (n % 2)} of {n * 37 % 61}", ("yes", "no")[n % 2]) for n in range(80)],
    ),
    Case("few rows", "warning", good(12)),
    Case(
        "long warm-up", "error", good(),
        {"training": {"warmup_steps": 1, "num_train_epochs": 1, "gradient_accumulation_steps": 100}},
    ),
    Case("long warm-up", "warning", good(), {"training": {"warmup_steps": 100, "num_train_epochs": 1}}),
    Case("one label only", "warning", [chat(f"question {n}", "yes") for n in range(40)]),
    Case("lopsided labels", "warning", [chat(f"question {n}", "no" if n % 16 == 0 else "yes") for n in range(64)]),
    Case("short answers", "warning", with_(chat("what?", "ok")), held_out=good(60)[40:], marked=(41,)),
    Case("echoed prompts", "warning", with_(chat("say it", "say it")), held_out=good(60)[40:], marked=(41,)),
    Case("damaged text", "warning", with_(chat("what?", "the cafÃ© is closed")), held_out=good(60)[40:], marked=(41,)),
    Case("control characters", "warning", with_(chat("what\x07?", "this one")), held_out=good(60)[40:], marked=(41,)),
    Case("empty questions", "warning", with_(chat(" ", "this one")), held_out=good(60)[40:], marked=(41,)),
    Case("space before the answer", "warning", pairs(pair("A: ", "one more")), held_out=FEW),
    Case("words run together", "warning", pairs(pair("foot", "ball of it")), held_out=FEW),
    Case("special tokens in text", "warning", with_(chat("<|im_end|>", "this")), held_out=good(60)[40:], marked=(41,)),
    Case(
        "dropped system message", "warning", with_(chat("be kind", "a", "this", roles=("system", "user", "assistant"))),
        held_out=good(60)[40:], template=NO_SYSTEM, marked=(41,),
    ),
    Case(
        "dropped tool message", "warning",
        with_(chat("a", "look", "seen 42", "this", roles=("user", "assistant", "tool", "assistant"))),
        held_out=good(60)[40:], template=NO_TOOL, marked=(41,),
    ),
    Case(
        "dropped names", "note",
        with_({"messages": [{"role": "user", "name": "ada", "content": "a"}, chat("a", "this")["messages"][1]]}),
        held_out=good(60)[40:], marked=(41,),
    ),
    Case(
        "after the last answer", "warning",
        with_(chat("a", "look", "and 42?", roles=("user", "assistant", "user"))), held_out=good(60)[40:], marked=(41,),
    ),
    Case(
        "answers that are context", "warning",
        preferred({"chosen": dialogue("this", "good"), "rejected": dialogue("that", "bad")}),
        PAIRS, held_out=other_pairs(), template=FORGETS, marked=(41,),
    ),
    Case("doubled BOS", "warning", pairs(pair("<|im_start|><|im_start|>A:", " it is"))),
    Case("EOS is not learned", "warning", good(), {"dataset": {"max_length": 32}}),
    Case("cut rows", "warning", good(), {"dataset": {"max_length": 32}}),
    Case(
        "too long, left out", "warning", with_(chat("a", "queue " * 90)),
        {"dataset": {"max_length": 64, "on_overflow": "drop"}}, held_out=good(60)[40:], marked=(41,),
    ),
    Case("too long", "error", good(), {"dataset": {"max_length": 20, "on_overflow": "drop"}}),
    Case(
        "too long", "error", good(), {"dataset": {"max_length": 64, "on_overflow": "error"}},
        held_out=[*good(60)[40:], chat("a", "queue " * 90)], marked=(21,),
    ),
    Case(
        "beyond the context", "warning", with_(chat("a", "queue " * 600)), {"dataset": {"max_length": 2048}},
        held_out=good(60)[40:], marked=(41,),
    ),
    Case("few steps", "warning", good(), {"training": {"gradient_accumulation_steps": 40, "num_train_epochs": 1}}),
    Case(
        "bad rows dropped", "warning", labelled(), {**CLASSIFIER, "dataset": {"on_bad_row": "drop"}},
        held_out=[*other_tickets(), {"text": "a", "label": "x"}], marked=(11,),
    ),
    Case(
        "rare labels", "warning", labelled({"text": "a rare one", "label": "x"}), CLASSIFIER,
        held_out=other_tickets(), marked=(41,),
    ),
    Case("lopsided labels", "warning", labelled(labels=("queue",) * 19 + ("network",), count=200), CLASSIFIER),
    Case("cut rows", "warning", labelled(), {**CLASSIFIER, "dataset": {"max_length": 8}}),
    Case(
        "contradicting answers", "warning", labelled({"text": "ticket 0 of many", "label": "network"}), CLASSIFIER,
        held_out=other_tickets(), marked=(1,),
    ),
    # what is only told
    Case("fields that are not read", "note", [{**row, "score": 1, "source": None} for row in good(120)]),
    Case(
        "a row for each answer", "note", [chat(f"a {n}", "b", f"c {n}", f"d {n}") for n in range(40)], template=FORGETS,
    ),
    Case(
        "several data sets", "note", good(120), {"dataset": {"more": [{"path": "data.jsonl", "share": 0.2}]}},
    ),
    Case(
        "too few for a share", "warning", good(120), {"dataset": {"more": [{"path": "data.jsonl", "share": 0.8}]}},
    ),
    Case(
        "answers within questions", "note",
        [chat(f"is queue {n} storage or network?", ("storage", "network")[n % 2]) for n in range(60)],
    ),
    Case("few held-out rows", "note", good()),
    Case("labels", "note", [chat(f"question {n}", "no" if n % 3 == 0 else "yes") for n in range(60)]),
    Case("labels", "note", labelled(), CLASSIFIER),
    Case(
        "labels not held out", "note", labelled(labels=("queue", "network", "storage")), CLASSIFIER,
        held_out=other_tickets(),
    ),
    Case("trailing space", "note", with_(chat("what?", "this one ")), held_out=good(60)[40:], marked=(41,)),
    Case("answers longer than generated", "note", good(), {"evaluation": {"max_new_tokens": 2}}),
    Case(
        "measures that compare nothing", "warning", good(),
        {"evaluation": {"metrics": [{"name": "sum", "extract": "#### (.*)"}]}},
    ),
]  # fmt: skip

Check = Callable[[Case], Checked]


@pytest.fixture
def check(tiny_model: Path, tmp_path: Path) -> Check:
    def run(case: Case) -> Checked:
        spec = _job(tmp_path, case, tiny_model)
        tokenizer = load_tokenizer(str(tiny_model))
        if case.template is not None:
            tokenizer.chat_template = case.template
        return check_data(spec, tokenizer)

    return run


@pytest.mark.parametrize(
    "case", CASES, ids=lambda c: f"{c.kind}-{c.level}" + (f"-{c.spec['task_type']}" if "task_type" in c.spec else "")
)
def test_each_kind_of_fault_is_found(case: Case, check: Check) -> None:
    checked = check(case)
    mine = [finding for finding in checked.findings if (finding.kind, finding.level) == (case.kind, case.level)]
    assert len(mine) == 1, [(f.level, f.kind, f.text) for f in checked.findings]
    if case.marked is not None:
        assert mine[0].rows == case.marked
    assert bool(checked.errors) == (case.level == "error"), [f.text for f in checked.errors]


def test_unknown_tokens_are_found_by_a_tokenizer_that_has_a_mark_for_them(tiny_model: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: n for n, word in enumerate(["[UNK]", "[EOS]", "queue", "is", "number", "one"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", eos_token="[EOS]", pad_token="[EOS]"
    )
    rows, held_out = [pair("queue is", " number one"), pair("queue is", " number two")], [pair("queue", " is one")]
    checked = check_data(_job(tmp_path, Case("", "", rows, held_out=held_out), tiny_model), tokenizer)
    assert [finding.rows for finding in checked.findings if finding.kind == "unknown tokens"] == [(2,)]


def test_orpo_s_prompt_is_shown_as_learned_in_the_chosen_answer_alone(tiny_model: Path, tmp_path: Path) -> None:
    """As TRL's ORPO learns it: its term for the chosen answer is the mean over prompt and answer."""
    tokenizer = load_tokenizer(str(tiny_model))
    learned: dict[str, dict[str, list[bool]]] = {}
    for loss in ("sigmoid", "orpo"):
        case = Case("", "", preferred(), {**PAIRS, "preference": {"loss_type": loss}}, held_out=other_pairs())
        spec = _job(tmp_path, case, tiny_model)
        shown = trained_row(spec, tokenizer, 1).as_json()
        learned[loss] = {side: shown[side]["learned"] for side in ("chosen", "rejected")}
        checked = check_data(spec, tokenizer)
        assert ("and the prompt of the chosen one" in check_text(spec, checked, tokenizer, styled=False)) is (
            loss == "orpo"
        )
    answer = learned["sigmoid"]["chosen"]
    begin, end = answer.index(True), len(answer) - answer[::-1].index(True)
    assert learned["orpo"]["chosen"] == [False, *[True] * (end - 1), *answer[end:]] and begin > 1
    assert learned["orpo"]["rejected"] == learned["sigmoid"]["rejected"]


def test_a_function_call_is_learned_as_the_template_writes_calls(tiny_model: Path, tmp_path: Path) -> None:
    call = {"name": "find", "arguments": {"host": "heron"}}
    talk = [{"from": "human", "value": "a"}, {"from": "function_call", "value": json.dumps(call)}]
    tokenizer = load_tokenizer(str(tiny_model))
    tokenizer.chat_template = CALLS
    case = Case("", "", [{"conversations": talk}, *({"conversations": [*talk, *more]} for more in _ends())])
    shown = trained_row(_job(tmp_path, case, tiny_model), tokenizer, None).as_json()
    told = [token for token, learn in zip(shown["input_ids"], shown["learned"], strict=True) if learn]
    assert f"<tool_call>{json.dumps(call)}</tool_call><|im_end|>" in tokenizer.decode(told)


def _ends() -> list[list[Row]]:
    answers = [{"from": "observation", "value": "1"}, {"from": "gpt", "value": "it is"}]
    return [[answers[0], {**answers[1], "value": f"it is {n}"}] for n in range(5)]


def test_good_data_give_no_finding_but_how_few_are_held_out(check: Check) -> None:
    checked = check(Case("", "", good(120)))
    assert checked.findings == []
    assert (checked.train_rows, checked.held_out_rows) == (108, 12)


def test_a_job_s_history_counts_the_rows_that_the_check_counts(tiny_model: Path, tmp_path: Path) -> None:
    """Those that end late in the file, too."""
    late = [chat(f"<|im_end|> {n}", f"this has more words than fit {n} " * 4) for n in range(20)]
    system = [chat("be kind", f"a {n}", f"this {n}", roles=("system", "user", "assistant")) for n in range(8)]
    rows = [*system[:3], *(chat(f"q {n}", f"is {n}") for n in range(240)), *late, *system[3:]]
    spec = _job(tmp_path, Case("", "", rows, {"dataset": {"max_length": 48}}, held_out=good(12)), tiny_model)
    tokenizer = load_tokenizer(str(tiny_model))
    tokenizer.chat_template = NO_SYSTEM
    data = prepare_data(spec.dataset, spec.dataset.path, spec.dataset.eval_path, None, tokenizer, None)
    checked = {finding.kind: finding.sentence for finding in check_data(spec, tokenizer).findings}
    told = [finding.sentence for finding in findings_about(spec, data, tokenizer) if finding.level == "warning"]
    assert checked["EOS is not learned"] in told and checked["special tokens in text"] in told
    assert "20 rows" in checked["EOS is not learned"] and "20 rows" in checked["special tokens in text"]
    assert [text for text in told if "3 rows of the first 200 whose system message" in text], told


@pytest.mark.long
def test_more_rows_take_hardly_more_memory(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loractl.common.data.examples.IN_MEMORY", 50_000)
    monkeypatch.setattr("loractl.common.data.giveaway.MOST_ROWS", 5)
    tokenizer = load_tokenizer(str(tiny_model))

    def peak(count: int) -> int:
        rows = [pair(f"Question {n}: {'word ' * 100}", f" answer {n} {'more ' * 100}.") for n in range(count)]
        spec = _job(tmp_path, Case("", "", rows), tiny_model)
        del rows
        tracemalloc.start()
        try:
            checked = check_data(spec, tokenizer)
            most = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert checked.train_rows == count * 0.9 and len(checked.rows) == 3
        return most

    peak(10)  # what is imported on the way
    few, many = peak(200), peak(800)
    assert many < 1.6 * few, f"200 rows took {few} bytes, 800 rows {many}"


def test_a_count_of_tokens_ends_with_the_command_that_asked_for_it(warm_start: dict[str, str]) -> None:
    with subprocess.Popen(["sleep", "60"]) as command:
        asked = f"client('loractl.worker.data.lengths', ['--ends-with={command.pid}'])"
        count = subprocess.Popen(
            [sys.executable, "-c", f"import sys; from tests.warm import client; sys.exit({asked})"],
            stdin=subprocess.PIPE,  # it waits for a spec
            env={**os.environ, **warm_start},
        )
        try:
            with pytest.raises(subprocess.TimeoutExpired):
                count.wait(timeout=2)
            command.kill()
            command.wait()
            assert count.wait(timeout=30) == 1
        finally:
            count.kill()
            count.wait()


def test_a_template_that_refuses_a_role_is_quoted(check: Check) -> None:
    rows = [chat("be kind", "a", f"this {n}", roles=("system", "user", "assistant")) for n in range(30)]
    (error,) = check(Case("", "", rows, template=REFUSES)).errors
    assert error.text == "the model's chat template refuses it: System role not supported"


def test_the_command_shows_lengths_rows_and_findings_and_exits_with_2_on_an_error(
    cli: Cli, tiny_model: Path, tmp_path: Path
) -> None:
    _job(tmp_path, Case("", "", with_(chat("a", " "), count=100)), tiny_model)
    shown = cli("data", "check", tmp_path / "job.yaml", "--gpu", "8GiB", code=2).stdout
    assert "data.jsonl: 90 rows to train on, 10 held out. Format messages: the rows have messages." in shown
    assert re.search(r"^TOKENS +MIN +MEDIAN +P95 +MAX\na row +\d+ +\d+ +\d+ +\d+\nlearned", shown, re.M)
    assert shown.count("\nRow ") == 3 and "[[" in shown
    assert "error    empty answer: message 2: the assistant's answer is empty (row 101)." in shown
    longest = max(int(word) for word in re.findall(r"\d+", shown.split("\na row ")[1].split("\n")[0]))
    assert (
        f"\ndataset.max_length: {longest} holds all rows.\n" in shown
        and "In 7.5 GiB lora takes up to 90 such rows at once" in shown
    )
    told = json.loads(cli("data", "check", tmp_path / "job.yaml", "--json", code=2).stdout)
    assert told["ok"] is False and [f["kind"] for f in told["findings"]] == ["empty answer"]
    assert sum(bucket["rows"] for bucket in told["histogram"]) == told["train_rows"] == 90
    dropped = cli("data", "check", tmp_path / "job.yaml", "--set=dataset.on_bad_row=drop").stdout
    assert "1 warning." in dropped


def test_a_classifier_s_labels_are_counted_and_its_rows_shown_with_theirs(
    cli: Cli, tiny_model: Path, tmp_path: Path
) -> None:
    rows = [{"sentence": row["text"], "label": row["label"]} for row in labelled(count=60)]
    columns = {"dataset": {"columns": {"text": "sentence"}}}
    _job(tmp_path, Case("", "", rows, {**CLASSIFIER, **columns}), tiny_model)
    shown = cli("data", "check", tmp_path / "job.yaml").stdout
    assert "Format classification: what task_type: SEQ_CLS reads." in shown
    counts = {name: (int(train), int(held)) for name, train, held in re.findall(r"^(\w+) +(\d+) +(\d+)$", shown, re.M)}
    assert {name: sum(pair) for name, pair in counts.items()} == {"queue": 30, "network": 30}
    assert "learned" not in shown and re.search(r"^Row \d+: \d+ tokens, label (queue|network)\.$", shown, re.M)
    told = json.loads(cli("data", "check", tmp_path / "job.yaml", "--json").stdout)
    assert {name: (rows["train"], rows["held_out"]) for name, rows in told["labels"].items()} == counts
    one = json.loads(cli("data", "show", tmp_path / "job.yaml", "--json").stdout)
    assert one["label"] == rows[one["row"] - 1]["label"] and not any(one["learned"])
    refused = cli("submit", tmp_path / "job.yaml", "--set=dataset.columns={}", code=2).stderr
    assert "a classifier learns from rows with text and label" in refused


def test_pairs_give_no_finding_but_how_few_are_held_out(check: Check) -> None:
    assert check(Case("", "", preferred(count=120), PAIRS)).findings == []


def test_pairs_are_counted_as_pairs_and_both_answers_shown(cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    _job(tmp_path, Case("", "", preferred(two("a long one", "it is", "no " * 40), count=59), PAIRS), tiny_model)
    shown = cli("data", "check", tmp_path / "job.yaml", "--gpu", "8GiB").stdout
    assert "data.jsonl: 54 pairs to train on, 6 held out. Format preference: what task_type: preference reads." in shown
    longer, both = (
        int(re.search(rf"^{name} .* (\d+)$", shown, re.M)[1])  # type: ignore[index]
        for name in ("longer", "learned")
    )
    assert longer < both + 40 and "such rows at once" in shown
    numbers = r"chosen (\d+) tokens, (\d+) learned; rejected (\d+) tokens, (\d+) learned"
    (found,) = re.findall(rf"^Row 60: {numbers}", shown, re.M)
    assert int(found[2]) == longer and int(found[1]) + int(found[3]) == both
    assert "  chosen:\n\n  <|im_start|>user\n" in shown and "\n\n  rejected:\n\n  <|im_start|>user\n" in shown
    one = cli("data", "show", tmp_path / "job.yaml", "--row", 60).stdout
    assert f"Row 60 of {tmp_path / 'data.jsonl'}: chosen {found[0]} tokens" in one
    assert "54 pairs to train on, 6 held out." in one
    assert "assistant\n[[it is<|im_end|>]]" in one and f"assistant\n[[{'no ' * 40}" in one
    told = json.loads(cli("data", "show", tmp_path / "job.yaml", "--row", 60, "--json").stdout)
    assert (len(told["chosen"]["input_ids"]), sum(told["rejected"]["learned"])) == (int(found[0]), int(found[3]))


def test_the_check_and_a_row_have_the_keys_of_their_page(check: Check, tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_model))
    cases = [
        Case("", "", good(), {"dataset": {"final_size": 0.1}}),
        Case("", "", with_(chat("what?", "this one ")), held_out=good(60)[40:]),
        Case("", "", labelled(), CLASSIFIER),
        Case("", "", preferred(), PAIRS),
    ]
    checked = [check(case).as_json() for case in cases]
    shown = [trained_row(_job(tmp_path, case, tiny_model), tokenizer, None).as_json() for case in cases]
    json_page.hold({"data check": checked, "data show": shown})


def test_submit_warns_of_what_needs_no_tokenizer_and_the_trainer_of_the_rest(
    cli: Cli, tiny_model: Path, tmp_path: Path
) -> None:
    rows = with_(chat("queue 0", "something else"), chat("<|im_end|>", "marked here"))
    job = _job(tmp_path, Case("", "", rows, held_out=good(60)[40:]), tiny_model)
    assert job.name == "t"
    said = cli("submit", tmp_path / "job.yaml", "--set=training.max_steps=1", "--set=evaluation.samples=0").stderr
    warned = "one prompt, several answers: 1 row whose prompt appears again with another answer (row 1)."
    warned = f"Warning: data.jsonl: {warned}"
    assert warned in said and "See the data: loractl data check " in said
    cli("worker", "--drain-when-idle", timeout=120)
    history = [
        event["text"] for event in json.loads(cli("status", 1, "--json").stdout)["events"] if event["kind"] == "warning"
    ]
    assert any("another answer (row 1)" in text for text in history)
    assert any("special token within the text (row 42)" in text for text in history)
    warnings = json.loads(cli("report", 1, "--json").stdout)["data"]["warnings"]
    assert history == [f"data: {text}" for text in warnings]


def test_rows_that_are_too_long_and_left_out_are_counted_nowhere(cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    """Check, plan, submit, the job's history and its report count the rows that are used, and warn of those alone."""
    long = [chat("queue 0", f"line {n} " * 60) for n in range(30)]  # one prompt, several answers
    _job(tmp_path, Case("", "", [*good(30), *long], {"dataset": {"max_length": 64, "on_overflow": "drop"}}), tiny_model)
    job = tmp_path / "job.yaml"
    checked = cli("data", "check", job).stdout
    told = json.loads(cli("data", "check", job, "--json").stdout)
    used = (told["train_rows"], told["held_out_rows"])
    assert sum(used) == 30 and told["too_long_rows_dropped"] == 30 and 0 < used[1] < 6
    counted = f"{used[0]} rows to train on, {used[1]} held out"
    assert f"data.jsonl: {counted}; 30 too long are left out." in checked and re.search(
        r"█ +\d+  left out$", checked, re.M
    )
    left_out = "too long, left out: 30 rows left out, with more than dataset.max_length (64) tokens"
    assert left_out in checked and "several answers" not in checked
    planned = cli("plan", job, "--gpu", "24GiB").stdout
    assert f"{counted}, 30 too long and left out." in " ".join(planned.split())
    said = cli("submit", job, "--set=training.max_steps=1", "--set=evaluation.samples=0").stderr
    assert "30 rows left out" in said and "several answers" not in said
    alone = cli("submit", job, "--set=dataset.max_length=20", code=2).stderr
    assert re.search(
        r"has no row to train on of at most 20 tokens: the shortest has \d\d, the longest \d{2,3}\n", alone
    )
    cli("worker", "--drain-when-idle", timeout=120)
    history = [event["text"] for event in json.loads(cli("status", 1, "--json").stdout)["events"]]
    assert any(text.startswith(f"data: {counted};") for text in history)
    data = json.loads(cli("report", 1, "--json").stdout)["data"]
    assert (data["train_rows"], data["held_out_rows"], data["too_long_rows_dropped"]) == (*used, 30)
    assert not [text for text in data["warnings"] if "several answers" in text]


def test_a_plan_of_counted_rows_says_what_the_job_waits_for(cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    """Submit reserves for rows of max_length: it takes short rows under a long one for long ones."""
    base = shutil.copytree(tiny_model, tmp_path / "base")
    numbers = json.loads((base / "config.json").read_text())
    large = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128}
    (base / "config.json").write_text(json.dumps({**numbers, **large, "num_attention_heads": 32}))
    long = {"dataset": {"max_length": 4096}, "method": "lora", "training": {"gradient_checkpointing": False}}
    spec = _job(tmp_path, Case("", "", good(30), long), base)
    planned = json.loads(cli("plan", tmp_path / "job.yaml", "--gpu", "24GiB", "--json").stdout)
    lora, longest = planned["methods"]["lora"], max(planned["lengths"][name] for name in ("train", "evaluate"))
    assert lora["submitted_bytes"] == plan_job(spec, "t", {}, None).plan.need.lora > 24 * GIB > lora["reserved_bytes"]
    short = spec.model_copy(update={"dataset": spec.dataset.model_copy(update={"max_length": longest})})
    # rows of max_length are all as long as the longest, and counted ones as long as they are
    assert lora["reserved_bytes"] <= plan_job(short, "t", {}, None).plan.need.lora < 1.02 * lora["reserved_bytes"]
    alone = "--set=resources.cards=1"
    said = " ".join(cli("plan", tmp_path / "job.yaml", "--gpu", "24GiB", alone).stdout.split())
    waits = f"it waits for {gib(lora['submitted_bytes'])} GiB with lora, which no card has."
    assert f"{waits} With --set dataset.max_length={longest} it waits for rows of that length." in said


def test_a_classifier_whose_label_has_only_long_rows_does_not_learn_it(tiny_model: Path, tmp_path: Path) -> None:
    rows = [*labelled(), *({"text": f"long {n} " * 60, "label": "storage"} for n in range(6))]
    dropping = {"dataset": {"max_length": 64, "on_overflow": "drop"}}
    spec = _job(tmp_path, Case("", "", rows, {**CLASSIFIER, **dropping}, held_out=other_tickets()), tiny_model)
    tokenizer = load_tokenizer(str(tiny_model))
    data = prepare_data(spec.dataset, spec.dataset.path, spec.dataset.eval_path, None, tokenizer, None)
    assert data.label_names == ("network", "queue") == tuple(check_data(spec, tokenizer).labels)
    assert {name: counts["train"] for name, counts in data.label_counts().items()} == {"network": 20, "queue": 20}
    other = [*other_tickets(), {"text": "a short one", "label": "storage"}]
    spec = _job(tmp_path, Case("", "", rows, {**CLASSIFIER, **dropping}, held_out=other), tiny_model)
    with pytest.raises(DataError, match="row 11"):
        prepare_data(spec.dataset, spec.dataset.path, spec.dataset.eval_path, None, tokenizer, None)
    assert [finding.kind for finding in check_data(spec, tokenizer).errors] == ["unknown label"]


def test_sharegpt_and_columns_of_other_names_are_the_same_conversations(tiny_model: Path, tmp_path: Path) -> None:
    """ShareGPT's own names, and any names by dataset.columns, give the tokens that `messages` gives."""
    write_helpdesk(tmp_path / "plain.jsonl")
    rows = [json.loads(line)["messages"] for line in (tmp_path / "plain.jsonl").read_text().splitlines()]
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    shared = [{"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in row]} for row in rows]
    mapped = [{"talk": [{"who": m["role"], "what": m["content"]} for m in row]} for row in rows]
    columns = {"messages": "talk", "role": "who", "content": "what"}
    tokenizer = load_tokenizer(str(tiny_model))
    found = [
        check_data(_job(tmp_path, Case("", "", [{"messages": row} for row in rows]), tiny_model), tokenizer),
        check_data(_job(tmp_path, Case("", "", shared), tiny_model), tokenizer),
        check_data(_job(tmp_path, Case("", "", mapped, {"dataset": {"columns": columns}}), tiny_model), tokenizer),
    ]
    assert [checked.errors for checked in found] == [[], [], []]
    assert found[0].rows == found[1].rows == found[2].rows
    assert [checked.format for checked in found] == ["messages", "sharegpt", "messages"]


def _job(folder: Path, case: Case, model: Path) -> JobSpec:
    def write(name: str, rows: list[Row] | str) -> str:
        text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
        (folder / name).write_bytes(text.encode("utf-8", "surrogateescape"))
        return name

    dataset = {"path": write(case.name, case.rows), **case.spec.get("dataset", {})}
    if case.held_out is not None:
        dataset["eval_path"] = write("held.jsonl", case.held_out)
    spec = {"name": "t", "base_model": str(model), **case.spec, "dataset": dataset}
    (folder / "job.yaml").write_text(yaml.safe_dump(spec))
    return load_spec(folder / "job.yaml")


def test_a_row_is_shown_though_another_one_is_bad(cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    _job(tmp_path, Case("", "", [chat("a", " "), *good(40)], held_out=good(60)[40:]), tiny_model)
    assert "error: row 1" not in cli("data", "show", tmp_path / "job.yaml", "--row", 3).stdout
    refused = cli("data", "show", tmp_path / "job.yaml", "--row", 1, code=2).stderr
    assert "row 1: message 2: the assistant's answer is empty" in refused


def test_final_rows_of_a_file_beside_the_job_s_are_counted_by_check_and_show(
    cli: Cli, tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "final.jsonl").write_text("".join(json.dumps(row) + "\n" for row in good(60)[40:]))
    _job(tmp_path, Case("", "", good(40), {"dataset": {"final_path": "final.jsonl"}}), tiny_model)
    for command in ("check", "show"):
        shown = cli("data", command, tmp_path / "job.yaml").stdout
        assert "36 rows to train on, 4 held out, 20 final" in shown, command
    planned = cli("plan", tmp_path / "job.yaml", "--gpu", "24GiB").stdout
    assert "36 rows to train on, 4 held out, 20 final." in " ".join(planned.split())
    (tmp_path / "final.jsonl").write_text(json.dumps(chat("queue 99", "line " * 4000)) + "\n")
    planned = cli("plan", tmp_path / "job.yaml", "--gpu", "24GiB", "--set=dataset.on_overflow=drop").stdout
    assert "final.jsonl: has no row that is final of at most 1024 tokens" in " ".join(planned.split())
