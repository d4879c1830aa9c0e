"""The sections of the job file: their keys, with types, limits and defaults.

Keys are the libraries' own names (peft's LoraConfig, transformers' TrainingArguments, TRL's for pairs), so that nothing
is translated.
"""

from __future__ import annotations

import enum
import json
import math
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError, PydanticKnownError

from loractl.common.adapter_config import is_module_name
from loractl.common.answer_score import AnswerScore
from loractl.common.channels import LAB
from loractl.common.errors import UsageError
from loractl.common.module_pattern import ModulePattern
from loractl.common.units import LARGEST, LAST_NUMBER, parse_duration, parse_size
from loractl.common.verdict import NEW_ROWS

from .method import MOST_CARDS, Checkpointing, Method
from .names import parse_reference
from .slices import HINT, parse_split

DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
"""Endings of the data files that loractl reads."""


AS_WRITTEN = "as written"
"""Validation context of a person's file: keys that contradict each other are refused. A stored spec has every key."""


class TaskType(enum.StrEnum):
    """What the model learns to do, by peft's names."""

    CAUSAL_LM = "CAUSAL_LM"  # to continue a text, as answers do
    SEQ_CLS = "SEQ_CLS"  # to name a text's label, with a head that has nothing but labels
    PREFERENCE = "preference"  # which of two answers is preferred


class DataFormat(enum.StrEnum):
    """The shape of a data set's rows."""

    AUTO = "auto"
    MESSAGES = "messages"  # {"messages": [{"role": ..., "content": ...}, ...]}
    SHAREGPT = "sharegpt"  # {"conversations": [{"from": ..., "value": ...}, ...]}
    ALPACA = "alpaca"  # {"instruction": ..., "input": ..., "output": ...}
    PROMPT_COMPLETION = "prompt_completion"  # {"prompt": ..., "completion": ...}
    TEXT = "text"  # {"text": ...}
    CLASSIFICATION = "classification"  # {"text": ..., "label": ...}, for SEQ_CLS alone
    PREFERENCE = "preference"  # {"prompt": [...], "chosen": [...], "rejected": [...]}, for preference alone
    PREFERENCE_TEXT = "preference_text"  # the same with plain text, which no chat template sees


PLAIN = (DataFormat.TEXT, DataFormat.PROMPT_COMPLETION, DataFormat.CLASSIFICATION, DataFormat.PREFERENCE_TEXT)
"""Formats whose rows are taken as they are."""


class PromptTemplate(enum.StrEnum):
    """What is written around the turns of a conversation."""

    CHAT = "chat"  # what the model's own chat template writes
    ALPACA = "alpaca"  # "Below is an instruction that describes a task. ...", as Stanford Alpaca and Axolotl do


class RowFields(enum.StrEnum):
    """What is read of a row."""

    ALL = "all"  # and unread fields are reported
    TEXT = "text"  # roles and contents alone, as loractl 0.2 and earlier did


class Overflow(enum.StrEnum):
    """What happens to a row that is longer than max_length."""

    TRUNCATE = "truncate"
    DROP = "drop"
    ERROR = "error"


class BadRow(enum.StrEnum):
    """What happens to a row that can't be learned from: an empty answer, a wrong role, a missing column."""

    ERROR = "error"
    DROP = "drop"


class Metric(enum.StrEnum):
    """What the report measures on held-out rows, for the base and the tuned model."""

    LOSS = "loss"
    PERPLEXITY = "perplexity"
    TOKEN_ACCURACY = "token_accuracy"  # noqa: S105
    ROUGE = "rouge"
    EXACT_MATCH = "exact_match"
    LABELS = "labels"  # accuracy, macro F1 and confusion, where answers are labels
    PREFERENCES = "preferences"  # how often and by how much the chosen answer is the likelier one of a pair
    CONTEXT = "context"  # later answers of a conversation, and what the earlier answers are worth to them


NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("holds control characters")
    return text


