"""task_type: SEQ_CLS: a head that names labels, trained with the adapter, stored with it, and measured honestly."""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from loractl.common.data.giveaway import FormRule
from loractl.common.data.inspection import Leaks
from loractl.common.job.method import Method
from loractl.common.job.sections import DataFormat, DatasetSpec
from loractl.common.job.spec import JobSpec
from loractl.common.job.status import Reason
from loractl.common.model_card import Published, hub_card
from loractl.common.verdict import MIN_NEW
from loractl.worker.base.arithmetic import choose_precision
from loractl.worker.base.failure import TrainingFailed
from loractl.worker.base.lora import add_adapter
from loractl.worker.base.model import Head, Learner, load_base, load_tokenizer
from loractl.worker.data.prepared import prepare_data
from loractl.worker.data.tokens import TokenRow
from loractl.worker.evaluation.classifier import classify, evaluate_classifier, row_losses
from loractl.worker.evaluation.evaluation import EvaluationTask
from loractl.worker.protocol.messages import Ended, Note, Stepped

from ..conftest import Cli
from .conftest import Recipe

LABELS = ("gpu", "network", "storage")
LENGTHY = "please answer the next line "

Classifier = Callable[..., tuple[Ended, list[Any]]]


def write_tickets(path: Path, rows: range, *, relabel: int | None = None) -> Path:
    """Texts whose label stands in them, half of them `storage`; some are much longer than others."""
    with path.open("w") as stream:
        for n in rows:
            label = LABELS[(0, 2, 1, 2)[n % 4]]
            text = f"{'please ' * (n % 3)}{n} answer {label} queue"
            stream.write(json.dumps({"text": text, "label": "gpu" if n == relabel else label}) + "\n")
    return path


@pytest.fixture
def classifier(recipe: Recipe, tmp_path: Path) -> Classifier:
    """The recipe on tickets: 60 to train on, 20 held out."""
    train = write_tickets(tmp_path / "tickets.jsonl", range(60))
    held_out = write_tickets(tmp_path / "held-out.jsonl", range(60, 80))

    def run(where: str = "a", **keys: Any) -> tuple[Ended, list[Any]]:
        dataset = {"path": str(train), "eval_path": str(held_out), **keys.pop("dataset", {})}
        evaluation = {"samples": 0, **keys.pop("evaluation", {})}
        return recipe(where, job={"task_type": "SEQ_CLS"}, dataset=dataset, evaluation=evaluation, **keys)

    return run


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result" / "report.json").read_text())


def metrics(folder: Path) -> dict[str, Any]:
    return {metric["name"]: metric for metric in report(folder)["evaluation"]["metrics"]}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "result" / "adapter" / "adapter_model.safetensors")


def losses(told: list[Any], name: str = "loss") -> list[float]:
    return [m.metrics[name] for m in told if isinstance(m, Stepped) and name in m.metrics]


