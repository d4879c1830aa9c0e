"""Merges base and adapter into one full model, and proves that it gives the same logits."""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loractl.common.adapter_config import CONFIG, check_adapter_config, portable_name
from loractl.common.errors import LoractlError, UsageError
from loractl.common.fingerprint import MERGED, may_be_published
from loractl.common.units import amount
from loractl.worker.data.prompt import prompt_for, templated

from .library import Library, Listed

Say = Callable[[str], None]
"""Gets the name of each step as it begins."""

PROMPTS = (
    "The capital of France is",
    "Summarise in one sentence: the meeting moved to Thursday because the room was taken.",
    "def mean(values):\n    return",
    "7 + 5 * 2 =",
)
QUESTION = "Can you help me with this?"
"""On these, and on the question as one of the job's own prompts, base and adapter are compared around the merge."""

TOLERANCE = 1e-3
"""Largest difference of a logit, in fp32: W + scale B A is summed once instead of at every token. 4e-5 is usual."""

LEAST_AGREEMENT = 0.8
"""Share of tokens for which the stored files must give the same likeliest next token. Rounding moves a few of them, an
overflow all."""

CONVERTER = "convert_hf_to_gguf.py"
"""llama.cpp's own name for it."""


class MergeFailed(LoractlError):
    """The merged model differs from base and adapter: nothing is written."""


@dataclass(frozen=True, kw_only=True)
class Proof:
    """How much logits differ over all prompts' tokens."""

    prompts: int
    tokens: int
    largest_logit: float  # for scale
    merged_difference: float  # fp32: base and adapter against merged
    stored_difference: float  # the files as they load, in their number format, against fp32
    stored_agreement: float  # share of tokens with the same likeliest next token


@dataclass(frozen=True, kw_only=True)
class Merged:
    """A written full model."""

    folder: Path
    size: int  # bytes of its files
    adapter: Listed
    dtype: str
    proof: Proof

    @property
    def sentences(self) -> str:
        """What was written and how it was verified, for people."""
        proof, adapter = self.proof, self.adapter
        return (
            f"{adapter.name} (job {adapter.job_id}) is merged into {self.folder} "
            f"({amount(self.size)}, {self.dtype}).\n"
            f"Merged in fp32, logits differ by at most {proof.merged_difference:.1e} of {proof.largest_logit:.0f} on "
            f"{proof.tokens} tokens; as stored by {proof.stored_difference:.1e}, and the likeliest token is the same "
            f"for {100 * proof.stored_agreement:.1f} %."
        )

    def as_json(self) -> dict[str, Any]:
        """`folder`; `prompts` and `tokens` that were compared; the `largest_logit` for scale; the largest differences
        of logits: `merged_difference` in fp32, `stored_difference` of the files as they load; `stored_agreement`: the
        share of tokens with the same likeliest next token."""
        return {"folder": str(self.folder), **asdict(self.proof)}


def merge_adapter(
    library: Library, listed: Listed, folder: Path, dtype: str, converter: Path | None, say: Say = lambda text: None
) -> Merged:
    """Write the merged model into a new folder, all of it or nothing; with a converter a GGUF file too.

    Raises MergeFailed if it is not the same, LoractlError if the converter fails.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.parent / f".{folder.name}-{secrets.token_hex(4)}"
    aside.mkdir()
    try:
        proof = merge_into(aside, library, listed, dtype, say)
        if converter is not None:
            say("runs llama.cpp's converter")
            run_converter(converter, aside, aside / f"{listed.name}-{dtype}.gguf", dtype)
        for path in aside.glob("*.safetensors"):  # safetensors makes them readable only by their owner
            path.chmod((aside / "config.json").stat().st_mode)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Merged(folder=folder, size=size, adapter=listed, dtype=dtype, proof=proof)


def merge_into(folder: Path, library: Library, listed: Listed, dtype: str, say: Say = lambda text: None) -> Proof:
    """Write the merged model into an existing empty folder. Raises MergeFailed if it is not the same."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from loractl.common.job.method import Method
    from loractl.worker.base.arithmetic import Precision
    from loractl.worker.base.model import load_base, load_tokenizer

    spec, files, run_code = listed.spec, library.fetch(listed), library.may_run_code(listed)
    check_adapter_config(files / CONFIG)
    revision = library.revision(listed)
    tokenizer = templated(load_tokenizer(spec.base_model, revision, run_code=run_code), spec.dataset.template)
    exact = Precision(base=torch.float32, amp=None)
    say(f"loads {spec.base_model} in float32")
    base = load_base(spec.base_model, Method.LORA, "cpu", exact, revision, run_code=run_code)
    prompts = [tokenizer(text).input_ids for text in PROMPTS]
    prompts.append(prompt_for(library.format(listed), [{"role": "user", "content": QUESTION}], tokenizer))
    # named: else peft reads the adapter onto the box's first card, whose memory is its jobs'
    tuned = PeftModel.from_pretrained(base, str(files), torch_device="cpu").eval()
    say(f"measures the adapter's logits on {len(prompts)} prompts")
    before = _logits(tuned, prompts)
    say("merges, and measures again")
    merged = tuned.merge_and_unload(safe_merge=True).eval()
    after = _logits(merged, prompts)
    if changed := library.changed_base(listed):
        what = f"the base here is not the one that {listed.name} was trained on: {', '.join(changed)} differ"
        raise MergeFailed(what, "get the base of that time, or train again")
    if not (difference := _apart(before, after)) <= TOLERANCE:
        raise MergeFailed(
            f"the merged model differs from base and adapter by {difference:.2e} in a logit, {TOLERANCE:g} is allowed",
            "use base and adapter as they are: loractl adapters pull",
        )
    say(f"writes the model in {dtype}")
    merged.to(getattr(torch, dtype)).save_pretrained(str(folder), safe_serialization=True)
    tokenizer.save_pretrained(str(folder))
    del merged, tuned, base
    say("reads it back, and compares")
    stored = AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype, trust_remote_code=run_code).eval()
    as_stored = _logits(stored, prompts)
    same = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in zip(before, as_stored, strict=True))
    tokens = sum(len(ids) for ids in prompts)
    proof = Proof(
        prompts=len(prompts),
        tokens=tokens,
        largest_logit=max(float(t.abs().max()) for t in before),
        merged_difference=difference,
        stored_difference=_apart(before, as_stored),
        stored_agreement=same / tokens,
    )
    if not math.isfinite(proof.stored_difference) or proof.stored_agreement < LEAST_AGREEMENT:
        raise MergeFailed(
            f"stored in {dtype} the model says the same for {100 * proof.stored_agreement:.0f} % of the tokens only",
            "try --dtype float32",
        )
    _describe(folder, listed, dtype, proof)
    return proof


