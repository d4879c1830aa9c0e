"""Tokenizers of a process: made once, one training's at a time, and as new for the next one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loractl.worker.base.kept.tokenizers import KEPT, Tokenizers
from loractl.worker.base.model import load_tokenizer


def test_the_next_training_has_the_tokenizer_as_it_was_made(tiny_model: Path, tmp_path: Path) -> None:
    kept, made = Tokenizers(), list[Any]()

    def make() -> Any:
        made.append(load_tokenizer(str(tiny_model)))
        return made[-1]

    def files(tokenizer: Any, name: str) -> dict[str, bytes]:
        tokenizer.save_pretrained(tmp_path / name)
        return {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}

    first = kept.take((str(tiny_model), None), make)
    new = files(first.tokenizer, "new")
    first.tokenizer(["a b", "c"], padding=True, truncation=True, max_length=2)
    first.tokenizer.padding_side, first.tokenizer.chat_template = "left", "another"
    assert files(first.tokenizer, "used") != new
    beside = kept.take((str(tiny_model), None), make)
    assert beside.tokenizer is not first.tokenizer and len(made) == 2, "each has its own"
    kept.give_back(first)
    again = kept.take((str(tiny_model), None), make)
    assert again.tokenizer is first.tokenizer and len(made) == 2
    assert files(again.tokenizer, "again") == new


def test_no_tokenizer_outlives_its_files_and_few_wait(tmp_path: Path) -> None:
    from tests.models import make_tiny_model

    folder, kept = make_tiny_model(tmp_path / "model"), Tokenizers()

    def take() -> Any:
        return kept.take((str(folder), None), lambda: load_tokenizer(str(folder)))

    lent = [take() for _ in range(KEPT + 1)]
    for one in lent:
        kept.give_back(one)
    known = {id(one.tokenizer) for one in lent}
    assert [id(take().tokenizer) in known for _ in range(KEPT + 1)] == [True] * KEPT + [False]
    kept.give_back(lent[0])
    file = folder / "tokenizer_config.json"
    file.write_bytes(file.read_bytes() + b"\n")
    assert id(take().tokenizer) not in known