def notes(told: list[Any], kind: str) -> list[str]:
    return [m.text for m in told if isinstance(m, Note) and m.kind == kind]


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_classifier_learns_and_is_compared_with_the_most_frequent_label(
    classifier: Classifier, tmp_path: Path, method: str
) -> None:
    ended, _ = classifier(method=method, max_steps=40)
    assert ended.reason is Reason.OK
    found, told = metrics(tmp_path / "a"), report(tmp_path / "a")
    # the baseline by hand: 30 of 60 rows are storage, 15 each of the others; held out are 10, 5 and 5 of 20
    assert found["accuracy"]["base"] == 50
    assert found["macro_f1"]["base"] == pytest.approx(100 * (2 * 10 / 30) / 3)
    assert found["loss"]["base"] == pytest.approx((10 * math.log(2) + 10 * math.log(4)) / 20)
    assert found["loss"]["reading"] == found["accuracy"]["reading"] == "better"
    assert found["accuracy"]["tuned"] > 80 and found["loss"]["tuned"] < 0.6
    labels = told["evaluation"]["labels"]
    assert labels["names"] == list(LABELS)
    assert labels["base"] == [[0, 0, 5], [0, 0, 5], [0, 0, 10]]
    right = sum(labels["tuned"][n][n] for n in range(3))
    assert found["accuracy"]["tuned"] == pytest.approx(100 * right / 20) and sum(map(sum, labels["tuned"])) == 20
    assert told["evaluation"]["baseline"] == "the most frequent label, storage"
    why = "100 % of 20 rows held out hold the answer in the question"
    assert told["verdict"]["sentence"].startswith(f"Can't be judged: {why}; held-out loss 1.04 -> ")
    assert set(found) == {"loss", "accuracy", "macro_f1"} and told["evaluation"]["answers"] == []
    assert told["data"]["labels"]["storage"] == {"train": 30, "held_out": 10}
    page = (tmp_path / "a" / "result" / "report.html").read_text()
    assert "base: the most frequent label, storage, its loss that of guessing by how often each label is" in page
    published = Published(repository="lab/queues", base="org/tiny", license=None, datasets=(), final="")
    card = hub_card(told, JobSpec.model_validate(told["spec"]), published)
    assert "pipeline_tag: text-classification" in card and '"Base" is the most frequent label, storage' in card
    assert 'base, adapter = "org/tiny", snapshot_download("lab/queues")\n' in card


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_the_stored_adapter_answers_the_same_with_what_its_card_says(
    classifier: Classifier, tiny_model: Path, tmp_path: Path, method: str
) -> None:
    """The card's own lines, on the adapter alone: equal losses on the held-out rows, and names for the labels."""
    classifier(method=method, max_steps=10, dtype="float32")
    adapter = tmp_path / "a" / "result" / "adapter"
    (code,) = re.findall(r"```python\n(.*?)```", (adapter / "README.md").read_text(), re.S)
    assert f'base, adapter = "{tiny_model.name}", "."\n' in code
    lines = code.replace(f'"{tiny_model.name}", "."', f'"{tiny_model}", "{adapter}"')
    if method == "qlora":  # on the whole base its answers would be those of another model
        lines = lines.replace("    base,", "    base, quantization_config=nf4(),")
    names: dict[str, Any] = {"nf4": _nf4}
    exec(lines, names)  # what a person would paste
    model, tokenizer = names["model"], names["tokenizer"]
    assert model.config.id2label == dict(enumerate(LABELS))
    rows = [json.loads(line) for line in (tmp_path / "held-out.jsonl").read_text().splitlines()]
    with torch.no_grad():
        batch = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
        logits = model(**batch).logits.double().numpy()
    expected = np.array([LABELS.index(row["label"]) for row in rows])
    told = {row: loss for row, _, _, loss in report(tmp_path / "a")["evaluation"]["row_losses"]}
    nearly = 5e-3 if method == "qlora" else 2e-4  # bitsandbytes' kernel for inference rounds otherwise
    for number, loss in enumerate(row_losses(logits, expected), start=1):
        assert loss == pytest.approx(told[number], abs=nearly)


def _nf4() -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["score"],
    )


def test_a_row_is_answered_alike_alone_in_a_batch_and_with_padding_on_either_side(tiny_model: Path) -> None:
    """The padding token is the end-of-sequence token here, and stands in a text as well."""
    tokenizer = load_tokenizer(str(tiny_model))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    model = _tuned(tiny_model, Method.LORA).eval()
    texts = ["gpu", "a network of <|im_end|> storage", LENGTHY * 4, "queue 7"]
    rows = [TokenRow(number=n, input_ids=tokenizer(text).input_ids, labels=[], label=0) for n, text in enumerate(texts)]
    with torch.no_grad():
        together = classify(model, tokenizer.pad_token_id, rows, 4)
        alone = np.concatenate([classify(model, tokenizer.pad_token_id, [row], 1) for row in rows])
        tokenizer.padding_side = "left"
        left = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits.double().numpy()
    assert np.ptp(alone[:, 0]) > 0.01, "the rows differ"
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(left, alone, atol=1e-4)


