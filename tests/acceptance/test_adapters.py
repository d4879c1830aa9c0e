"""Stored adapters by their names and tags: shown, pulled, merged, asked, and removed."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy.orm import Session

from loractl.common.settings import load_settings
from loractl.common.store.database import make_engine
from loractl.common.store.tables import Job

from .. import json_page, warm
from ..conftest import Cli
from ..models import write_job
from .conftest import ANSWERS


def test_an_adapter_is_found_by_number_by_name_and_by_tag(trained: Cli) -> None:
    assert trained("adapters", "tag", 1, "first").stdout == "red:first is the adapter of job 1 now.\n"
    rows = {row["job_id"]: row["tags"] for row in json.loads(trained("adapters", "list", "--json").stdout)}
    assert rows == {1: ["first"], 2: ["latest"], 3: ["latest"], 4: ["latest"]}
    for text, job in (("1", 1), ("red", 4), ("red:latest", 4), ("red:first", 1), ("green", 2)):
        assert json.loads(trained("adapters", "show", text, "--json").stdout)["job_id"] == job
    moved = trained("adapters", "tag", "red", "first").stdout
    assert moved == "red:first is the adapter of job 4 now; it was job 1.\n"
    assert "tagged red:first, which job 1 had by ada" in trained("status", 4, "--full").stdout
    assert trained("adapters", "untag", "red:first").stdout == "red:first is forgotten; it was job 4.\n"
    assert "no adapter red:first is stored" in trained("adapters", "show", "red:first", code=3).stderr


def test_the_lineage_names_base_data_and_versions(trained: Cli, base_of_trained: Path) -> None:
    shown = trained("adapters", "show", "blue").stdout
    assert shown.startswith("blue (job 3)\n")
    for expected in (
        f"base      {base_of_trained}",
        "of ada",
        "r 4, lora_alpha 8",
        "sha256",
        "held-out loss",
        "torch 2",
    ):
        assert expected in shown
    lineage = json.loads(trained("adapters", "show", "blue", "--json").stdout)
    assert lineage["lora"]["use_dora"] is True and len(lineage["data"]["sha256"]) == 64


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["show", "pink"], 3, "no adapter pink:latest is stored"),
        (["show", "99"], 3, "there is no job 99"),
        (["show", "a b"], 2, "'a b' names no adapter"),
        (["tag", "red", "latest"], 2, "latest is always the newest adapter of a name"),
        (["tag", "red", "a/b"], 2, "'a/b' is not a tag"),
        (["untag", "red"], 2, "'red' is not of the form NAME:TAG"),
        (["untag", "red:latest"], 2, "latest is always"),
        (["untag", "red:nope"], 3, "no adapter red:nope is stored"),
        (["merge", "red", "."], 2, ". already exists"),
        (["merg", "red"], 2, "did you mean loractl adapters merge?"),
    ],
)
def test_wrong_names_are_told_in_a_sentence(trained: Cli, arguments: list[str], code: int, says: str) -> None:
    done = trained("adapters", *arguments, code=code)
    assert says in done.stderr and "Traceback" not in done.stderr


@contextlib.contextmanager
def kept_in_the_lab(cli: Cli, job_id: int) -> Iterator[None]:
    """The job's file says publish: false meanwhile."""
    engine = make_engine(load_settings(cli.environment).database_url)
    with Session(engine) as session:
        job = session.get_one(Job, job_id)
        before, job.spec = job.spec, {**job.spec, "publish": False}
        session.commit()
        yield
        job.spec = before
        session.commit()
    engine.dispose()


def test_a_merged_model_is_proved_and_loads_with_transformers_alone(
    trained: Cli, base_of_trained: Path, tmp_path: Path
) -> None:
    with kept_in_the_lab(trained, 4):
        done = json.loads(trained("adapters", "merge", "red", tmp_path / "red", "--json").stdout)
    json_page.hold({"adapters merge": [done]})
    assert done["merged_difference"] < 1e-4 and done["tokens"] > 20
    assert done["stored_agreement"] > 0.9
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "red", dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "red")
    asked = [{"role": "user", "content": "what is in 7?"}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**ids, max_new_tokens=48, do_sample=False)
    answer = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert (
        answer == trained("generate", "red", "what is in 7?", "--max-new-tokens", 48).stdout.strip() == ANSWERS["red"]
    )
    about = json.loads((tmp_path / "red" / "merge.json").read_text())
    (tmp_path / "new").touch()
    (tmp_path / "new folder").mkdir()
    modes = {path.stat().st_mode for path in (tmp_path / "red").iterdir()}
    assert modes == {(tmp_path / "new").stat().st_mode}, "as any other new file: others load it, too"
    assert (tmp_path / "red").stat().st_mode == (tmp_path / "new folder").stat().st_mode
    assert (about["job_id"], about["dtype"], about["base_model"]) == (4, "bfloat16", base_of_trained.name)
    assert about["publish"] is False and "must stay in the lab" in (tmp_path / "red" / "README.md").read_text()
    begun = trained("submit", "--dry-run", write_job(tmp_path, tmp_path / "red"))
    assert "the adapter of tiny must stay in the lab" in begun.stderr
    files = [path for path in (tmp_path / "red").rglob("*") if path.is_file()]
    assert not [path.name for path in files if str(base_of_trained).encode() in path.read_bytes()], "paths of this box"
    assert not list(tmp_path.glob(".red-*")), "nothing half-written is left"