def _logits(model: Any, prompts: Sequence[Sequence[int]]) -> list[Any]:
    """fp32 logits (tokens, vocabulary) of each prompt."""
    import torch

    with torch.inference_mode():
        return [model(input_ids=torch.tensor([list(ids)])).logits[0].float() for ids in prompts]


def _apart(some: Sequence[Any], others: Sequence[Any]) -> float:
    """The largest difference; infinite if a value is NaN."""
    apart = max(float((a - b).abs().max()) for a, b in zip(some, others, strict=True))
    return apart if math.isfinite(apart) else math.inf


def _describe(folder: Path, listed: Listed, dtype: str, proof: Proof) -> None:
    spec = listed.spec
    about = {
        "job_id": listed.job_id,
        "attempt": listed.attempt,
        "name": listed.name,
        "base_model": portable_name(spec.base_model),
        "revision": spec.revision,
        "method": listed.method.value,
        "dtype": dtype,
        "publish": spec.publish and may_be_published(spec.base_model),
        "proof": asdict(proof),
    }
    (folder / MERGED).write_text(json.dumps(about, indent=1) + "\n", "utf-8")
    trained = "; it was trained over the base in NF4, and the merged model does not have that rounding"
    lines = [
        f"# {listed.name}, merged",
        "",
        f"{about['base_model']} and the adapter of loractl job {listed.job_id}, attempt {listed.attempt}, merged in "
        f"fp32 and stored in {dtype}{trained if listed.method.value == 'qlora' else ''}.",
        "",
        f"On {proof.tokens} tokens of {proof.prompts} prompts, logits of base with adapter, in fp32, differ by at most "
        f"{proof.merged_difference:.1e} from those of the merged model in fp32, and by {proof.stored_difference:.1e} "
        f"from those of these files in {dtype}.",
        *([] if about["publish"] else ["", "Its job says publish: false: it must stay in the lab."]),
    ]
    (folder / "README.md").write_text("\n".join(lines) + "\n", "utf-8")


def find_converter() -> Path:
    """llama.cpp's converter, in LLAMA_CPP or on PATH. Raises UsageError."""
    folder = os.environ.get("LLAMA_CPP")
    beside = [Path(folder) / CONVERTER] if folder else []
    on_path = shutil.which(CONVERTER)
    for path in (*beside, *([Path(on_path)] if on_path else [])):
        if path.is_file():
            return path
    raise UsageError(
        f"--gguf needs llama.cpp's {CONVERTER}, which is not on PATH", "or set LLAMA_CPP to the folder that holds it"
    )


def run_converter(converter: Path, model: Path, target: Path, dtype: str) -> None:
    """Write a GGUF file of a model's folder. Raises LoractlError with the converter's last line."""
    kind = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}[dtype]
    command = [sys.executable, str(converter), str(model), "--outfile", str(target), "--outtype", kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not target.is_file():
        said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise LoractlError(f"{CONVERTER} failed: {said[-1] if said else f'exit status {done.returncode}'}")