def one_or_list(value: Any, noun: str, names: Sequence[str], in_a_list: Sequence[str], example: str) -> str | list[str]:
    """One name, or a list of different ones. Not a union for pydantic: it would complain once for each kind."""
    if not isinstance(value, list):
        if value not in names:
            raise PydanticKnownError("enum", {"expected": ", ".join(names)})
        return str(value)
    for name in value:
        if name not in in_a_list:
            raise ValueError(f"{json.dumps(name, default=str)} is not one of {', '.join(in_a_list)}")
    if not value:
        raise ValueError(f"is empty; write {example}")
    if len(set(value)) < len(value):
        raise ValueError(f"names the same {noun} twice")
    return [str(name) for name in value]


def _methods(value: Any) -> Method | list[Method]:
    example = "auto, lora, qlora, or a list like [lora, qlora]"
    found = one_or_list(value, "method", list(Method), (Method.LORA, Method.QLORA), example)
    return Method(found) if isinstance(found, str) else [Method(name) for name in found]


def _predecessor(value: Any) -> int | str:
    if isinstance(value, str) and re.fullmatch(NAME, value) and not value.isdigit():
        return value
    if type(value) is int and 1 <= value <= LAST_NUMBER:
        return value
    what = f"{json.dumps(value, default=str)} is not a job"
    raise ValueError(f"{what}; write its number, or its name in the same submit, like 12 or tickets")


def _predecessors(value: Any) -> list[int | str]:
    """Jobs by number or name, one or a list. Not a union for pydantic: it would complain once for each kind."""
    named = [_predecessor(one) for one in (value if isinstance(value, list) else [value])]
    if len(set(named)) < len(named):
        raise ValueError("names a job twice")
    return named


def _cards(value: Any) -> int | Literal["auto"]:
    """A number of cards or auto. Not limits of a union: it would complain once for each kind."""
    if value == "auto":
        return "auto"
    if type(value) is not int or not 1 <= value <= MOST_CARDS:
        raise ValueError(f"is not a number of cards: auto, or 1 to {MOST_CARDS} of one box")
    return value


_TRUTH = TypeAdapter(bool)


def _checkpointing(value: Any) -> Checkpointing:
    """Whether, or half. Not as a union: it would complain once for each kind."""
    if value == "half":
        return "half"
    try:
        return _TRUTH.validate_python(value)
    except ValidationError:
        raise ValueError("is not true, false or half") from None


def _steps_or_share(value: Any) -> int | float:
    """Whole steps, or below 1 a share of all steps. Not limits of a union: it would complain once for each kind."""
    try:
        number = float("" if isinstance(value, bool) else value)
    except (TypeError, ValueError):
        raise PydanticKnownError("float_type") from None
    if not number > 0:
        raise PydanticKnownError("greater_than", {"gt": 0})
    if number > LARGEST:
        raise PydanticKnownError("less_than_equal", {"le": LARGEST})
    if number >= 1 and not number.is_integer():
        raise ValueError("is not a whole number; below 1 it is a share of all steps")
    return int(number) if number >= 1 else number