@pytest.mark.parametrize("new", [20, 32])
def test_held_out_texts_that_resemble_trained_ones_are_measured_apart(
    tiny_model: Path, tmp_path: Path, new: int
) -> None:
    """Such rows were part of the verdict as any other: a classifier that knew 38 of 40 texts by heart was better."""
    tokenizer, texts = load_tokenizer(str(tiny_model)), list(map(_text, range(72)))
    files = [tmp_path / "train.csv", tmp_path / "held-out.csv"]
    known = [(f"hello there, {text}, thanks a lot", label) for text, label in texts[:19]]
    for file, rows in zip(files, (texts[:40], [*known, *texts[40 : 40 + new]]), strict=True):
        file.write_text("text,label\n" + "".join(f'"{text}",{label}\n' for text, label in rows))
    dataset = DatasetSpec(path=str(files[0]), eval_path=str(files[1]), format=DataFormat.CLASSIFICATION)
    data = prepare_data(dataset, str(files[0]), str(files[1]), None, tokenizer, None)
    leaks = Leaks(data.held_out.examples)
    leaks.see_all(data.train_examples)
    precision = choose_precision("cpu", "float32")
    learner = Learner(model=_tuned(tiny_model, Method.LORA), tokenizer=tokenizer, precision=precision)
    rule = FormRule(what="the last sign", right=dict.fromkeys(data.held_out.rows.numbers, True))
    data = replace(data, held_out=replace(data.held_out, given_away=tuple(leaks.rows), rule=rule))
    found = evaluate_classifier(
        EvaluationTask(learner=learner, data=data, spec=_spec(tiny_model), check_stop=lambda: None)
    )
    assert found.given_away == 19 and found.rows == 19 + new
    metrics = {metric.name: metric for metric in found.metrics}
    assert metrics["new_rows_loss"].cases == new
    against = metrics["cheap_form_accuracy"]
    assert (against.label, against.base) == ("labels right, against the last sign alone", 100)
    assert against.tuned == metrics["accuracy"].tuned < 100
    judges = {name for name in metrics if name.startswith("new_rows_")} - {"new_rows_loss"}
    if new < MIN_NEW:
        assert not judges, "too few to judge by"
        return
    assert judges == {"new_rows_accuracy", "new_rows_macro_f1", "new_rows_cheap_form_accuracy"}
    assert found.labels is not None
    right = found.labels.right(found.labels.tuned)[19:]
    for name in ("new_rows_accuracy", "new_rows_cheap_form_accuracy"):
        assert (metrics[name].cases, metrics[name].tuned) == (new, pytest.approx(100 * sum(right) / new))


def _text(number: int) -> tuple[str, str]:
    draw = random.Random(number)
    return " ".join("".join(draw.choices("abcdefghij", k=6)) for _ in range(12)), LABELS[number % 3]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_head_is_trained_in_fp32_out_of_nf4_and_begins_as_its_seed_says(tiny_model: Path, dtype: str) -> None:
    from bitsandbytes.nn import Linear4bit

    begun = {}
    for name, method, seed in (("lora", Method.LORA, 0), ("qlora", Method.QLORA, 0), ("other", Method.LORA, 1)):
        torch.manual_seed(99)  # whatever was drawn before
        torch.rand(seed + len(name))
        model = _tuned(tiny_model, method, seed=seed, dtype=dtype)
        head = model.base_model.model.score.modules_to_save["default"]
        assert type(head) is torch.nn.Linear and head.weight.dtype == torch.float32 and head.weight.requires_grad
        assert any(isinstance(module, Linear4bit) for module in model.modules()) == (method is Method.QLORA)
        begun[name] = head.weight.detach().clone()
    assert torch.equal(begun["lora"], begun["qlora"])
    assert not torch.equal(begun["lora"], begun["other"])


@pytest.mark.long
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_resumed_classifier_is_bitwise_that_of_an_uninterrupted_run(
    classifier: Classifier, tmp_path: Path, method: str
) -> None:
    asked = {"method": method, "max_steps": 10, "eval_steps": 3, "lora": {"lora_dropout": 0.1}}
    _, whole = classifier("whole", **asked)
    classifier("first", stop_after=4, **asked)
    _, rest = classifier("rest", resume="first", **asked)
    (resumed,) = notes(rest, "resumed")
    step = int(re.findall(r"\d+", resumed)[0])
    assert 4 <= step < 10
    assert losses(rest) == losses(whole)[step:]
    mine, theirs = weights(tmp_path / "rest"), weights(tmp_path / "whole")
    assert any(name.endswith("score.weight") for name in mine) and mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_checkpoint_of_other_labels_is_not_resumed(classifier: Classifier, tmp_path: Path) -> None:
    classifier("first", stop_after=4, max_steps=8)
    other = write_tickets(tmp_path / "relabelled.jsonl", range(60), relabel=1)
    _, told = classifier("second", resume="first", max_steps=8, dataset={"path": str(other)})
    assert notes(told, "resumed") == [] and "data differ" in notes(told, "refused")[0]


