"""The base model and its adapter: loading a hub id, a safetensors folder or a GGUF file, plain or in NF4."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
)

from loractl.common.errors import LoractlError
from loractl.common.job.method import Method
from loractl.common.job.spec import JobSpec
from loractl.common.job.status import Reason
from loractl.worker.protocol.trust import Refused, check_model_settings

from .hub import Refusal, pin, reaching_the_hub, refusal

INITIAL_WEIGHTS: dict[str, bool | str] = {"default": True, "loftq": True}
"""peft's names where ours differ; loftq's weights come after, from the base's own files."""

INITIAL_SPREAD = 0.02
"""Standard deviation of a head's first weights where the model's config has no initializer_range: transformers' own."""

HEAD = "score"
"""What transformers calls the head of every decoder that classifies; peft trains and stores it by that name."""

PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}### {{ message['role'] | capitalize }}:\n{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:\n{% endif %}"
)
"""For base models without a chat template."""


class TrainingFailed(LoractlError):
    """The attempt can't go on, for a reason that the job's row will show."""

    def __init__(self, reason: Reason, sentence: str) -> None:
        super().__init__(sentence)
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class Head:
    """What a classifier's head is made of."""

    labels: tuple[str, ...]
    pad: int  # the padding token: the last token that is none decides
    seed: int

    @property
    def settings(self) -> dict[str, Any]:
        """What transformers has to know of it, as keys of the model's config."""
        return {**label_settings(self.labels), "pad_token_id": self.pad}


def label_settings(labels: Sequence[str]) -> dict[str, Any]:
    """Labels as from_pretrained of AutoModelForSequenceClassification takes them."""
    names = dict(enumerate(labels))
    return {"num_labels": len(names), "id2label": names, "label2id": {name: n for n, name in names.items()}}


@dataclass(frozen=True, kw_only=True)
class Precision:
    """The number formats of a run."""

    base: torch.dtype  # of unquantised base weights, and NF4's compute type
    amp: Literal["bf16", "fp16"] | None  # what the Trainer's autocast computes in, over fp32 adapters


def choose_precision(device: str, dtype: str = "auto") -> Precision:
    """bf16 where the device computes in it; else fp16 with loss scaling on a card, fp32 on a processor.

    Cards before Ampere and old processors only emulate bf16: slower than fp32, and no more exact. A job's own choice
    goes first. Raises TrainingFailed(bad_spec) for float16 on a processor, whose Trainer has no loss scaling.
    """
    if dtype == "float32":
        return Precision(base=torch.float32, amp=None)
    if dtype == "bfloat16":
        return Precision(base=torch.bfloat16, amp="bf16")
    if dtype == "float16":
        if device != "cuda":
            raise TrainingFailed(Reason.BAD_SPEC, "training.dtype: float16 is for GPUs; use auto or float32 on a CPU")
        return Precision(base=torch.float16, amp="fp16")
    if device == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Precision(base=torch.bfloat16, amp="bf16")
        return Precision(base=torch.float16, amp="fp16")
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return Precision(base=torch.bfloat16, amp="bf16")
    return Precision(base=torch.float32, amp=None)


def load_tokenizer(base_model: str, revision: str | None = None, *, run_code: bool = False) -> Any:
    """The model's tokenizer, always with a chat template and a padding token. Raises TrainingFailed.

    `run_code`: the box's owner trusts the model's own code at this revision.
    """
    _check_folder(base_model)
    with _model_errors(base_model):
        options = _source(base_model, revision, run_code=run_code) | _gguf_file(base_model)
        tokenizer = AutoTokenizer.from_pretrained(base_model, **options)
    if tokenizer.eos_token is None:
        raise TrainingFailed(Reason.MODEL_NOT_FOUND, f"the tokenizer of {base_model} has no end-of-sequence token")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # labels are built from masks, so a shared token does no harm
    if not tokenizer.chat_template:
        # Rendered conversations are tokenised without special tokens: the template brings the BOS where one is usual.
        usual_bos = tokenizer.bos_token is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id
        tokenizer.chat_template = ("{{ bos_token }}" if usual_bos else "") + PLAIN_CHAT_TEMPLATE
    return tokenizer


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
) -> Any:
    """The base model on its device; for qlora its linear layers in NF4 with double quantisation (arXiv:2305.14314).

    With `head` it has that one, with fresh weights, in place of its words. Raises TrainingFailed when the model can't
    be found or read, or has no such head.
    """
    options: dict[str, Any] = {"dtype": precision.base, "use_safetensors": True} | _gguf_file(base_model)
    if device == "cuda":
        options["device_map"] = {"": 0}
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
            llm_int8_skip_modules=None if head is None else [HEAD],  # None: transformers leaves out the words' head
        )
    if attention != "auto":
        options["attn_implementation"] = _available(attention)
    with _model_errors(base_model):
        options |= _source(base_model, revision, run_code=run_code)
        options["adapter_kwargs"] = {"local_files_only": True}  # _source has looked for one
        if head is None:
            return AutoModelForCausalLM.from_pretrained(base_model, **options)
        _check_no_head_yet(base_model, revision)
        model = AutoModelForSequenceClassification.from_pretrained(base_model, **options, **head.settings)
    _begin_head(model, head)
    return model