def _number_or_word(value: Any, info: ValidationInfo) -> float | str:
    """An argument of a scheduler, which would fail on the box with 1e-6 as YAML reads it: a text. Not a union for
    pydantic: it would complain once for each kind."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise PydanticKnownError("float_type")
    try:
        number = float(value)
    except ValueError:
        return str(value)  # like linear, a decay_type of warmup_stable_decay
    except OverflowError:
        number = math.inf
    if math.isfinite(number):
        return number
    if isinstance(value, str) and info.context != AS_WRITTEN:
        return value  # as an earlier version stored it
    raise PydanticKnownError("finite_number")


def _no_truth(value: Any) -> Any:
    """Pydantic reads true as 1, and its strict mode refuses 1e-6, which YAML reads as a text."""
    if isinstance(value, bool):
        raise PydanticKnownError("float_type")
    return value


def _expression(text: str) -> str:
    if text == "all-linear":
        return text
    if all(is_module_name(name.strip()) for name in text.split(",")) or not text:  # names without their brackets
        raise PydanticKnownError("list_type")
    ModulePattern(text=text).check()
    return text


def _extract(text: str) -> str:
    AnswerScore(extract=text, compare="exact").check()
    return text


def _split(text: str) -> str:
    try:
        parse_split(text)
    except ValueError as error:
        raise PydanticCustomError("split", "{what}", {"what": str(error), "hint": HINT}) from None
    return text


def _adapter_name(value: Any) -> str | AncestorJob:
    """A stored adapter: 12, support or support:prod. YAML reads the first as a number. Or what a job will store."""
    if isinstance(value, (dict, AncestorJob)):
        return AncestorJob.model_validate(value)
    text = str(value) if type(value) is int else value
    if not isinstance(text, str):
        raise PydanticKnownError("string_type")
    try:
        parse_reference(text)
    except UsageError as error:
        raise ValueError(f"{error.sentence}: {error.hint}") from None
    return text


def _channel_name(text: str) -> str:
    if text == LAB:
        raise ValueError("is for messages about boxes and cards, not jobs; name a channel, or me")
    return text


def _task_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._()+-]{0,127}", text):
        raise ValueError("is not a task name; a job gives lm_eval names alone, never a path")
    return text


Printable = Annotated[str, AfterValidator(_printable)]
ColumnName = Literal[
    "messages", "conversations", "role", "content", "from", "value", "system", "instruction", "input", "output",
    "prompt", "completion", "text", "label", "chosen", "rejected",
]  # fmt: skip


Columns = dict[ColumnName, Annotated[Printable, Field(min_length=1)]]


def _size(value: Any, info: ValidationInfo) -> int:
    """Bytes. A stored spec has them as a number, which an earlier version took without a unit."""
    return value if type(value) is int and value >= 0 and info.context != AS_WRITTEN else parse_size(value)


Targets = Annotated[
    Annotated[str, AfterValidator(_expression), Tag("function-expression")] | Annotated[list[str], Tag("list[name]")],
    Discriminator(lambda value: "function-expression" if isinstance(value, str) else "list[name]"),
]
"""all-linear, a regular expression over whole names, or names. Users never see the tags (`common/job/file.py`)."""

Methods = Annotated[Method | list[Method], BeforeValidator(_methods)]
NumberOrWord = Annotated[float | str, BeforeValidator(_number_or_word)]
StepsOrShare = Annotated[int | float, BeforeValidator(_steps_or_share)]
WhichBlocks = Annotated[Checkpointing, BeforeValidator(_checkpointing)]
Cards = Annotated[int | Literal["auto"], BeforeValidator(_cards)]
Size = Annotated[int, BeforeValidator(_size)]
Duration = Annotated[float, BeforeValidator(parse_duration), Field(le=3650 * 86400)]  # dates end somewhere
Predecessors = Annotated[list[int | str], BeforeValidator(_predecessors), Field(max_length=1000)]
Name = Annotated[str, Field(pattern=NAME)]
Split = Annotated[Printable, AfterValidator(_split)]
ChannelName = Annotated[Name, AfterValidator(_channel_name)]
TaskName = Annotated[str, AfterValidator(_task_name)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic reads true as 1: an epoch, a sample or a rank that nobody meant."""
        if value is True or value is False:
            annotation = cls.model_fields[str(info.field_name)].annotation
            kinds = {*(get_args(annotation) or (annotation,))} - {type(None)}
            if kinds and kinds <= {int, float}:
                raise PydanticKnownError("int_type" if kinds == {int} else "float_type")
        return value


class AncestorJob(Section):
    """The job whose adapter another one begins from, or the sweep whose best member's. They need not have ended."""

    job: Annotated[int | str, BeforeValidator(_predecessor)] | None = None
    """Its number, or its name in the same submit."""
    sweep: int | None = Field(None, ge=1, le=LAST_NUMBER)
    """Its number."""

    @model_validator(mode="after")
    def _one_of_them(self) -> AncestorJob:
        if (self.job is None) is (self.sweep is None):
            raise ValueError("names a job or a sweep, like {job: 12} or {sweep: 7}")
        return self


AdapterName = Annotated[str | AncestorJob, BeforeValidator(_adapter_name)]


def is_set(section: Section, key: str) -> bool:
    """Whether a key was written with a value."""
    return key in section.model_fields_set and getattr(section, key) is not None


class SourceSpec(Section):
    """A data set whose rows are trained on, next to those of dataset.path."""

    path: Printable = Field(min_length=1)
    """A file or a hub id."""
    split: Split = "train"
    """Which of its rows, as in dataset.split."""
    share: float | None = Field(None, gt=0, lt=1)
    """The fraction of all rows that are drawn from it, each once; null: all of its rows."""
    format: DataFormat | None = None
    """The shape of its rows; null: as dataset.format."""
    columns: Columns | None = None
    """What its columns are called; null: as in dataset.columns."""


