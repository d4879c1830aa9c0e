"""Findings about a job's data after the tokenizer and the chat template: one finding a kind.

common/data/findings.py has what the rows show without a tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loractl.common.data.example import Example
from loractl.common.data.findings import Finding, about_rows
from loractl.common.job.sections import DataFormat, DatasetSpec, Overflow
from loractl.common.job.spec import JobSpec
from loractl.common.memory.config import find_config

from .tokens import IGNORED, TokenRow, rendered

FEW_STEPS = 10
"""Fewer optimizer steps than these hardly move an adapter."""


def check_template(examples: Sequence[Example], tokenizer: Any) -> list[Finding]:
    """Messages that the chat template leaves out, and text that the tokenizer takes for its own marks."""
    marks = [mark for mark in tokenizer.all_special_tokens if len(mark) > 2]
    marked = [e.number for e in examples if any(m in part for m in marks for part in _said(e))]
    hint = "the tokenizer ends or begins a message there; take them out of the text"
    findings = about_rows("warning", "special tokens in text", "{n} with a special token within the text", marked, hint)
    dropped: dict[str, list[int]] = {}
    for example in examples:
        if not example.turns:
            continue
        try:
            text = rendered(example, tokenizer)
        except ValueError:
            continue  # encoding says it
        for role in {turn.role for turn in example.turns if turn.content.strip() not in text}:
            dropped.setdefault(role, []).append(example.number)
    for role, numbers in dropped.items():
        text = f"{{n}} whose {role} message the model's chat template leaves out or changes"
        findings += about_rows("warning", f"dropped {role} message", text, numbers)
    return findings


def check_tokens(rows: Sequence[TokenRow], spec: JobSpec, tokenizer: Any, *, every: bool = True) -> list[Finding]:
    """What the token ids show. `every`: these are all the rows, so that steps can be counted."""
    findings = _marks(rows, spec.dataset.max_length, tokenizer)
    room = context_length(spec.base_model)
    if room is not None and spec.dataset.max_length > room:
        beyond = [r.number for r in rows if len(r.input_ids) > room]
        text = f"{{n}} of more tokens than the model's {room} positions"
        findings += about_rows("warning", "beyond the context", text, beyond, f"dataset.max_length: {room}")
    generated = spec.evaluation.max_new_tokens
    if spec.evaluation.samples and any(IGNORED in r.labels for r in rows):
        long = [r.number for r in rows if _last_answer(r) > generated]
        if 20 * len(long) > len(rows):
            text = f"{{n}} with an answer longer than evaluation.max_new_tokens ({generated}): the report will cut it"
            findings += about_rows("note", "answers longer than generated", text, long)
    return findings + (_few_steps(len(rows), spec) if every else [])


def _marks(rows: Sequence[TokenRow], most: int, tokenizer: Any) -> list[Finding]:
    """The tokenizer's own marks: where a row begins, where it ends, and what is unknown."""
    bos, eos, unknown = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id
    doubled = [r.number for r in rows if bos is not None and r.input_ids[:2] == [bos, bos] and bos != eos]
    hint = "take it out of the text: the tokenizer puts one there"
    findings = about_rows("warning", "doubled BOS", "{n} beginning with two BOS tokens", doubled, hint)
    open_ended = [r.number for r in rows if learned_tokens(r) and eos not in r.labels[:most]]
    text = "{n} where no end-of-sequence token is learned: the model will not know where to stop"
    findings += about_rows("warning", "EOS is not learned", text, open_ended)
    if unknown is not None and unknown not in (bos, eos, tokenizer.pad_token_id):
        strange = [r.number for r in rows if unknown in r.input_ids]
        findings += about_rows(
            "warning", "unknown tokens", "{n} with characters that the tokenizer does not know", strange
        )
    return findings


def _few_steps(rows: int, spec: JobSpec) -> list[Finding]:
    batch = spec.training.effective_batch
    steps = int(-(-rows // batch) * (spec.training.num_train_epochs or 1))
    if spec.training.max_steps is not None or steps >= FEW_STEPS:
        return []
    text = f"only {steps} optimizer step{'' if steps == 1 else 's'}: {rows} rows, {batch} a step"
    hint = "lower training.gradient_accumulation_steps, or train more epochs"
    return [Finding(level="warning", kind="few steps", text=text, hint=hint)]


def check_length(rows: Sequence[TokenRow], dataset: DatasetSpec) -> list[Finding]:
    """What dataset.max_length does to the rows."""
    most = dataset.max_length
    long = [row for row in rows if len(row.input_ids) > most]
    numbers = [row.number for row in long]
    longest = max((len(row.input_ids) for row in long), default=0)
    hint = f"dataset.max_length: {longest} would hold them all"
    if dataset.on_overflow is Overflow.ERROR:
        text = f"{{n}} of more than dataset.max_length ({most}) tokens"
        return about_rows("error", "too long", text, numbers, hint)
    if dataset.on_overflow is Overflow.DROP:
        text = f"{{n}} left out, with more than dataset.max_length ({most}) tokens"
        return about_rows("warning", "too long, left out", text, numbers, hint)
    learned_there = dataset.format is not DataFormat.CLASSIFICATION  # a classifier learns no token
    empty = [row.number for row in long if learned_there and all(label == IGNORED for label in row.labels[1:most])]
    text = f"{{n}} with no token to learn within dataset.max_length ({most})"
    findings = about_rows("error", "no learned token", text, empty, hint)
    cut = [row.number for row in long if row.number not in set(empty)]
    share = 100 * sum(len(row.input_ids) - most for row in long) / max(1, sum(len(r.input_ids) for r in rows))
    text = f"{{n}} cut at dataset.max_length ({most}), which takes {share:.0f} % of all tokens"
    return findings + about_rows("warning", "cut rows", text, cut, hint)


def context_length(base_model: str) -> int | None:
    """Positions that a model in a folder or the local cache was made for; None where its config does not say."""
    path = find_config(base_model)
    if path is None:
        return None
    config = json.loads(Path(path).read_text("utf-8"))
    config = config.get("text_config", config)
    positions = next((config[k] for k in ("max_position_embeddings", "n_positions") if config.get(k)), None)
    return int(positions) if positions else None


def learned_tokens(row: TokenRow) -> int:
    return sum(label != IGNORED for label in row.labels)


def _last_answer(row: TokenRow) -> int:
    """Tokens of the last stretch that is learned."""
    count = 0
    for label in reversed(row.labels):
        if label == IGNORED and count:
            break
        count += label != IGNORED
    return count


def _said(example: Example) -> list[str]:
    return [turn.content for turn in example.turns] or [example.text]
