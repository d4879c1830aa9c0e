"""The base model and its tokenizer, loaded: plain or in NF4, with its language-model head or a classifier's. With its
number formats they are the model that learns.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
)

from loractl.common.fingerprint import has_tokenizer, unfit_template
from loractl.common.job.method import Method
from loractl.common.job.status import Reason

from .arithmetic import Precision, evaluating, trained_weights, whole_modules
from .failure import TrainingFailed
from .gauge import memory_or_card
from .shared_heads import repeat_where_needed
from .source import check_folder, configs_of, gguf_file_of, loading_options, model_errors, source_of

HEAD = "score"
"""transformers' name for the head of every decoder that classifies; peft trains and stores it under that name."""

INITIAL_SPREAD = 0.02
"""Standard deviation of a head's first weights if the model's config has no initializer_range: transformers' own."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """The description of a classifier's head."""

    labels: tuple[str, ...]
    pad: int  # the padding token: the last token before the padding decides
    seed: int

    @property
    def settings(self) -> dict[str, Any]:
        """What transformers needs to know about it, as keys of the model's config."""
        return {**label_settings(self.labels), "pad_token_id": self.pad}


def label_settings(labels: Sequence[str]) -> dict[str, Any]:
    """Labels in the form that AutoModelForSequenceClassification.from_pretrained takes."""
    names = dict(enumerate(labels))
    return {"num_labels": len(names), "id2label": names, "label2id": {name: n for n, name in names.items()}}


def check_no_head_yet(base_model: str, revision: str | None) -> None:
    """Refuse a classifier: its own head would be overwritten, and its labels differ. Raises TrainingFailed."""
    made_for = configs_of(base_model, source_of(base_model, revision))[0].get("architectures") or []
    if any(str(name).endswith("ForSequenceClassification") for name in made_for):
        what = "is a classifier already, and its head would be lost: name the model that it was made from"
        raise TrainingFailed(Reason.BAD_SPEC, f"base_model {base_model} {what}")


def begin_head(model: Any, head: Head) -> None:
    """Fresh weights, drawn on the CPU from their own generator: the same on every device, and with every method.

    Raises TrainingFailed(bad_spec) for an encoder: its classifiers are built in another way.
    """
    layer = getattr(model, HEAD, None)
    if not isinstance(layer, torch.nn.Linear):
        what = f"task_type: SEQ_CLS is for decoders, and {type(model).__name__} has no head of theirs"
        raise TrainingFailed(Reason.BAD_SPEC, what)
    text = model.config.get_text_config()
    text.pad_token_id = head.pad
    drawn = torch.empty(layer.weight.shape, dtype=torch.float32)
    spread = getattr(text, "initializer_range", INITIAL_SPREAD)
    drawn.normal_(std=spread, generator=torch.Generator().manual_seed(head.seed))
    layer.weight.data.copy_(drawn)


@dataclass(frozen=True, kw_only=True)
class ScoredTokens:
    """Some learned tokens of some rows, of shape (tokens,)."""

    rows: torch.Tensor  # the index of each token's row
    targets: torch.Tensor
    losses: torch.Tensor  # in nats, fp32
    right: torch.Tensor  # whether it was the likeliest token


class Scorer(Protocol):
    """Scores rows without computing logits for tokens that are not learned."""

    def scores(self, rows: Sequence[Any]) -> Sequence[ScoredTokens]:
        """Every learned token of some rows, for a model in eval mode."""


@dataclass(frozen=True, kw_only=True)
class Learner:
    """A base model with its adapter, its tokenizer, and its number formats."""

    model: Any
    tokenizer: Any
    precision: Precision
    scorer: Scorer | None = None  # None: the model itself, with padding and all logits
    started: Sequence[torch.Tensor] | None = None
    """The adapter's first weights, in main memory, if it is compared with these; None: it is compared with the bare
    base."""

    @property
    def compared_with(self) -> str:
        """What "base" means in its report."""
        return "the base" if self.started is None else "the starting adapter"


def measuring(learner: Learner, work: Callable[[], None], *, base: bool = False) -> None:
    """Do a piece of an evaluation in its modes. `base`: with the adapter switched off, or with its first weights."""
    started = learner.started if base else None
    weights = contextlib.nullcontext() if started is None else trained_weights(learner.model, started)
    whole = whole_modules(learner.model, learner.precision.base)
    with evaluating(learner.model, base=base and started is None), weights, whole:
        work()