GENERATED = (Metric.ROUGE, Metric.EXACT_MATCH)
"""What needs generated answers, like each measure that a job file defines."""

OF_PAIRS = (Metric.PREFERENCES,)
"""What can be measured of pairs alone."""


class DatasetSpec(Section):
    """The rows to train on and the rows held out."""

    path: Printable = Field(min_length=1)
    """A file (jsonl, json, csv, parquet; relative to the job file) or a hub id."""
    split: Split = "train"
    """Which rows of path, as the datasets library says it: train[:5%], train[10:20]. A file's only split is train."""
    more: list[SourceSpec] = Field(default_factory=list, max_length=32)
    """Further data sets to train on, like {path: chats.jsonl, share: 0.2}."""
    format: DataFormat = DataFormat.AUTO
    """The rows' shape; auto looks at the columns and says why."""
    columns: Columns = Field(default_factory=dict)
    """What the columns are called in the data where they have other names, like prompt: question."""
    template: PromptTemplate = PromptTemplate.CHAT
    """What is written around instructions and answers, in training and when the adapter is asked."""
    eval_path: Printable | None = None
    """A file or hub id with the held-out rows, in place of test_size; null: test_size rows are split off."""
    eval_split: Split | None = None
    """Which rows of eval_path; null: all of a file, and the split test of a data set on the hub."""
    test_size: float | None = Field(0.1, gt=0, lt=1)
    """Share of rows held out before training."""
    final_path: Printable | None = Field(None, min_length=1)
    """A file or hub id (its split test) with final rows, in place of final_size: measured at the end, and nothing
    chooses by them."""
    final_size: float | None = Field(None, gt=0, lt=1)
    """Share of rows that are set apart as final rows."""
    max_length: int = Field(1024, ge=8, le=2**20)
    """Longest row in tokens."""
    on_overflow: Overflow = Overflow.TRUNCATE
    """What happens to longer rows; they are always counted."""
    on_bad_row: BadRow = BadRow.ERROR
    """What happens to a row that can't be learned from; dropped rows are counted in the report."""
    fields: RowFields = RowFields.TEXT
    """What is read of a row; a job file means all. text: roles and contents alone, as loractl 0.2 read rows."""
    ignore: list[Annotated[Printable, Field(min_length=1)]] = Field(default_factory=list, max_length=64)
    """Fields to leave unread although they change what a row means, like images or messages.weight."""

    @field_validator("more")
    @classmethod
    def _leaves_a_share(cls, value: list[SourceSpec]) -> list[SourceSpec]:
        if (total := sum(source.share or 0 for source in value)) >= 1:
            raise ValueError(f"has shares of {total:g} together, which leave nothing for dataset.path: stay below 1")
        return value

    @property
    def is_one_whole(self) -> bool:
        """Whether one data set is trained on, and all of it."""
        return not self.more and self.split == "train"

    @property
    def sources(self) -> list[SourceSpec]:
        """All data sets to train on, path first, each with the format and columns that it is read by."""
        first = SourceSpec(path=self.path, split=self.split)
        read_by = {"format": self.format, "columns": self.columns}
        return [
            source.model_copy(update={key: own for key, own in read_by.items() if getattr(source, key) is None})
            for source in (first, *self.more)
        ]


