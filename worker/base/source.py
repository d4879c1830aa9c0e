"""Where a base model is, and how it may be loaded: a hub id at one commit, a folder, a GGUF file."""

from __future__ import annotations

import contextlib
import errno
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from loractl.common.job.status import Reason
from loractl.common.memory.config import HOW_TO_NAME_IT, format_of
from loractl.worker.protocol.trust import Refused, check_model_settings

from .failure import TrainingFailed
from .hub import Refusal, pin, reaching_the_hub, refusal


def source_of(base_model: str, revision: str | None) -> dict[str, Any]:
    """transformers' options for a model's location: none for a folder, a commit for a model on the hub."""
    return {} if Path(base_model).is_absolute() else pin(base_model, revision).options()


def loading_options(base_model: str, revision: str | None, *, run_code: bool) -> dict[str, Any]:
    """Where a model is loaded from, and whether its own code may run. Raises TrainingFailed.

    An adapter is refused: transformers would instead load the base that its config names, from anywhere.
    """
    from transformers.utils import find_adapter_config_file

    where = source_of(base_model, revision)
    if find_adapter_config_file(base_model, **where) is not None:
        raise TrainingFailed(Reason.BAD_SPEC, f"base_model {base_model} holds an adapter: name the base model itself")
    configs = configs_of(base_model, where)
    try:
        check_model_settings(base_model, *configs)
    except Refused as refused:
        raise TrainingFailed(Reason.BAD_SPEC, refused.sentence) from refused
    if (format := format_of(configs[0])) is not None:
        what = f"base_model {base_model} is quantised with {format}, which can't be trained on"
        raise TrainingFailed(Reason.BAD_SPEC, f"{what}: {HOW_TO_NAME_IT}")
    if run_code:
        _check_code_is_its_own(base_model, configs)
    # Without an explicit False, transformers asks at the terminal whether to run a model's own code.
    code = {"code_revision": where["revision"]} if where else {}
    return {"trust_remote_code": run_code, **where, **code}


def configs_of(base_model: str, where: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The contents of config.json and tokenizer_config.json; a GGUF file alone has neither."""
    from transformers import PreTrainedConfig
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    if gguf_file_of(base_model) and not (Path(base_model) / "config.json").exists():
        return {}, get_tokenizer_config(base_model, **where)
    return (
        PreTrainedConfig.get_config_dict(base_model, **where)[0],
        get_tokenizer_config(base_model, **where),
    )


def family_of(base_model: str, revision: str | None) -> str:
    """The model's `model_type`, like gemma2; empty if only a GGUF file has it. Raises TrainingFailed."""
    with model_errors(base_model):
        return str(configs_of(base_model, source_of(base_model, revision))[0].get("model_type", ""))


def _check_code_is_its_own(base_model: str, configs: Iterable[dict[str, Any]]) -> None:
    """Refuse code from another repository: the box's owner has not read it. Raises TrainingFailed."""
    for config in configs:
        if "--" in json.dumps(config.get("auto_map", {})):
            what = f"base_model {base_model} runs code of another repository, which nobody has allowed"
            raise TrainingFailed(Reason.BAD_SPEC, what)


def check_folder(base_model: str) -> None:
    """Say that a folder holds no model: transformers would complain about a tokenizer's backend."""
    folder = Path(base_model)
    if folder.is_dir() and not (folder / "config.json").exists() and not list(folder.glob("*.gguf")):
        raise TrainingFailed(
            Reason.MODEL_NOT_FOUND, f"base_model {base_model} is a folder without a model: no config.json, no GGUF file"
        )


def gguf_file_of(base_model: str) -> dict[str, str]:
    """{"gguf_file": name} for a folder that holds exactly one GGUF file and no safetensors."""
    folder = Path(base_model)
    if not folder.is_dir() or list(folder.glob("*.safetensors")):
        return {}
    files = sorted(folder.glob("*.gguf"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise TrainingFailed(Reason.MODEL_NOT_FOUND, f"{base_model} holds several GGUF files ({names}): keep one")
    return {"gguf_file": files[0].name} if files else {}


@contextlib.contextmanager
def model_errors(base_model: str) -> Iterator[None]:
    """transformers' many ways to say that a model is missing, as one sentence."""
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
            raise TrainingFailed(Reason.TRAINER_ERROR, f"{answer} for base_model {base_model}") from None
        if answer is not None:  # the sentence says it all: the job's log needs no traceback
            raise TrainingFailed(Reason.MODEL_NOT_FOUND, f"base_model {base_model} can't be loaded: {answer}") from None
        if Path(base_model).is_absolute() and not Path(base_model).exists():
            why = "there is no such folder on this worker"
        elif isinstance(error, SafetensorError):
            why = f"its weights can't be read ({error})"
        else:
            why = first_line(error)
        raise TrainingFailed(Reason.MODEL_NOT_FOUND, f"base_model {base_model} can't be loaded: {why}") from error


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
