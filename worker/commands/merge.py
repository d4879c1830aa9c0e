"""loractl adapters merge: base and adapter as one full model."""

from __future__ import annotations

import json
import time
from pathlib import Path

import click

from loractl.common.errors import UsageError

from .terminal import tell, warn


@click.command()
@click.argument("adapter", metavar="ADAPTER")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False), metavar="DIR")
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), default="bfloat16", show_default=True)
@click.option("--gguf", is_flag=True, help="Also write a GGUF file, by llama.cpp's converter.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def merge(adapter: str, folder: Path, dtype: str, gguf: bool, as_json: bool) -> None:
    """Merge base and adapter into a full model, and prove that it is the same.

    Loads the base in fp32, for QLoRA too. Writes safetensors, tokenizer and merge.json into DIR, which must be new.
    """
    from loractl.common.settings import load_settings
    from loractl.worker.base.kernels import load_kernels
    from loractl.worker.base.quiet import quieten
    from loractl.worker.serving.library import Library
    from loractl.worker.serving.merge import find_converter, merge_adapter

    if folder.exists():
        raise UsageError(f"{folder} already exists", "name a new folder")
    converter = find_converter() if gguf else None
    quieten()
    library = Library(load_settings(), warn)
    say = (lambda text: None) if as_json else (lambda text: tell(f"{time.strftime('%H:%M:%S')}  {text}"))
    found = library.find(adapter)
    load_kernels()
    merged = merge_adapter(library, found, folder, dtype, converter, say)
    click.echo(json.dumps(merged.as_json()) if as_json else merged.sentences)