class LoraSpec(Section):
    """The adapter: W + (lora_alpha / r) B A (LoRA, arXiv:2106.09685)."""

    r: int = Field(16, ge=1, le=1024)
    """Rank of the adapter."""
    lora_alpha: float = Field(32, gt=0)
    """The adapter's output is scaled by lora_alpha / r."""
    lora_dropout: float = Field(0.05, ge=0, lt=1)
    """Dropout on the adapter's input. With task_type preference 0 unless it is set."""
    target_modules: Targets = "all-linear"
    """all-linear, names or ends of names, or a regular expression that matches whole names (letters, . \\d \\w \\s,
    [...], groups, |, * + ? {m,n}, ^ $, (?=...), (?!...)). A mixture with fused experts takes all-linear with
    lora_dropout 0 alone."""
    modules_to_save: list[Printable] = Field(default_factory=list, max_length=64)
    """Modules that are trained in full, in fp32, and stored with the adapter, like [embed_tokens, lm_head] for new
    words."""
    use_dora: bool = False
    """Learn magnitude and direction apart (DoRA, arXiv:2402.09353): often better at a small r, slower."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) (rsLoRA, arXiv:2312.03732)."""
    init_lora_weights: Literal["default", "gaussian", "orthogonal", "loftq"] = "default"
    """How A and B begin; loftq (arXiv:2310.08659), with qlora, starts from what NF4 lost of the base's weights."""
    init_from: AdapterName | None = None
    """Begin from a stored adapter in place of a fresh one: its job's number, its name or name:tag. {job: 12}: from the
    one that job 12 will have; {sweep: 7}: from that of its best member. The job starts after them."""

    @field_validator("target_modules")
    @classmethod
    def _not_empty(cls, value: str | list[str]) -> str | list[str]:
        if value == []:
            raise ValueError("is empty; write all-linear or name at least one module")
        return value


class TrackerSpec(Section):
    """What a run is called where report_to sends its curves."""

    project: Annotated[Printable, Field(min_length=1, max_length=128)] | None = None
    """The project of wandb and trackio, the experiment of mlflow; null: what the worker's owner has set."""
    run_name: Annotated[Printable, Field(min_length=1, max_length=100)] | None = None
    """The run; null: the job's name and number, like tickets-12."""