@pytest.mark.long
def test_the_best_head_is_kept_and_a_training_that_gets_worse_ends(classifier: Classifier, tmp_path: Path) -> None:
    """Every other held-out row has a wrong label: what is learned first helps, and then makes it all too sure."""
    held_out = [json.loads(line) for line in (tmp_path / "held-out.jsonl").read_text().splitlines()]
    for row in held_out[::2]:
        row["label"] = LABELS[LABELS.index(row["label"]) - 2]
    (tmp_path / "wrong.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    steady = {"learning_rate": 3e-3, "lr_scheduler_type": "constant", "warmup_steps": 0}
    same = {"lora": {"lora_dropout": 0}, "dataset": {"eval_path": str(tmp_path / "wrong.jsonl")}, **steady}
    asked = {"eval_steps": 1, "load_best_model_at_end": True, "early_stopping_patience": 3}
    _, told = classifier("a", max_steps=30, **asked, **same)
    course = losses(told, "eval_loss")
    best = course.index(min(course)) + 1
    assert len(course) == best + 3 < 30 and best > 1, "it is not simply the first"
    assert metrics(tmp_path / "a")["loss"]["tuned"] == pytest.approx(min(course), rel=1e-3)
    classifier("short", max_steps=best, **same)
    kept, short = weights(tmp_path / "a"), weights(tmp_path / "short")
    assert all(torch.equal(kept[name], short[name]) for name in short)


def test_accumulated_gradients_are_those_of_the_whole_batch(classifier: Classifier, tmp_path: Path) -> None:
    """transformers' own loss would make them as many times too large as there are micro-batches."""
    same = {"max_steps": 4, "lora": {"lora_dropout": 0}, "dtype": "float32", "max_grad_norm": 100.0}
    _, whole = classifier("a", per_device_train_batch_size=8, gradient_accumulation_steps=1, **same)
    _, pieces = classifier("b", per_device_train_batch_size=2, gradient_accumulation_steps=4, **same)
    assert losses(pieces) == pytest.approx(losses(whole), rel=1e-4)
    assert losses(pieces, "grad_norm") == pytest.approx(losses(whole, "grad_norm"), rel=1e-3)


PLAIN: list[float] = []


def test_smoothed_labels_are_those_of_the_formula(classifier: Classifier) -> None:
    """At the start, with a head near zero, every label is as likely: a smoothed loss is ln 3 like any other."""
    _, told = classifier(max_steps=1, label_smoothing_factor=0.9)
    assert losses(told)[0] == pytest.approx(math.log(3), abs=0.1)


def test_a_row_that_is_cut_ends_as_its_tokenizer_ends_every_text(tiny_model: Path, tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_tokenizer(str(tiny_model))
    closing = TemplateProcessing(single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)])
    tokenizer.backend_tokenizer.post_processor = closing
    path = write_tickets(tmp_path / "d.jsonl", range(40))
    spec = _spec(tiny_model, dataset={"path": str(path), "max_length": 8})
    cut = prepare_data(spec.dataset, str(path), None, None, tokenizer, None).train
    assert cut.truncated > 0 and all(len(row.input_ids) <= 8 and row.input_ids[-1] == 0 for row in cut.rows)
    dropped = _spec(tiny_model, dataset={"path": str(path), "max_length": 9, "on_overflow": "drop"})
    data = prepare_data(dropped.dataset, str(path), None, None, tokenizer, tmp_path / "cache")
    assert data.train.too_long > 0 and len(data.held_out.examples) == len(data.held_out.rows)
    again = prepare_data(dropped.dataset, str(path), None, None, tokenizer, tmp_path / "cache")
    assert again.train == data.train, "the labels are there with tokens from the cache as well"
    names = {e.number: e.label for e in data.train_examples}
    assert all(data.label_names[row.label] == names[row.number] for row in data.train.rows if row.label is not None)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_all_but_the_head_is_the_base_as_it_was_published(family: str, tmp_path: Path) -> None:
    """Each family has its own name for what is below the head."""
    from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig

    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = {
        "llama": LlamaConfig(**sizes, num_attention_heads=2),
        "gpt2": GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=2),
        "gpt_neox": GPTNeoXConfig(**sizes, num_attention_heads=2),
    }[family]
    words = AutoModelForCausalLM.from_config(config).eval()
    words.save_pretrained(tmp_path)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        seen = words.base_model(ids).last_hidden_state
        classifier = _base(tmp_path, Method.LORA).eval()
        torch.testing.assert_close(classifier.base_model(ids).last_hidden_state, seen)
        torch.testing.assert_close(classifier(ids).logits, seen[:, -1] @ classifier.score.weight.T)