def _check_no_head_yet(base_model: str, revision: str | None) -> None:
    """A classifier's own head would be overwritten, and its labels are others. Raises TrainingFailed."""
    made_for = _configs(base_model, source_of(base_model, revision))[0].get("architectures") or []
    if any(str(name).endswith("ForSequenceClassification") for name in made_for):
        what = "is a classifier already, whose head would be lost: name the model that it was made from"
        raise TrainingFailed(Reason.BAD_SPEC, f"base_model {base_model} {what}")


def _begin_head(model: Any, head: Head) -> None:
    """Fresh weights, drawn on the CPU from a generator of their own: the same on every device, and with every method.

    Raises TrainingFailed(bad_spec) for an encoder, whose classifiers are built otherwise.
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


def _available(attention: str) -> str:
    """Raises TrainingFailed where flash attention is asked for and not installed."""
    from transformers.utils import is_flash_attn_2_available

    if attention == "flash_attention_2" and not is_flash_attn_2_available():
        what = (
            "training.attn_implementation: flash_attention_2 needs a GPU of Ampere or newer and the package flash-attn"
        )
        raise TrainingFailed(Reason.BAD_SPEC, f"{what}, which this worker does not have")
    return attention


def add_adapter(base: Any, spec: JobSpec, method: Method) -> Any:
    """The base with a fresh LoRA adapter; trainable are the adapter and, where the base has one, its classifying head.
    Raises TrainingFailed(bad_spec)."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if method is Method.QLORA:
        # Checkpointing is the Trainer's business: its non-reentrant kind needs no hook on the inputs.
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
        keep_nf4_in_training_mode(base)
    targets = spec.lora.target_modules
    if isinstance(targets, list):
        _check_targets(base, targets)
    config = LoraConfig(
        task_type=spec.task_type.value,  # for SEQ_CLS peft itself adds the head to modules_to_save
        r=spec.lora.r,
        lora_alpha=spec.lora.lora_alpha,
        lora_dropout=spec.lora.lora_dropout,
        target_modules=targets,
        modules_to_save=spec.lora.modules_to_save or None,
        use_dora=spec.lora.use_dora,
        use_rslora=spec.lora.use_rslora,
        init_lora_weights=INITIAL_WEIGHTS.get(spec.lora.init_lora_weights, spec.lora.init_lora_weights),
    )
    try:
        model = get_peft_model(base, config)
    except ValueError as error:  # what this peft can't do with this model, like dropout on fused experts
        raise TrainingFailed(Reason.BAD_SPEC, f"peft makes no adapter for this model: {_first_line(error)}") from error
    for parameter in model.parameters():
        if parameter.requires_grad:  # peft leaves modules_to_save in the base's 16 bit, in which small steps are lost
            parameter.data = parameter.data.float()
    if spec.lora.init_lora_weights == "loftq":
        _make_up_for_nf4(model, spec)
    # without a name: for one on the hub, peft asks it at each save whether its main branch has another vocabulary
    model.peft_config["default"].base_model_name_or_path = ""
    model.config.use_cache = False
    return model