class TrainingSpec(Section):
    """The optimisation; names and meaning are those of transformers.TrainingArguments."""

    num_train_epochs: float | None = Field(3, gt=0, le=10_000)
    """Passes over the rows. Not together with max_steps."""
    max_steps: int | None = Field(None, ge=1, le=LARGEST)
    """Optimizer steps, in place of num_train_epochs."""
    learning_rate: float = Field(2e-4, gt=0, lt=1)
    """The peak of the schedule; 1.0e-5 with task_type preference unless it is set."""
    per_device_train_batch_size: int = Field(4, ge=1, le=2**16)
    """Rows in one forward pass."""
    gradient_accumulation_steps: int = Field(4, ge=1, le=2**16)
    """Forward passes in one optimizer step."""
    gradient_checkpointing: WhichBlocks | None = None
    """half: only every second block. null: on a GPU yes, unless the job is alone on its card and nobody else wants the
    room; on a CPU no (it costs 1.5 to 2 times the time there)."""
    warmup_steps: float = Field(0.03, ge=0, le=LARGEST)
    """Steps with a rising learning rate, the first with rate 0; below 1 a share of all steps, rounded up."""
    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_restarts", "cosine_with_min_lr", "polynomial", "constant",
        "constant_with_warmup", "inverse_sqrt", "warmup_stable_decay",
    ] = "cosine"  # fmt: skip
    """How the learning rate falls after the warm-up."""
    lr_scheduler_kwargs: dict[Name, NumberOrWord] = Field(default_factory=dict, max_length=16)
    """More arguments of the scheduler, like {min_lr_rate: 0.1} for cosine_with_min_lr."""
    weight_decay: float = Field(0.0, ge=0, lt=1)
    """Weight decay of the optimizer."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this norm."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of Adam's first moment."""
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    """Decay of Adam's second moment."""
    adam_epsilon: float = Field(1e-8, gt=0, lt=1)
    """Keeps Adam from dividing by zero."""
    label_smoothing_factor: float = Field(0.0, ge=0, lt=1)
    """Share of the probability spread over all tokens."""
    neftune_noise_alpha: float | None = Field(None, gt=0)
    """Noise on the embeddings while training (NEFTune, arXiv:2310.05914), like 5."""
    packing: bool = False
    """Fill every row up to dataset.max_length with several examples that can't see each other: fewer steps, no padding.
    A model that can't keep them apart is refused."""
    exact: bool = False
    """Compute as transformers' Trainer does, bit for bit: padded rows and all logits, slower and in more memory."""
    engine: Literal["auto", "peft"] = "auto"
    """auto: loractl's own pass, which skips padding and unneeded logits, once it has computed what peft's does on the
    worker's card. peft: peft's own pass, slower and in more memory, with all else as it is by default."""
    train_sampling_strategy: Literal["random", "sequential", "group_by_length"] = "random"
    """The order of rows; group_by_length pads less."""
    optim: Literal[
        "auto", "adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_32bit",
        "lion_8bit", "paged_lion_32bit", "paged_lion_8bit", "ademamix", "ademamix_8bit", "paged_ademamix_32bit",
        "paged_ademamix_8bit", "adafactor", "adagrad", "rmsprop", "sgd",
    ] = "auto"  # fmt: skip
    """auto: paged 8-bit AdamW for QLoRA on a GPU, torch's fused AdamW elsewhere (with exact its plain one). A paged one
    is refused with method lora."""
    logging_steps: int = Field(5, ge=1, le=LARGEST)
    """Steps between records of the loss; the first step is recorded, too."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Number format of base and arithmetic; the adapter is in fp32. auto: bf16 where the device computes in it, else
    fp16 on a GPU and fp32 on a CPU; on a GPU without bf16, families that overflow fp16 (Gemma 2 to 4, Qwen 2 and 3.5,
    mixtures of Qwen 3 and GLM 4, GLM 4, gpt-oss, PLaMo 2) take fp32."""
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """auto: what transformers takes for the architecture. flash_attention_2 needs its package on the worker."""
    torch_compile: bool = False
    """Compile the model: a minute or more at the start, for faster steps. The worker's box needs g++."""
    save_steps: int = Field(50, ge=1, le=LARGEST)
    """Steps between checkpoints; the newest two are kept."""
    eval_steps: StepsOrShare | None = None
    """Steps between measurements of the held-out loss, below 1 a share of all steps; null: only before and after."""
    early_stopping_patience: int | None = Field(None, ge=1, le=LARGEST)
    """Stop after this many evaluations in a row (eval_steps) that did not improve the held-out loss."""
    load_best_model_at_end: bool = False
    """Keep the adapter of the evaluation (eval_steps) with the lowest held-out loss, not the last adapter."""
    report_to: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = Field(default_factory=list, max_length=4)
    """Other places for the curves. The worker needs the package and, for wandb, its owner's WANDB_API_KEY or
    WANDB_MODE=offline. TensorBoard's files are stored with the result; trackio's stay on the box unless its owner sets
    TRACKIO_SPACE_ID."""
    tracker: TrackerSpec = TrackerSpec()
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of the adapter's first weights, the order of rows and dropout."""

    @property
    def effective_batch(self) -> int:
        """Rows that one optimizer step learns from."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    def micro_batch(self, most: int) -> int:
        """The largest number of rows at once, up to `most`, that divides the effective batch; 0 when `most` is 0."""
        sizes = range(min(most, self.effective_batch), 0, -1)
        return next((rows for rows in sizes if self.effective_batch % rows == 0), 0)

    @property
    def even_cards(self) -> list[int]:
        """The numbers of cards that share the rows of each optimizer step evenly, 1 among them."""
        return [cards for cards in range(1, MOST_CARDS + 1) if self.effective_batch % cards == 0]

    def rows_a_card(self, cards: int) -> tuple[int, int]:
        """(micro-batch, accumulation) of each of `cards` cards, which together learn from the rows of one step.

        Raises ValueError where the cards can't share them evenly.
        """
        rows, left = divmod(self.effective_batch, cards)
        if left:
            raise ValueError(f"{cards} cards can't share {self.effective_batch} rows evenly")
        most = min(self.per_device_train_batch_size, rows)
        micro = next(size for size in range(most, 0, -1) if rows % size == 0)
        return micro, rows // micro


MEASURED = frozenset(
    {
        *Metric,
        *("rouge1", "rouge2", "rougeL", "accuracy", "macro_f1", "ends_by_itself", "words_loss", "stop_token_loss"),
        *("new_rows_loss", "regression_loss", "later_answers_loss", "context_gain", "chosen_loss", "answer_tokens"),
        "expected_tokens",
        *("preference_accuracy", "new_rows_preference_accuracy", "preference_margin", "repetition"),
    }
)
"""Names that a report's own measures have, or that a job file has for them."""