def test_a_merge_that_is_not_the_same_writes_nothing(
    trained: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base that changes between the two measurements stands for a merge that goes wrong, as one in bf16 would."""
    from loractl.common.settings import load_settings
    from loractl.worker.serving import merge as merging
    from loractl.worker.serving.library import Library

    looked = merging._logits
    calls: list[int] = []

    def other(model: object, prompts: object) -> object:
        calls.append(1)
        found = looked(model, prompts)  # type: ignore[arg-type]
        return [t + 0.01 for t in found] if len(calls) == 2 else found

    monkeypatch.setattr(merging, "_logits", other)
    library = Library(load_settings({"LORACTL_HOME": trained.environment["LORACTL_HOME"]}))
    with pytest.raises(merging.MergeFailed, match=r"differs from base and adapter by 1\.00e-02"):
        merging.merge_into(tmp_path, library, library.find("red"), "bfloat16")
    assert list(tmp_path.iterdir()) == []


def test_a_merge_takes_nothing_of_the_box_s_card(trained: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left to itself peft reads an adapter onto a card where it sees one. Here that would fail: there is none."""
    from loractl.common.settings import load_settings
    from loractl.worker.serving import merge as merging
    from loractl.worker.serving.library import Library

    monkeypatch.setattr("peft.peft_model.infer_device", lambda: "cuda")
    library = Library(load_settings({"LORACTL_HOME": trained.environment["LORACTL_HOME"]}))
    assert merging.merge_into(tmp_path, library, library.find("red"), "bfloat16").stored_agreement > 0.9


def test_gguf_is_for_boxes_with_the_converter_and_its_failure_is_told(trained: Cli, tmp_path: Path) -> None:
    missing = trained.with_environment(PATH="/nowhere")("adapters", "merge", "red", tmp_path / "a", "--gguf", code=2)
    assert "needs llama.cpp's convert_hf_to_gguf.py" in missing.stderr
    (tmp_path / "convert_hf_to_gguf.py").write_text("import sys\nsys.exit('Model LlamaForCausalLM is not supported')\n")
    there = trained.with_environment(LLAMA_CPP=str(tmp_path))
    failed = there("adapters", "merge", "red", tmp_path / "a", "--gguf", code=1)
    assert "convert_hf_to_gguf.py failed: Model LlamaForCausalLM is not supported" in failed.stderr
    assert not (tmp_path / "a").exists()
    (tmp_path / "convert_hf_to_gguf.py").write_text(
        "import pathlib, sys\nargs = sys.argv[1:]\n"
        "assert args[1::2] == ['--outfile', '--outtype'] and args[4] == 'bf16'\n"
        "pathlib.Path(args[2]).write_bytes(pathlib.Path(args[0], 'model.safetensors').read_bytes())\n"
    )
    there("adapters", "merge", "red", tmp_path / "a", "--gguf")
    assert (tmp_path / "a" / "red-bfloat16.gguf").stat().st_size == (
        tmp_path / "a" / "model.safetensors"
    ).stat().st_size


def test_the_report_of_a_training_has_the_keys_of_its_page(trained: Cli) -> None:
    told = [json.loads(trained("report", number, "--json").stdout) for number in (1, 3)]
    json_page.hold({"report": told})


def test_generate_answers_as_the_adapter_was_taught_and_the_base_does_not(trained: Cli) -> None:
    asked = ["what is in 3?", "what is in 9?"]
    rows = json.loads(trained("generate", "green:latest", *asked, "--json").stdout)
    assert [row["answer"] for row in rows] == [ANSWERS["green"]] * 2
    assert [row["ended"] for row in rows] == ["stop", "stop"] and rows[0]["job_id"] == 2
    base = json.loads(trained("generate", "green", asked[0], "--base", "--max-new-tokens", 8, "--json").stdout)
    json_page.hold({"generate": [rows, base]})
    assert base[0]["answer"] != ANSWERS["green"] and base[0]["job_id"] is None
    one = trained("generate", "blue", "what is in 1?")
    assert one.stdout == ANSWERS["blue"] + "\n" and one.stderr.startswith("Loading blue and its base ...\n")
    empty = trained("generate", "green", code=2)  # standard input is empty
    assert "the prompt is empty" in empty.stderr


def test_predict_answers_every_row_of_a_file_in_its_order(trained: Cli, tmp_path: Path) -> None:
    asked = [f"what is in {n}?" for n in range(40)]
    rows = [{"messages": [{"role": "user", "content": text}]} for text in asked]
    rows[7]["messages"].append({"role": "assistant", "content": "an answer that is known"})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = trained("predict", "green:latest", tmp_path / "rows.jsonl", "-o", tmp_path / "out.jsonl").stderr
    assert f"{tmp_path / 'out.jsonl'}: 40 rows." in said and "Loading green:latest and its base ...\n" in said
    told = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert told == [{"row": n, "answer": ANSWERS["green"], "ended": "stop"} for n in range(1, 41)]
    assert not (tmp_path / "out.jsonl.part").exists()

    (tmp_path / "rows.csv").write_text(f"prompt\n{asked[0]}\n{'queue ' * 600}\n{asked[1]}\n")
    done = trained("predict", "blue", tmp_path / "rows.csv", code=1)
    first, cut, last = map(json.loads, done.stdout.splitlines())
    assert first["answer"] == last["answer"] == ANSWERS["blue"] and (first["row"], last["row"]) == (1, 3)
    assert cut["row"] == 2 and cut["error"].startswith("the prompt has ")
    assert "1 of 3 rows has no answer: its line says why." in done.stderr


def test_predict_looks_at_all_rows_before_a_base_is_loaded(trained: Cli, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a"}\n{"prompt": ""}\n')
    assert "row 2: prompt is empty" in trained("predict", "green", rows, code=2).stderr
    rows.write_text('{"body": "a"}\n')
    refused = trained("predict", "green", rows, code=2).stderr
    assert "row 1: asks nothing: it has body" in refused and "this adapter reads messages, conversations" in refused
    assert "is the file of the rows" in trained("predict", "green", rows, "-o", rows, code=2).stderr
    assert "there is no folder" in trained("predict", "green", rows, "-o", tmp_path / "no" / "a", code=2).stderr


def test_chat_switches_adapters_in_place_and_lets_the_base_answer(trained: Cli) -> None:
    lines = [
        "what is in 5?", "/adapter green", "/reset", "what is in 5?", "/base", "/adapter pink", "/adapter", "/nope",
        "/system be brief", "what is in 2?", "/help", "/quit", "never asked",
    ]  # fmt: skip
    command = [sys.executable, "-S", "-E", str(warm.__file__), "chat", "red", "--max-new-tokens", "48"]
    done = subprocess.run(
        command, input="\n".join(lines), env=trained.environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    red, green, *others = done.stdout.splitlines()
    assert (red, green) == (ANSWERS["red"], ANSWERS["green"])
    assert others[-1] == ANSWERS["green"] and len(others) > 1 and others[0] != ANSWERS["green"]
    for said in (
        "green (job 2) answers now", "no adapter pink:latest is stored", "/adapter needs a name",
        "there is no command /nope", "A new conversation.", "/base ",
    ):  # fmt: skip
        assert said in done.stderr


@pytest.fixture
def replaced(trained: Cli) -> Iterator[Cli]:
    """The store, in which somebody has put the whole result of green in the place of job 4's."""
    jobs = Path(trained.environment["LORACTL_HOME"]) / "artifacts" / "jobs"
    own, aside = jobs / "4" / "attempt-1", jobs / "4" / "kept-by-the-test"
    own.rename(aside)
    shutil.copytree(jobs / "2" / "attempt-1", own)
    yield trained
    shutil.rmtree(own)
    aside.rename(own)


@pytest.mark.parametrize(
    "line",
    ["generate 4 hello", "chat 4", "serve --adapters red=4 --port 0", "matrix --adapters 4,2", "adapters merge 4 NEW"],
)
def test_no_model_answers_with_an_adapter_that_is_not_the_one_of_its_row(
    replaced: Cli, line: str, tmp_path: Path
) -> None:
    done = replaced(*(str(tmp_path / "new") if word == "NEW" else word for word in line.split()), code=1)
    assert "Error: " in done.stderr and "was changed after it was stored: its manifest is not the one" in done.stderr
    assert "Traceback" not in done.stderr and "is loaded" not in done.stderr
    assert not (tmp_path / "new").exists()