def _make_up_for_nf4(model: Any, spec: JobSpec) -> None:
    """Begin A and B as the best correction of rank r of what NF4 lost of each layer (LoftQ, arXiv:2310.08659, with one
    step; peft's own needs CUDA). Raises TrainingFailed."""
    from bitsandbytes.functional import dequantize_4bit
    from peft.tuners.lora import Linear4bit

    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, Linear4bit)]
    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        return  # a trace, which has no weights
    whole = _weights_of(spec)
    for name, layer in layers:
        key = f"{name.removeprefix('base_model.model.')}.weight"
        if key not in whole:
            what = f"the base's files have no {key}, so what NF4 lost of it is not known; use default"
            raise TrainingFailed(Reason.BAD_SPEC, f"lora.init_lora_weights: {what}")
        packed = layer.get_base_layer().weight
        kept = dequantize_4bit(packed.data, packed.quant_state).float()
        lost = whole[key]().to(kept.device, torch.float32) - kept
        left, sizes, right = torch.linalg.svd(lost, full_matrices=False)
        r, scale = spec.lora.r, layer.scaling["default"]
        root = sizes[:r].sqrt()
        layer.lora_A["default"].weight.data = (root[:, None] * right[:r]).contiguous()
        layer.lora_B["default"].weight.data = (left[:, :r] * root / scale).contiguous()


def _weights_of(spec: JobSpec) -> dict[str, Callable[[], torch.Tensor]]:
    """The tensors of the base's safetensors files by name, each read when it is called. Raises TrainingFailed."""
    from safetensors import safe_open
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    with _model_errors(spec.base_model):
        where = source_of(spec.base_model, spec.revision)
        single = cached_file(spec.base_model, "model.safetensors", _raise_exceptions_for_missing_entries=False, **where)
        if single is None:
            index = cached_file(spec.base_model, "model.safetensors.index.json", **where)
            files, _ = get_checkpoint_shard_files(spec.base_model, index, **where)
        else:
            files = [single]
        opened = [safe_open(file, framework="pt") for file in files]
    names = [(file, key) for file in opened for key in file.keys()]  # type: ignore[no-untyped-call]  # noqa: SIM118
    return {key: functools.partial(file.get_tensor, key) for file, key in names}


def load_trained(model: Any, checkpoint: Path) -> None:
    """The adapter's weights from a checkpoint of the same training."""
    load_weights(model, checkpoint / "adapter_model.safetensors")


def save_weights(model: Any, path: Path) -> None:
    """The adapter's weights alone, written aside and renamed."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in get_peft_model_state_dict(model).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".part")
    save_file(weights, aside)
    aside.rename(path)


def load_weights(model: Any, path: Path) -> None:
    """The adapter's weights that `save_weights` or peft wrote. Raises OSError."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    set_peft_model_state_dict(model, load_file(path))


def keep_nf4_in_training_mode(model: Any) -> None:
    """Make eval() leave every NF4 layer in training mode; such a layer holds no dropout, so nothing else changes.

    bitsandbytes 0.50 on a CPU repacks a layer's weights for inference on its first forward in eval mode. From then on
    the gradients through it are wrong, without an error: training after a mid-run evaluation is ruined silently.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.train(True)
            module.train = lambda mode=True, module=module: module


def whole_modules(model: Any, compute: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """Autocast where modules are trained in full, in fp32, on a base that computes in `compute`: the Trainer's own is
    around forward() alone, not generate(), and only of a model that it has trained in this process."""
    mixed = bool(model.peft_config["default"].modules_to_save) and compute != torch.float32
    return torch.autocast(model.device.type, dtype=compute, enabled=mixed)


@contextlib.contextmanager
def evaluating(model: Any, *, base: bool = False) -> Iterator[Any]:
    """The model in eval mode without gradients; with `base`, its adapter switched off. Training mode is restored."""
    was_training = model.training
    model.eval()
    adapter_off = model.disable_adapter() if base else contextlib.nullcontext()
    try:
        with torch.no_grad(), adapter_off:
            yield model
    finally:
        model.train(was_training)


def _source(base_model: str, revision: str | None, *, run_code: bool) -> dict[str, Any]:
    """From where, and whether with its own code, a model may be loaded. Raises TrainingFailed.

    An adapter is refused: transformers would load the base that its config names instead, from wherever that is.
    """
    from transformers.utils import find_adapter_config_file

    where = source_of(base_model, revision)
    if find_adapter_config_file(base_model, **where) is not None:
        raise TrainingFailed(Reason.BAD_SPEC, f"base_model {base_model} holds an adapter: name the base model itself")
    configs = _configs(base_model, where)
    try:
        check_model_settings(base_model, *configs)
    except Refused as refused:
        raise TrainingFailed(Reason.BAD_SPEC, refused.sentence) from refused
    if run_code:
        _check_code_is_its_own(base_model, configs)
    # Without an explicit False, transformers asks at the terminal whether to run a model's own code.
    code = {"code_revision": where["revision"]} if where else {}
    return {"trust_remote_code": run_code, **where, **code}


def source_of(base_model: str, revision: str | None) -> dict[str, Any]:
    """transformers' options for where a model lies: none for a folder, the commit of one on the hub."""
    return {} if Path(base_model).is_absolute() else pin(base_model, revision).options()