CHEAP_NAMES = ("cheap_", "copied_", "few_shot_")
"""How names of measures against a cheap answer begin."""

_BEGINNINGS = (*CHEAP_NAMES, NEW_ROWS)


def _own_name(text: str) -> str:
    if text in MEASURED or text.startswith(_BEGINNINGS):
        raise ValueError("is the name of a measure that loractl has; take another")
    return text


class OwnMetric(Section):
    """A measure of generated answers that the job file defines: the share of right ones."""

    name: Annotated[Name, AfterValidator(_own_name)]
    """What the report calls it; no name that a measure of loractl's has."""
    extract: Annotated[str, AfterValidator(_extract)] | None = None
    """An expression in RE2's syntax with one group: of its last match in an answer, and in the expected one, the group
    is compared. null: the whole texts."""
    compare: Literal["exact", "number", "json", "contains"] = "exact"
    """What makes an answer right: the same text, the same number, the same JSON value, or the expected text in it, and
    of several labels no other one."""

    @property
    def value(self) -> str:
        return self.name

    @property
    def score(self) -> AnswerScore:
        """The rule."""
        return AnswerScore(extract=self.extract, compare=self.compare)


def _of_answers() -> list[Metric | OwnMetric]:
    """What is measured of answers where a job file says nothing."""
    return [metric for metric in Metric if metric not in OF_PAIRS]


AnyMetric = Annotated[
    Annotated[Metric, Tag("literal[metric]")] | Annotated[OwnMetric, Tag("function-metric")],
    Discriminator(lambda value: "function-metric" if isinstance(value, (dict, OwnMetric)) else "literal[metric]"),
]
"""The name of a measure, or a measure of the job's own. Users never see the tags (`common/job/file.py`)."""


class EvaluationSpec(Section):
    """What the report measures on the held-out rows."""

    metrics: list[AnyMetric] = Field(default_factory=_of_answers, min_length=1, max_length=32)
    """What the report measures. The loss is always in it; labels and context where the data has them. With SEQ_CLS loss
    and labels alone; with preference loss and preferences."""
    decide_by: Name | None = None
    """The measure of the job's own in `metrics` that makes the report's verdict; null: the held-out loss."""
    samples: int = Field(16, ge=0, le=10_000)
    """Held-out rows to generate answers for, base and tuned side by side; 0: none."""
    max_new_tokens: int = Field(128, ge=1, le=8192)
    """Longest generated answer in tokens."""
    max_rows: int | None = Field(None, ge=1, le=LARGEST)
    """The most held-out rows to score; null: all."""
    per_device_eval_batch_size: int = Field(8, ge=1, le=2**16)
    """Rows in one pass of the evaluation."""
    regression: Printable | None = Field(None, min_length=1)
    """Rows of another kind, a file or a hub id (its split test): show what the training made the model forget."""
    lm_eval: list[TaskName] = Field(default_factory=list, max_length=32)
    """Tasks of the lm-eval harness, by name, for base and tuned; the worker needs the package lm_eval."""
    lm_eval_limit: int | None = Field(100, ge=1, le=LARGEST)
    """The most rows of each of these tasks; null: all."""

    @property
    def wanted(self) -> set[Metric]:
        """The measures of loractl's own."""
        return {metric for metric in self.metrics if isinstance(metric, Metric)}

    @property
    def own(self) -> list[OwnMetric]:
        """The measures that the job file defines."""
        return [metric for metric in self.metrics if isinstance(metric, OwnMetric)]

    @field_validator("metrics")
    @classmethod
    def _named_once(cls, value: list[Metric | OwnMetric]) -> list[Metric | OwnMetric]:
        names = [metric.name for metric in value if isinstance(metric, OwnMetric)]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"defines {twice} twice; give each measure a name of its own")
        return value

    @model_validator(mode="after")
    def _generation_needs_samples(self, info: ValidationInfo) -> EvaluationSpec:
        generated = {metric.value for metric in self.metrics if metric in GENERATED or isinstance(metric, OwnMetric)}
        if info.context == AS_WRITTEN and self.samples == 0 and generated and "metrics" in self.model_fields_set:
            names = ", ".join(sorted(generated))
            raise ValueError(f"samples is 0, so {names} can't be measured; set samples or drop them from metrics")
        return self