def test_a_base_with_a_head_already_or_of_another_kind_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, BertConfig, BertModel, LlamaConfig, LlamaForSequenceClassification

    sizes = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2}
    LlamaForSequenceClassification(LlamaConfig(**sizes)).save_pretrained(tmp_path / "taught")
    BertModel(BertConfig(**sizes)).save_pretrained(tmp_path / "encoder")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "encoder")
    for name, sentence in (("taught", "is a classifier already"), ("encoder", "SEQ_CLS is for decoders")):
        with pytest.raises(TrainingFailed, match=sentence) as failure:
            _base(tmp_path / name, Method.LORA)
        assert failure.value.reason is Reason.BAD_SPEC


@pytest.mark.long
def test_a_classifier_goes_from_its_job_file_to_its_report(cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    write_tickets(tmp_path / "tickets.jsonl", range(80))
    (tmp_path / "job.yaml").write_text(
        f"name: triage\nbase_model: {tiny_model}\nmethod: lora\ntask_type: SEQ_CLS\n"
        "dataset: {path: tickets.jsonl, test_size: 0.2, max_length: 64}\nlora: {r: 4}\n"
        "training: {max_steps: 30, learning_rate: 5.0e-3, gradient_accumulation_steps: 1}\n"
    )
    cli("submit", tmp_path / "job.yaml")
    cli("worker", "--drain-when-idle")
    text = cli("report", 1).stdout
    assert "1 triage: Can't be judged: 16 held-out rows are too few; held-out loss" in text
    assert re.search(r"^labels right, % +\d", text, re.M) and re.search(r"^macro F1 of the labels, % +\d", text, re.M)
    assert "Base: the most frequent label, storage; its loss is that of the labels' shares" in text
    counts = Counter(json.loads(line)["label"] for line in (tmp_path / "tickets.jsonl").read_text().splitlines())
    told = json.loads(cli("report", 1, "--json").stdout)
    assert {name: sum(rows.values()) for name, rows in told["data"]["labels"].items()} == counts
    _predicts_as_the_report_says(cli, tmp_path, told)
    assert f"{tmp_path}/pulled/README.md" in cli("adapters", "pull", 1, tmp_path / "pulled").stderr
    assert json.loads((tmp_path / "pulled" / "labels.json").read_text()) == ["gpu", "network", "storage"]
    config = json.loads((tmp_path / "pulled" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS" and config["modules_to_save"] == ["classifier", "score"]


def _predicts_as_the_report_says(cli: Cli, folder: Path, report: dict[str, Any]) -> None:
    """On the held-out rows: labels as the confusion table counts them, the right ones as likely as their losses say."""
    rows = [json.loads(line) for line in (folder / "tickets.jsonl").read_text().splitlines()]
    (folder / "unlabelled.csv").write_text("text\n" + "".join(f"{row['text']}\n" for row in rows))
    done = cli("predict", "triage", folder / "unlabelled.csv")
    assert "LOAD REPORT" not in done.stderr + cli("logs", 1).stdout, "that a head is begun anew is no news"
    lines = done.stdout.splitlines()
    told = {line["row"]: line for line in map(json.loads, lines)}
    assert list(told) == list(range(1, len(rows) + 1)), "in their order"
    names, losses = report["evaluation"]["labels"]["names"], report["evaluation"]["row_losses"]
    counted = [[0] * len(names) for _ in names]
    for number, _, _, loss in losses:
        expected, said = rows[number - 1]["label"], told[number]
        counted[names.index(expected)][names.index(said["label"])] += 1
        if said["label"] == expected:
            assert said["probability"] == pytest.approx(math.exp(-loss), abs=0.006)
    assert counted == report["evaluation"]["labels"]["tuned"]
    assert "Hint: loractl predict 1 FILE names the label of each row" in cli("generate", "triage", "a", code=2).stderr
    odd = cli("predict", "triage", folder / "unlabelled.csv", "--temperature", 1, code=2).stderr
    assert "--temperature is for answers, and triage is a classifier" in odd


def _spec(model: Path, **keys: Any) -> JobSpec:
    return JobSpec.model_validate(
        {"name": "t", "base_model": str(model), "task_type": "SEQ_CLS", "dataset": {"path": "a/b"}, **keys}
    )


def _base(model: Path, method: Method, seed: int = 0, dtype: str = "float32") -> Any:
    head = Head(labels=LABELS, pad=2, seed=seed)
    return load_base(str(model), method, "cpu", choose_precision("cpu", dtype), head=head)


def _tuned(model: Path, method: Method, seed: int = 0, dtype: str = "float32") -> Any:
    return add_adapter(_base(model, method, seed, dtype), _spec(model, method=method), method)