def _configs(base_model: str, where: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What config.json and tokenizer_config.json say; a GGUF file alone has neither."""
    from transformers import PreTrainedConfig
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    if _gguf_file(base_model) and not (Path(base_model) / "config.json").exists():
        return {}, get_tokenizer_config(base_model, **where)
    return (
        PreTrainedConfig.get_config_dict(base_model, **where)[0],
        get_tokenizer_config(base_model, **where),
    )


def _check_code_is_its_own(base_model: str, configs: Iterable[dict[str, Any]]) -> None:
    """Code that a config takes from another repository is not what the box's owner has read. Raises TrainingFailed."""
    for config in configs:
        if "--" in json.dumps(config.get("auto_map", {})):
            what = f"base_model {base_model} runs code of another repository, which nobody has allowed"
            raise TrainingFailed(Reason.BAD_SPEC, what)


def _check_folder(base_model: str) -> None:
    """A folder without a model is named as such: transformers would speak of a tokenizer's backend."""
    folder = Path(base_model)
    if folder.is_dir() and not (folder / "config.json").exists() and not list(folder.glob("*.gguf")):
        raise TrainingFailed(
            Reason.MODEL_NOT_FOUND, f"base_model {base_model} is a folder without a model: no config.json, no GGUF file"
        )


def _gguf_file(base_model: str) -> dict[str, str]:
    """{"gguf_file": name} for a folder that holds exactly one GGUF file and no safetensors."""
    folder = Path(base_model)
    if not folder.is_dir() or list(folder.glob("*.safetensors")):
        return {}
    found = sorted(folder.glob("*.gguf"))
    if len(found) > 1:
        names = ", ".join(f.name for f in found)
        raise TrainingFailed(Reason.MODEL_NOT_FOUND, f"{base_model} holds several GGUF files ({names}): keep one")
    return {"gguf_file": found[0].name} if found else {}


def _check_targets(base: Any, targets: list[str]) -> None:
    from transformers.pytorch_utils import Conv1D

    kinds = (torch.nn.Linear, Conv1D)  # GPT-2's layers are of the second
    heads = {"lm_head", HEAD}
    linear = {name.rpartition(".")[2] for name, m in base.named_modules() if isinstance(m, kinds)} - heads
    if unknown := [t for t in targets if t.rpartition(".")[2] not in linear]:
        raise TrainingFailed(
            Reason.BAD_SPEC,
            f"lora.target_modules: {', '.join(unknown)} is not a linear layer of this model; "
            f"it has {', '.join(sorted(linear))}",
        )


@contextlib.contextmanager
def _model_errors(base_model: str) -> Iterator[None]:
    """transformers' many ways to say that a model is not there, as one sentence."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from safetensors import SafetensorError

    try:
        with reaching_the_hub():
            yield
    except (OSError, HFValidationError, HfHubHTTPError, SafetensorError, KeyError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        answer = None if Path(base_model).is_absolute() else refusal(error)
        if answer is Refusal.AWAY:
            raise TrainingFailed(Reason.TRAINER_ERROR, f"{answer} for base_model {base_model}") from error
        if answer is not None:
            why = str(answer)
        elif Path(base_model).is_absolute() and not Path(base_model).exists():
            why = "there is no such folder on this worker"
        elif isinstance(error, SafetensorError):
            why = f"its weights can't be read ({error})"
        else:
            why = _first_line(error)
        raise TrainingFailed(Reason.MODEL_NOT_FOUND, f"base_model {base_model} can't be loaded: {why}") from error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
