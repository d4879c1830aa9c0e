"""From a data set's rows to token ids and labels: the chat template, what is learned, and what is too long.

Loss falls on answers only (on everything for `text`), the end-of-sequence token is learned, and there is one BOS at
most. For a classifier loss falls on a row's label alone, and its text is what the tokenizer makes of it. Tokenised data
are cached by what decides them: content, tokenizer, template, format, length.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError

from loractl.common.artifacts import sha256_of
from loractl.common.data.labels import labels_of
from loractl.common.data.rows import Example, RawRow, detect_format, parse_examples, read_rows, split_data
from loractl.common.errors import DataError, LoractlError
from loractl.common.job.spec import DataFormat, DatasetSpec, Overflow
from loractl.common.job.status import Reason
from loractl.worker.base.failure import TrainingFailed
from loractl.worker.base.hub import Refusal, cached_if_away, chain_of, known_commit, reaching_the_hub, refusal

IGNORED = -100
"""The label that cross-entropy leaves out (torch.nn.CrossEntropyLoss's default ignore_index)."""

_CACHE_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class TokenRow:
    """One tokenised row; `labels` equal `input_ids` where the model learns to go on and IGNORED elsewhere."""

    number: int
    input_ids: list[int]
    labels: list[int]
    starts: tuple[int, ...] = ()  # of a packed row: where its second and further examples begin
    label: int | None = None  # of a classifier's row: its place in PreparedData.label_names


@dataclass(frozen=True, kw_only=True)
class TokenSet:
    """Tokenised rows, and what became of those that were too long."""

    rows: list[TokenRow]
    truncated: int
    too_long: int  # rows over max_length that were dropped

    @property
    def tokens(self) -> int:
        return sum(len(r.input_ids) for r in self.rows)

    @property
    def supervised(self) -> int:
        return sum(label != IGNORED for r in self.rows for label in r.labels)


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """Everything that the recipe and the evaluation need to know about the data."""

    format: DataFormat
    why: str
    train: TokenSet
    held_out: TokenSet
    train_examples: list[Example]
    held_out_examples: list[Example]  # the same rows, in the same order, as held_out.rows
    dropped: list[str]  # a sentence for each row that on_bad_row: drop left out
    overlap: int  # rows of eval_path left out because they are trained on
    sha256: str | None
    warnings: tuple[str, ...] = ()  # what looks wrong, and is trained on all the same
    packed: list[TokenRow] | None = None  # the rows to train on, several examples in one
    regression: TokenSet | None = None  # rows of another kind, to show what was forgotten
    label_names: tuple[str, ...] = ()  # what a classifier learns to tell apart; empty for any other job
    commits: dict[str, str] = field(default_factory=dict)  # of the data sets on the hub, by what they are for

    @property
    def trained_rows(self) -> list[TokenRow]:
        """The rows as the Trainer gets them."""
        return self.train.rows if self.packed is None else self.packed

    def facts(self) -> dict[str, Any]:
        """What the report says about the data."""
        return {
            "format": self.format.value,
            "why": self.why,
            "sha256": self.sha256,
            "train_rows": len(self.train.rows),
            "train_rows_sha256": _hash_of(self.train_examples),
            "commits": dict(self.commits),
            "held_out_rows": len(self.held_out.rows),
            "held_out_sha256": _hash_of(self.held_out_examples),
            "train_tokens": self.train.tokens,
            "supervised_tokens": self.train.supervised,
            "truncated_rows": self.train.truncated + self.held_out.truncated,
            "too_long_rows_dropped": self.train.too_long + self.held_out.too_long,
            "bad_rows_dropped": len(self.dropped),
            "overlap_rows_dropped": self.overlap,
            "bad_rows": self.dropped[:20],
            "warnings": list(self.warnings),
            "labels": self.label_counts() or None,
        }

    def label_counts(self) -> dict[str, dict[str, int]]:
        """How many rows a classifier's label has, those to train on and those held out."""
        train, held_out = (Counter(row.label for row in tokens.rows) for tokens in (self.train, self.held_out))
        names = enumerate(self.label_names)
        return {name: {"train": train[place], "held_out": held_out[place]} for place, name in names}


def prepare_data(
    dataset: DatasetSpec, data_path: str, eval_path: str | None, sha256: str | None, tokenizer: Any, cache: Path | None
) -> PreparedData:
    """Read, check, split and tokenise. Raises DataError with file, row and what was expected."""
    rows, commit = load_pinned(data_path, "train")
    held_rows, held_commit = load_pinned(eval_path, "test") if eval_path else (None, None)
    commits = {"path": commit, "eval_path": held_commit}
    split = split_data(dataset, rows, held_rows)
    file, held_file = dataset.path, dataset.eval_path or dataset.path
    key = _cache_key(dataset, tokenizer, split.format)
    label_names = labels_of(split.train)
    train_set = _tokenise(split.train, file, dataset, tokenizer, split.format, cache, key)
    held_set = _tokenise(split.held_out, held_file, dataset, tokenizer, split.format, cache, key)
    if label_names:
        train_set, held_set = (
            _with_labels(tokens, examples, label_names)
            for tokens, examples in ((train_set, split.train), (held_set, split.held_out))
        )
    kept = {r.number for r in held_set.rows}
    return PreparedData(
        format=split.format,
        why=split.why,
        train=train_set,
        held_out=held_set,
        dropped=split.dropped,
        overlap=split.overlap,
        sha256=sha256,
        train_examples=split.train,
        held_out_examples=[e for e in split.held_out if e.number in kept],
        label_names=label_names,
        commits={key: commit for key, commit in commits.items() if commit},
    )


def _with_labels(tokens: TokenSet, examples: Sequence[Example], label_names: Sequence[str]) -> TokenSet:
    """The rows with their labels' places. They are not in the cache: a label's place depends on all training rows."""
    place = {name: n for n, name in enumerate(label_names)}
    label_of = {e.number: place[e.label] for e in examples if e.label is not None}
    return replace(tokens, rows=[replace(row, label=label_of[row.number]) for row in tokens.rows])


def prepare_regression(
    dataset: DatasetSpec, file: str, path: str, train: Sequence[Example], tokenizer: Any
) -> tuple[TokenSet, str | None]:
    """The rows of evaluation.regression, those that are trained on left out, and their commit on the hub.

    Raises DataError.
    """
    rows, commit = load_pinned(path, "test")
    format = detect_format(rows, file)[0]
    trained = {example.content_hash() for example in train}
    examples = [e for e in parse_examples(rows, format, file, dataset.on_bad_row)[0] if e.content_hash() not in trained]
    if not examples:
        raise DataError(file, "has no row that is not trained on as well", kind="overlap")
    tolerant = dataset.model_copy(update={"on_overflow": Overflow.TRUNCATE})
    return fit_examples(examples, file, tolerant, tokenizer, format), commit


def _hash_of(examples: Sequence[Example]) -> str:
    """Equal for the same rows in the same order."""
    return hashlib.sha256("".join(example.content_hash() for example in examples).encode()).hexdigest()


def encode(example: Example, tokenizer: Any, format: DataFormat) -> tuple[list[int], list[int]]:
    """(input_ids, labels) of one example, untruncated.

    Raises ValueError when the chat template does not render a conversation as a prefix of its continuation, and for a
    text of no token.
    """
    if example.turns:
        return _encode_chat(example, tokenizer)
    if format is DataFormat.CLASSIFICATION:
        ids = list(tokenizer(example.text).input_ids)
        if not ids:
            raise ValueError("has a text of which the model's tokenizer makes no token")
        return ids, [IGNORED] * len(ids)
    return _encode_text(example, tokenizer, learn_all=format is DataFormat.TEXT)


def prompt_of(example: Example, tokenizer: Any) -> tuple[list[int], str, str] | None:
    """(prompt ids, prompt for people, expected answer) of the example's last answer; None for plain text."""
    if example.turns:
        last = max(i for i, turn in enumerate(example.turns) if turn.role == "assistant")
        rendered = _render(example, last, tokenizer, generation_prompt=True)
        shown = (
            example.turns[last - 1].content
            if last == 1
            else "\n".join(f"{t.role}: {t.content}" for t in example.turns[:last])
        )
        return tokenizer(rendered, add_special_tokens=False).input_ids, shown, example.turns[last].content
    if example.prompt:
        return (
            without_eos(tokenizer(example.prompt).input_ids, tokenizer),
            example.prompt,
            example.text[len(example.prompt) :],
        )
    return None


def inputs_of(row: TokenRow) -> dict[str, list[int]]:
    """A row as a data set's item, for `collate`."""
    if row.label is not None:
        return {"input_ids": row.input_ids, "label": [row.label]}
    return {"input_ids": row.input_ids, "labels": row.labels, "starts": list(row.starts)}


def collate(rows: Sequence[dict[str, list[int]]], pad: int) -> dict[str, torch.Tensor]:
    """Right-padded int64 tensors of shape (rows, longest row): input_ids, labels and attention_mask; for packed rows
    position_ids in its place, which begin anew with every example, and with the padding. A classifier's labels have
    the shape (rows,)."""
    longest = max(len(r["input_ids"]) for r in rows)

    def padded(values: Callable[[dict[str, list[int]]], list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([(v := values(r)) + [fill] * (longest - len(v)) for r in rows])

    mask = padded(lambda r: [1] * len(r["input_ids"]), 0)
    if "label" in rows[0]:
        labels = torch.tensor([r["label"][0] for r in rows])
        return {"input_ids": padded(lambda r: r["input_ids"], pad), "labels": labels, "attention_mask": mask}
    batch = {"input_ids": padded(lambda r: r["input_ids"], pad), "labels": padded(lambda r: r["labels"], IGNORED)}
    if any(r.get("starts") for r in rows):
        return batch | {"position_ids": torch.tensor([_positions(r, longest) for r in rows])}
    return batch | {"attention_mask": mask}


def _positions(row: dict[str, list[int]], longest: int) -> list[int]:
    borders = sorted({0, *row.get("starts", ()), len(row["input_ids"]), longest})
    return [place for begin, end in itertools.pairwise(borders) for place in range(end - begin)]


def load_rows(path: str, split: str = "train") -> list[RawRow]:
    """The rows of a local file, or of a split of a data set on the hub. Raises DataError and TrainingFailed."""
    return load_pinned(path, split)[0]


def load_pinned(path: str, split: str) -> tuple[list[RawRow], str | None]:
    """The rows, and the commit of the data set on the hub that they are of. Raises DataError and TrainingFailed."""
    if Path(path).is_absolute():
        return read_rows(Path(path)), None
    from datasets import load_dataset_builder
    from datasets.exceptions import DatasetsError

    name, _, revision = path.partition("@")
    try:
        with reaching_the_hub(), cached_if_away(name, revision or None) as away:
            builder = load_dataset_builder(name, revision=revision or None)
            _check_files_are_remote(path, builder.config.data_files)
            builder.download_and_prepare()
    except (OSError, ValueError, DatasetsError) as error:
        raise _refused(path, error) from error
    commit = str(builder.hash)
    if away and commit != known_commit(name, revision or None):
        what = f"for dataset.path {path}, and the newest in this worker's cache is another commit ({commit})"
        raise TrainingFailed(Reason.TRAINER_ERROR, f"{Refusal.AWAY} {what}")
    try:
        dataset = builder.as_dataset(split=split)
    except ValueError as error:
        raise DataError(path, f"has no such split on the hub: {_first_line(error)}") from error
    return [RawRow(number=n, value=value) for n, value in enumerate(dataset, start=1)], commit


def _refused(path: str, error: BaseException) -> LoractlError:
    """What a failed look into the hub means. Raises OSError for a full disk, which is none of the data's fault."""
    for each in chain_of(error):
        if isinstance(each, OSError) and each.errno in (errno.ENOSPC, errno.EDQUOT):
            raise each
    answer = refusal(error)
    if answer is Refusal.AWAY:
        what = f"dataset.path {path} is no file, and the hub can't be reached to look there"
        return TrainingFailed(Reason.TRAINER_ERROR, what)
    if answer is Refusal.NO_REPOSITORY:
        return DataError(path, f"is neither a file here nor a data set on the hub: {answer}")
    cause = error
    while cause.__cause__ is not None:  # datasets says "an error occurred", and its cause which one
        cause = cause.__cause__
    return DataError(path, f"can't be read from the hub: {answer or _first_line(cause)}")


def _first_line(error: BaseException) -> str:
    first: list[str] = str(error).strip().splitlines()
    return first[0] if first else type(error).__name__


def _check_files_are_remote(path: str, files: Mapping[str, Sequence[str]] | None) -> None:
    """A data set's own card lists its files, and could list files of this box. Raises TrainingFailed."""
    for name in (name for part in (files or {}).values() for name in part):
        if not str(name).startswith("hf://"):
            raise TrainingFailed(Reason.BAD_SPEC, f"the data set {path} names a file that is not on the hub: {name}")


def rendered(example: Example, tokenizer: Any) -> str:
    """A conversation as the chat template writes it, up to its last answer. Raises ValueError where it refuses it."""
    last = max(i for i, turn in enumerate(example.turns) if turn.role == "assistant")
    return _render(example, last + 1, tokenizer)


def _render(example: Example, end: int, tokenizer: Any, *, generation_prompt: bool = False) -> str:
    messages = [{"role": t.role, "content": t.content} for t in example.turns[:end]]
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt)
    except TemplateError as error:  # what a template raises by itself, like "System role not supported"
        raise ValueError(f"the model's chat template refuses it: {error}") from error
    return text


def _encode_chat(example: Example, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Render the whole conversation once, and learn the characters of each answer up to its end-of-sequence token."""
    last = max(i for i, turn in enumerate(example.turns) if turn.role == "assistant")
    text = _render(example, last + 1, tokenizer)
    spans = []
    for place, turn in enumerate(example.turns[: last + 1]):
        if turn.role != "assistant":
            continue
        before = _render(example, place, tokenizer, generation_prompt=True)
        after = _render(example, place + 1, tokenizer)
        if not (text.startswith(after) and after.startswith(before)):
            raise ValueError("the model's chat template changes earlier turns, so answers can't be told from the rest")
        eos = after.find(tokenizer.eos_token, len(before) + len(turn.content.rstrip()))
        spans.append((len(before), len(after) if eos < 0 else eos + len(tokenizer.eos_token)))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = list(encoded.input_ids), encoded.offset_mapping
    learned = [any(start <= a and b <= end for start, end in spans) and a < b for a, b in offsets]
    labels = [token if learn else IGNORED for token, learn in zip(ids, learned, strict=True)]
    if text.find(tokenizer.eos_token, spans[-1][0]) < 0:  # the template has no end: teach one
        ids.append(tokenizer.eos_token_id)
        labels.append(tokenizer.eos_token_id)
    return ids, labels


def _encode_text(example: Example, tokenizer: Any, *, learn_all: bool) -> tuple[list[int], list[int]]:
    """Prompt and completion are tokenised as one text: a token that crosses the border counts as prompt."""
    encoded = tokenizer(example.text, return_offsets_mapping=True)
    ids, offsets = list(encoded.input_ids), list(encoded.offset_mapping)
    trimmed = without_eos(ids, tokenizer)
    labels = [
        token if a < b and (learn_all or a >= len(example.prompt)) else IGNORED
        for token, (a, b) in zip(trimmed, offsets[: len(trimmed)], strict=True)
    ]
    return [*trimmed, tokenizer.eos_token_id], [*labels, tokenizer.eos_token_id]


def without_eos(ids: Sequence[int], tokenizer: Any) -> list[int]:
    """Some tokenizers close every text themselves; the end is added once, later."""
    kept = list(ids)
    while len(kept) > 1 and kept[-1] == tokenizer.eos_token_id:
        kept.pop()
    return kept


def _tokenise(
    examples: list[Example],
    file: str,
    dataset: DatasetSpec,
    tokenizer: Any,
    format: DataFormat,
    cache: Path | None,
    key: str,
) -> TokenSet:
    content = hashlib.sha256("".join(f"{e.number}:{e.content_hash()} " for e in examples).encode()).hexdigest()
    folder = cache / "tokenised" / f"{content[:32]}-{key[:32]}" if cache else None
    if folder and (folder / "set.json").exists():
        raw = json.loads((folder / "set.json").read_text())
        return TokenSet(rows=[TokenRow(**row) for row in raw.pop("rows")], **raw)
    tokens = fit_examples(examples, file, dataset, tokenizer, format)
    if folder:
        rows = [{"number": r.number, "input_ids": r.input_ids, "labels": r.labels} for r in tokens.rows]
        _write_cache(folder, {**vars(tokens), "rows": rows})
    return tokens


def fit_examples(
    examples: list[Example], file: str, dataset: DatasetSpec, tokenizer: Any, format: DataFormat
) -> TokenSet:
    """Tokenise each example and apply on_overflow to those over max_length."""
    rows, truncated, too_long = [], 0, 0
    for example in examples:
        try:
            ids, labels = encode(example, tokenizer, format)
        except ValueError as error:
            raise DataError(file, str(error), row=example.number) from error
        if len(ids) > dataset.max_length:
            if dataset.on_overflow is Overflow.ERROR:
                raise DataError(
                    file,
                    f"has {len(ids)} tokens, dataset.max_length is {dataset.max_length}",
                    row=example.number,
                    hint="raise it, or set dataset.on_overflow to truncate or drop",
                )
            if dataset.on_overflow is Overflow.DROP:
                too_long += 1
                continue
            ids, labels, truncated = ids[: dataset.max_length], labels[: dataset.max_length], truncated + 1
            if format is DataFormat.CLASSIFICATION:  # as whoever uses it will cut: some tokenizers close every text
                ids = list(tokenizer(example.text, truncation=True, max_length=dataset.max_length).input_ids)
        if format is not DataFormat.CLASSIFICATION and all(
            label == IGNORED for label in labels[1:]
        ):  # the first token has no context to be predicted from
            raise DataError(
                file,
                f"has no token to learn within dataset.max_length ({dataset.max_length})",
                row=example.number,
                hint="raise it, or set dataset.on_overflow: drop",
            )
        rows.append(TokenRow(number=example.number, input_ids=ids, labels=labels))
    if not rows:
        raise DataError(file, f"has no row of at most {dataset.max_length} tokens", hint="raise dataset.max_length")
    return TokenSet(rows=rows, truncated=truncated, too_long=too_long)


def _cache_key(dataset: DatasetSpec, tokenizer: Any, format: DataFormat) -> str:
    """Changes with whatever changes the tokens of the same content."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    parts = [
        _CACHE_VERSION,
        vocabulary,
        tokenizer.chat_template,
        tokenizer.eos_token,
        format.value,
        dataset.max_length,
        dataset.on_overflow.value,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _write_cache(folder: Path, value: dict[str, Any]) -> None:
    """Written aside and renamed: two trainers may prepare the same data at once."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent))
    (aside / "set.json").write_text(json.dumps(value))
    try:
        aside.rename(folder)
    except OSError:
        shutil.rmtree(aside)  # the other one was first; its content is the same
        if not folder.exists():
            raise


def dataset_hash(path: str) -> str | None:
    """sha256 of a local data file; None for a hub id."""
    return sha256_of(Path(path)) if Path(path).exists() else None
