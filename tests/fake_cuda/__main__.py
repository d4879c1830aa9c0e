"""`python -m tests.fake_cuda NAME...`: what came of cases, faults and steps of real sizes, each a line of JSON."""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import put_in

put_in()  # before torch

from loractl.worker.base.kernels import load_kernels  # noqa: E402

load_kernels()

from loractl.worker.base.source import first_line  # noqa: E402

from .budget import SHAPES, WAYS, counted  # noqa: E402
from .passes import CARDS, CASES, FAULTS, MANY, Case, fault, outcome  # noqa: E402


def main() -> None:
    warnings.simplefilter("ignore")
    cases = CASES | CARDS | MANY
    for name in sys.argv[1:]:
        if name in SHAPES:
            found = {way: asdict(counted(SHAPES[name], way)) for way in WAYS}
        else:
            found = _tried(cases.get(name, Case()), fault(name) if name in FAULTS else contextlib.nullcontext())
        print(json.dumps({"name": name, **found}), flush=True)


def _tried(case: Case, around: contextlib.AbstractContextManager[None]) -> dict[str, Any]:
    try:
        with around:
            return outcome(case)
    except Exception as error:  # noqa: BLE001  an operator that does not take its tensors: the test shows it
        called = [at for at in traceback.extract_tb(error.__traceback__) if "site-packages" not in at.filename]
        where = [f"{Path(at.filename).name}:{at.lineno}" for at in called]
        return {"faults": {f"{type(error).__name__}: {first_line(error)}": 1}, "where": where}


if __name__ == "__main__":
    main()