class ResourcesSpec(Section):
    """Limits on what the job may take."""

    max_vram: Size | None = None
    """The most memory of each card, like 20GiB: a method whose plan exceeds it is not used."""
    time_limit: Duration | None = None
    """Longest time of an attempt, like 2h. Then it saves a checkpoint, and the job fails as timed_out; a retry with a
    longer one continues."""
    node_labels: dict[Annotated[Printable, Field(max_length=64)], Annotated[Printable, Field(max_length=256)]] = Field(
        default_factory=dict, max_length=8
    )
    """Labels that the box must have (loractl worker --label KEY=VALUE), like nvlink: "yes"."""
    exclusive: bool = Field(default=False, exclude=True)
    """Without effect: every job trains in a process of its own. Earlier job files and stored specs have it."""
    cards: Cards = "auto"
    """Cards of one box that share the job; batch, steps and learning rate stay those of one card. auto: one where one
    holds it, else the fewest that do."""
    parallel: Literal["auto", "data", "sharded"] = "auto"
    """data: the whole base on each card, and a part of the rows; sharded: the base divided, too; auto: data where each
    card holds it."""


LOSSES = ("sigmoid", "ipo", "hinge", "robust", "simpo", "orpo", "sft")


def _losses(value: Any) -> str | list[str]:
    return one_or_list(value, "loss", LOSSES, LOSSES, "a loss like sigmoid, or a list like [sigmoid, sft]")


ALONE = frozenset({"orpo"})
"""Losses that include their own term for the chosen answers."""

REFERENCE_FREE = frozenset({"simpo", "orpo"})
"""Losses that need no reference: they only compare the two answers with each other."""

SMOOTHED = frozenset({"robust", "simpo"})
"""Losses that allow for mislabelled pairs."""


class PreferenceSpec(Section):
    """The loss of pairs; names and meaning are those of TRL's DPOConfig, CPOConfig and ORPOConfig."""

    loss_type: Annotated[str | list[str], BeforeValidator(_losses)] = "sigmoid"
    """sigmoid (DPO, arXiv:2305.18290), ipo (2310.12036), hinge (2305.10425), robust (2403.00409), simpo (2405.14734),
    orpo (2403.07691); or several, as [sigmoid, sft], where sft is the loss of the chosen answers."""
    loss_weights: list[Annotated[float, BeforeValidator(_no_truth), Field(gt=0)]] | None = None
    """The weight of each of several losses; null: 1 each. A loss that should not count is left out of loss_type."""
    beta: float = Field(0.1, gt=0)
    """A larger value keeps the adapter closer to its reference. ipo's tau; the scale of simpo's rewards (2 or more);
    the weight of orpo's odds ratio."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of mislabelled pairs, for robust and simpo."""
    simpo_gamma: float = Field(0.5, ge=0)
    """simpo's target margin between the rewards of the chosen and the rejected answer."""

    @property
    def losses(self) -> tuple[str, ...]:
        """The losses that are added up."""
        return (self.loss_type,) if isinstance(self.loss_type, str) else tuple(self.loss_type)

    @property
    def weights(self) -> tuple[float, ...]:
        """The weight of each."""
        return (1.0,) * len(self.losses) if self.loss_weights is None else tuple(self.loss_weights)

    @property
    def has_reference(self) -> bool:
        """Whether the base's own log-probabilities are needed."""
        return not REFERENCE_FREE & {*self.losses}

    @property
    def answer_weight(self) -> float:
        """The weight of the term that learns the chosen answers, token by token; 0: there is none."""
        weights = dict(zip(self.losses, self.weights, strict=True))
        return weights.get("sft", weights.get("orpo", 0.0))

    @property
    def learns_prompts(self) -> bool:
        """Whether the term for the chosen answers learns the text before them as well, as orpo's does."""
        return "orpo" in self.losses

    @model_validator(mode="after")
    def _one_weight_each(self) -> PreferenceSpec:
        if self.loss_weights is not None and len(self.loss_weights) != len(self.losses):
            raise ValueError(f"loss_weights has {len(self.loss_weights)} for {len(self.losses)} of loss_type")
        return self