def positions_of(model: Any) -> int | None:
    """The tokens that a model can take, prompt and answer together, if it looks positions up in a table; None if it
    computes them as far as it is asked to."""
    config = model.config.get_text_config()
    if (longest := getattr(config, "max_seq_len", None)) and config.model_type == "mpt":
        return int(longest)  # its table of biases has no module of its own
    declared = int(getattr(config, "max_position_embeddings", None) or 0)
    # a table may be longer by an offset; one of another size is of something else, like an image's patches
    fitting = [size for size in _tables_of_positions(model) if abs(declared - size) <= _OFFSET]
    return min(declared, *fitting) if fitting else None


_OFFSET = 2
"""Rows of a table of positions that may stand before the first position (OPT, RoBERTa)."""


def _tables_of_positions(model: Any) -> Iterator[int]:
    """The usable rows of each, by the names that transformers gives them."""
    for path, module in model.named_modules():
        names = path.split(".")  # peft moves a table that is trained whole below its own place
        if isinstance(module, torch.nn.Embedding) and any(name == "wpe" or "position" in name for name in names):
            yield module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    for path, table in model.named_buffers():
        if path.rpartition(".")[2] in ("embed_positions", "pos_encoding"):  # GPT-J, CodeGen, CTRL
            yield len(table)


PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}### {{ message['role'] | capitalize }}:\n{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:\n{% endif %}"
)
"""For base models without a chat template."""


def load_tokenizer(base_model: str, revision: str | None = None, *, run_code: bool = False) -> Any:
    """The model's tokenizer, always with a chat template and a padding token. Raises TrainingFailed.

    `run_code`: whether the box's owner trusts the model's own code at this revision.
    """
    with model_errors(base_model):
        check_folder(base_model)
        options = loading_options(base_model, revision, run_code=run_code) | gguf_file_of(base_model)
        _check_tokenizer(base_model)
        tokenizer = AutoTokenizer.from_pretrained(base_model, **options)
    _keep_spaces_in_offsets(tokenizer)
    if isinstance(tokenizer.chat_template, dict) and (wrong := unfit_template(tokenizer.chat_template)):
        raise TrainingFailed(Reason.MODEL_NOT_FOUND, f"base_model {base_model} {wrong}: rename it")
    if tokenizer.eos_token is None:
        raise TrainingFailed(Reason.MODEL_NOT_FOUND, f"the tokenizer of {base_model} has no end-of-sequence token")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # labels are built from masks, so a shared token does no harm
    if not tokenizer.chat_template:
        # Rendered conversations are tokenised without special tokens: the template adds the BOS if one is usual.
        usual_bos = tokenizer.bos_token is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id
        tokenizer.chat_template = ("{{ bos_token }}" if usual_bos else "") + PLAIN_CHAT_TEMPLATE
    return tokenizer


def _check_tokenizer(base_model: str) -> None:
    """Say that a folder has no tokenizer: transformers would complain about backends. Raises TrainingFailed."""
    folder = Path(base_model)
    if not folder.is_absolute() or not folder.is_dir() or list(folder.glob("*.gguf")) or list(folder.glob("*.py")):
        return
    if not has_tokenizer(folder):
        what = f"base_model {base_model} has no tokenizer: no tokenizer.json, tokenizer.model or vocab.json"
        raise TrainingFailed(Reason.MODEL_NOT_FOUND, what)


