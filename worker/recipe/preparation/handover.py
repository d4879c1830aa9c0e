"""The rows of an order: read, checked, tokenised, packed; and as files that one process writes and another maps: JSON,
and columns of numbers.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from loractl.common.data.examples import Example, Turn
from loractl.common.data.giveaway import GIVEN_AWAY
from loractl.common.data.inspection import Leaks
from loractl.common.job.sections import DataFormat
from loractl.common.job.spec import JobSpec
from loractl.worker.data.check import findings_about
from loractl.worker.data.packing import packed
from loractl.worker.data.prepared import FinalRows, PreparedData, prepare_data, prepare_regression
from loractl.worker.data.row_forms import with_prompts
from loractl.worker.data.token_rows import TokenRows
from loractl.worker.data.token_set import TokenSet
from loractl.worker.protocol.messages import Start


def prepare_rows(order: Start, spec: JobSpec, tokenizer: Any) -> PreparedData:
    """Prepare the data as the job asks. `tokenizer`: with the job's template. Raises DataError, TrainingFailed."""
    data = prepare_data(
        spec.dataset,
        order.data_path,
        order.eval_path,
        order.data_sha256,
        tokenizer,
        Path(order.cache_dir),
        order.more_paths,
        final_path=order.final_path,
    )
    if order.regression_path is not None:
        name = spec.evaluation.regression or order.regression_path
        other, commit = prepare_regression(spec.dataset, name, order.regression_path, data.train_examples, tokenizer)
        data = replace(data, regression=other, commits=data.commits | ({"regression": commit} if commit else {}))
    if spec.preference.learns_prompts:
        data = replace(data, train=replace(data.train, rows=with_prompts(data.train.rows)))
    leaks, of_final = Leaks(data.held_out_examples), Leaks.of_final(None if data.final is None else data.final.examples)
    found = findings_about(spec, data, tokenizer, leaks, of_final)
    warnings = tuple(finding.sentence for finding in found if finding.level == "warning")
    if data.final is not None and of_final is not None:
        data = replace(data, final=replace(data.final, **_told(of_final)))
    told = _told(leaks)
    told["leaks"] += tuple(finding.text for finding in found if finding.kind == GIVEN_AWAY)
    return packed(replace(data, warnings=warnings, **told), spec)


def _told(leaks: Leaks) -> dict[str, Any]:
    return {"leaks": tuple(finding.text for finding in leaks.findings()), "given_away": tuple(leaks.rows)}


_FILE = "data.json"

_PLAIN = ("why", "dropped", "overlap", "repeated", "unused", "sources", "sha256", "commits", "seen")


def write_handover(data: PreparedData, spec: JobSpec, folder: Path) -> None:
    """Write all that a training needs of its data. Rows in the cache are only named. Raises OSError."""
    asked = spec.evaluation
    measured = None if asked.max_rows is None else max(asked.max_rows, asked.samples)
    value = {
        **{name: getattr(data, name) for name in _PLAIN},
        "format": data.format.value,
        "warnings": data.warnings,
        "leaks": data.leaks,
        "given_away": data.given_away,
        "label_names": data.label_names,
        "held_out_examples": [asdict(example) for example in data.held_out_examples[:measured]],
        "train": _written(data.train, folder / "train"),
        "held_out": _written(data.held_out, folder / "held-out"),
        "final": None if data.final is None else _written_final(data.final, measured, folder / "final"),
        "regression": None if data.regression is None else _written(data.regression, folder / "regression"),
        "packed": None if data.packed is None else str(data.packed.save(folder / "packed")),
    }
    (folder / _FILE).write_text(json.dumps(value), "utf-8")


def read_handover(folder: Path) -> PreparedData:
    """Map what was written. The folder may be deleted afterwards. Raises OSError, ValueError."""
    value = json.loads((folder / _FILE).read_text("utf-8"))
    seen, packed, regression, final = (value.pop(key) for key in ("seen", "packed", "regression", "final"))
    data = PreparedData(
        format=DataFormat(value.pop("format")),
        warnings=tuple(value.pop("warnings")),
        leaks=tuple(value.pop("leaks")),
        given_away=tuple(value.pop("given_away")),
        label_names=tuple(value.pop("label_names")),
        unused=tuple(value.pop("unused")),
        sources=tuple(value.pop("sources")),
        train_examples=(),
        held_out_examples=[_example(**fields) for fields in value.pop("held_out_examples")],
        train=_mapped(value.pop("train")),
        held_out=_mapped(value.pop("held_out")),
        regression=None if regression is None else _mapped(regression),
        final=None if final is None else _final(**final),
        packed=None if packed is None else TokenRows.load(Path(packed)),
        **value,
    )
    vars(data)["seen"] = seen  # what was seen in examples that are not here
    return data


def _written_final(final: FinalRows, measured: int | None, folder: Path) -> dict[str, Any]:
    examples = [asdict(example) for example in final.examples[:measured]]
    return {**vars(final), "tokens": _written(final.tokens, folder), "examples": examples}


def _final(*, tokens: dict[str, Any], examples: list[dict[str, Any]], **plain: Any) -> FinalRows:
    return FinalRows(
        tokens=_mapped(tokens),
        examples=[_example(**fields) for fields in examples],
        leaks=tuple(plain.pop("leaks")),
        given_away=tuple(plain.pop("given_away")),
        **plain,
    )


def _written(tokens: TokenSet, folder: Path) -> dict[str, Any]:
    return {**vars(tokens), "rows": str(tokens.rows.save(folder))}


def _mapped(value: dict[str, Any]) -> TokenSet:
    return TokenSet(**{**value, "rows": TokenRows.load(Path(value["rows"]))})


def _example(*, turns: list[dict[str, Any]], **fields: Any) -> Example:
    return Example(turns=tuple(Turn(**turn) for turn in turns), **fields)