def _keep_spaces_in_offsets(tokenizer: Any) -> None:
    """Let offsets, by which labels are made, cover a token's spaces; its ids stay the same.

    Where a tokenizer's file trims them, a token of spaces alone covers nothing: no indentation would be learned.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)  # one that is pure Python has none
    processor = None if backend is None else backend.post_processor
    if backend is None or processor is None:
        return

    def untrimmed(part: dict[str, Any]) -> dict[str, Any]:
        return part | {"trim_offsets": False} if part.get("trim_offsets") is True else part

    # as JSON: it may be a sequence, whose members differ in their attributes
    state = json.loads(processor.__getstate__(), object_hook=untrimmed)
    processor.__setstate__(json.dumps(state).encode())
    backend.post_processor = processor


def load_base(
    base_model: str,
    method: Method,
    device: str,
    precision: Precision,
    revision: str | None = None,
    *,
    run_code: bool = False,
    attention: str = "auto",
    head: Head | None = None,
    divisible: bool = False,
) -> Any:
    """The base model on its device; for qlora its linear layers in NF4 with double quantisation (arXiv:2305.14314).

    With `head` it has that head, with fresh weights, instead of its language-model head. `divisible`: it stays in the
    box's memory, with packed weights in a type that can be divided among cards. Raises TrainingFailed if the model
    can't be found or read, or can't have a head.
    """
    options = _format_options(base_model, method, precision, head)
    if divisible and method is Method.QLORA:
        options["quantization_config"].bnb_4bit_quant_storage = torch.bfloat16
    repeat_where_needed()
    if device == "cuda":
        # Named in both cases: by default transformers puts a quantised model onto the card.
        options["device_map"] = {"": "cpu" if divisible else 0}
    if attention != "auto":
        options["attn_implementation"] = _available(attention)
    with model_errors(base_model), _conversion_errors():
        options |= loading_options(base_model, revision, run_code=run_code)
        options["adapter_kwargs"] = {"local_files_only": True}  # loading_options has looked for one
        if head is None:
            model = AutoModelForCausalLM.from_pretrained(base_model, **options)
        else:
            check_no_head_yet(base_model, revision)
            with _fresh_head_unreported():
                model = AutoModelForSequenceClassification.from_pretrained(base_model, **options, **head.settings)
    if device == "cpu" and not divisible:
        _own_weights(model)
    if device == "cpu" and (words := model.get_output_embeddings()) is not None:
        words.register_forward_pre_hook(_in_one_piece)
    if head is not None:
        begin_head(model, head)
    return model


def _own_weights(model: Any) -> None:
    """Copy weights that are mapped from their files, as they are in the files' own number format. Overwriting such a
    file would change a running training, or end its process by SIGBUS. A model divided among cards keeps them mapped,
    since each rank would have a copy."""
    mapped = _mapped_files()
    for tensor in (*model.parameters(), *model.buffers()):
        if any(tensor.data_ptr() in pages for pages in mapped):
            tensor.data = tensor.data.clone()


def _in_one_piece(head: Any, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The last token of each prompt is a slice of a tensor. On a CPU torch multiplies such rows one by one, each with a
    copy of the head: 432 MiB for eight prompts and a head of 49,152 x 576."""
    return (given[0].contiguous(), *given[1:])


def _mapped_files() -> list[range]:
    """Where files without code are mapped in this process's memory."""
    lines = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    named = [(words[0], words[5]) for words in lines if len(words) == 6 and words[5].startswith("/")]
    code = {words[5] for words in lines if len(words) == 6 and "x" in words[1]}
    return [range(*(int(end, 16) for end in span.split("-"))) for span, path in named if path not in code]


@contextlib.contextmanager
def _fresh_head_unreported() -> Iterator[None]:
    """Suppress transformers' table of missing weights if only the head is missing: it is initialized here."""

    def of_other_weights(record: logging.LogRecord) -> bool:
        lines = record.getMessage().splitlines()
        missing = [line.split()[0] for line in lines if re.search(r"\|\W*MISSING", line)]
        return not missing or any(not name.startswith(HEAD) for name in missing)

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(of_other_weights)
    try:
        yield
    finally:
        logger.removeFilter(of_other_weights)


@contextlib.contextmanager
def _conversion_errors() -> Iterator[None]:
    """Raise transformers' "issues during automatic conversion" with the words of a card or memory that failed.

    It catches failures while it converts a weight to NF4, continues with the next, and at the end logs all and raises a
    sentence that does not say what happened.
    """
    report: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: report.extend(record.getMessage().splitlines())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addHandler(listener)
    try:
        yield
    except RuntimeError as error:
        if "automatic conversion of the weights" not in str(error) or not (cause := memory_or_card(report)):
            raise
        raise RuntimeError(cause) from error
    finally:
        logger.removeHandler(listener)


def _format_options(base_model: str, method: Method, precision: Precision, head: Head | None) -> dict[str, Any]:
    """from_pretrained's options for the formats of files and weights. Raises TrainingFailed for a GGUF file in NF4."""
    options: dict[str, Any] = {"dtype": precision.base, "use_safetensors": True} | gguf_file_of(base_model)
    if "gguf_file" in options:
        if method is Method.QLORA:
            raise TrainingFailed(
                Reason.BAD_SPEC,
                "a GGUF base can't be quantised to NF4: use method: lora, or convert it to safetensors first",
            )
        options["quantization_config"] = GgufConfig(dequantize=True)
        options.pop("use_safetensors")
    elif method is Method.QLORA:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=precision.base,
            llm_int8_skip_modules=None if head is None else [HEAD],  # None: transformers skips the words' head
        )
    return options


def _available(attention: str) -> str:
    """Raises TrainingFailed if the job asks for flash attention and it is not installed."""
    from transformers.utils import is_flash_attn_2_available

    if attention == "flash_attention_2" and not is_flash_attn_2_available():
        what = (
            "training.attn_implementation: flash_attention_2 needs a GPU of Ampere or newer and the package flash-attn"
        )
        raise TrainingFailed(Reason.BAD_SPEC, f"{what}, which this worker does not have")
    return attention
