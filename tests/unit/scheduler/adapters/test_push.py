"""loractl adapters push: what a hub gets, what it never gets, and what is said where it refuses."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from huggingface_hub import constants

from loractl.common.artifacts import WEIGHTS, ArtifactStore, attempt_prefix, manifest_sha256
from loractl.common.errors import ExitCode, LoractlError
from loractl.common.job.status import Reason
from loractl.common.job.sweep import NewSweep
from loractl.common.settings import Settings, load_settings
from loractl.common.store.database import connect
from loractl.common.store.records import HELD_OUT_LOSS, Claim, Progress, Submission
from loractl.common.store.store import Store
from loractl.scheduler.adapters import hub, push
from loractl.scheduler.change.amendment import amendment
from loractl.scheduler.cli.main import cli
from loractl.scheduler.submit.ancestor import settle_predecessors

from .... import json_page
from ....acceptance.test_report_page import report as page_report
from ....hub_writes import TOKEN, WritableHub
from ....models import weights_of
from ....services import free_port
from ...factories import RESULT, spec, submission, take

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of huggingface_hub's upload

USER, HOST = "zoltan", "heron17"

JOB = "patients-of-ward-3"

CONFIG = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}

PUSH = "adapters push 1 lab/support"


@dataclass(frozen=True, kw_only=True)
class Lab:
    """A lab whose first job has succeeded, and a hub of its own."""

    settings: Settings
    store: Store
    folder: Path
    hub: WritableHub
    url: str

    @property
    def base(self) -> Path:
        return self.folder / "models" / "Base-1B"

    def ask(self, line: str) -> Result:
        return CliRunner().invoke(cli, line.split())

    def refused(self, line: str) -> LoractlError:
        done = self.ask(line)
        assert isinstance(done.exception, LoractlError), (done.output, done.exception)
        error = done.exception
        assert error.hint and TOKEN not in f"{done.output}{error.sentence}{error.hint}"
        assert "\n" not in error.sentence
        return error

    def finish(self, told: dict[str, Any] | None = None, tokenizer: str | None = None, **keys: Any) -> None:
        """Another job that succeeds. `tokenizer`: the text of tokenizer_config.json."""
        self.store.jobs.submit(self.job(**keys))
        self.end_well(told, tokenizer)

    def job(self, **keys: Any) -> Submission:
        wanted = spec(**{"name": JOB, "base_model": str(self.base), **keys})
        return replace(submission(user=USER), spec=wanted)

    def end_well(self, told: dict[str, Any] | None = None, tokenizer: str | None = None) -> None:
        """Let the job that waits succeed."""
        claim = take(self.store)
        assert isinstance(claim, Claim)
        job_id = claim.job_id
        result = self.folder / f"result-{job_id}"
        adapter = result / "adapter"
        adapter.mkdir(parents=True)
        texts = {
            "adapter_config.json": json.dumps({**CONFIG, "base_model_name_or_path": self.base.name}),
            "tokenizer_config.json": tokenizer or json.dumps({"name_or_path": str(self.base), "eos_token": "/"}),
            "chat_template.jinja": "{{ messages }}",
            "lineage.json": json.dumps({"init_from": {"name": JOB, "job_id": 3}}),
            "README.md": f"# {JOB} by {USER}",
        }
        for name, text in texts.items():
            (adapter / name).write_text(text)
        (adapter / "adapter_model.safetensors").write_bytes(weights_of(f"job {job_id}"))
        (result / "report.json").write_text(json.dumps(told or report(self.base)))
        manifest = ArtifactStore(self.settings.artifacts_url).put_result(result, attempt_prefix(job_id, 1))
        stored = replace(RESULT, manifest_sha256=manifest_sha256(manifest), adapter_sha256=manifest[WEIGHTS].sha256)
        measured = Progress(metrics=((1, HELD_OUT_LOSS, 0.5),))
        self.store.attempts.finish(claim, Reason.OK, "done", measured, stored)


def report(base_model: object, **changed: Any) -> dict[str, Any]:
    """One with the lab's names wherever a report has them."""
    value = page_report()
    value["job"] |= {"name": JOB, "user": USER, "node": f"{HOST}:0", "device_name": "CPU"}
    value |= {"base_model": str(base_model), "versions": {"loractl": "0.4.0", "torch": "2.13"}}
    value["data"] |= {"sources": [f"8 rows of /home/{USER}/rows.jsonl"]}
    value["adapter"] |= {"init_from": {"name": JOB, "job_id": 3, "sha256": "9" * 64}}
    return {**value, **changed}


@pytest.fixture
def lab(upgraded_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    hub = WritableHub(tmp_path / "hub")
    with hub.serving() as url:
        for name, value in {"LORACTL_HOME": upgraded_home, "LORACTL_USER": USER, "LORACTL_HOST": HOST}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        known = {
            "ENDPOINT": url,
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_TOKEN_PATH": str(tmp_path / "token"),
        }
        for name, told in known.items():  # the library reads the environment once
            monkeypatch.setattr(constants, name, told)
        settings = load_settings()
        lab = Lab(settings=settings, store=Store(connect(settings)), folder=tmp_path, hub=hub, url=url)
        lab.base.mkdir(parents=True)
        lab.finish()
        yield lab
        lab.store.engine.dispose()


def front_matter(files: dict[str, bytes]) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(files["README.md"].decode().split("---\n")[1])
    return content


def test_a_hub_gets_one_commit_with_all_files_and_nothing_of_the_lab(lab: Lab) -> None:
    lab.hub.commit("models", "org/base-1b", {"README.md": "---\nlicense: other\nlicense_name: llama\n---\n"})
    done = lab.ask(f"{PUSH} --base-name org/base-1b")
    commit, _ = lab.hub.find("models", "lab/support", "main")
    assert done.exit_code == 0, (done.output, done.exception)
    assert done.stdout.startswith("The adapter of job 1 (5 files, ") and done.stdout.endswith(
        f"is pushed: lab/support (private) has it, as commit {commit[:12]}: {lab.url}/lab/support/commit/{commit}\n"
    )
    files = lab.hub.files("lab/support")
    assert files.keys() == {
        ".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja",
        "tokenizer_config.json",
    }  # fmt: skip
    assert len(lab.hub.messages) == 1 and lab.hub.is_private("lab/support")
    assert files["adapter_model.safetensors"] == weights_of("job 1")
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "org/base-1b"
    assert json.loads(files["tokenizer_config.json"]) == {"eos_token": "/"}
    assert front_matter(files) == {
        "base_model": "org/base-1b",
        "base_model_relation": "adapter",
        "datasets": ["org/data"],
        "library_name": "peft",
        "license": "other",
        "license_name": "llama",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "loractl"],
    }
    everything = "".join(content.decode("utf-8", "replace") for content in files.values()) + lab.hub.messages[0]
    for told in (USER, HOST, str(lab.settings.home), str(lab.folder), JOB, TOKEN, "rows.jsonl", lab.url):
        assert told not in everything, told


def test_the_card_says_what_the_report_s_page_says(lab: Lab) -> None:
    lab.ask(PUSH)
    card = lab.hub.files("lab/support")["README.md"].decode()
    assert "**Better than the base: held-out loss 3.50 -> 1.25.**" in card
    assert "| loss, nats | 3.50 | 1.25 | −2.25 | −2.60 to −1.90 | better |\n" in card
    assert f"- 20 rows to train on, 8 held out (messages)\n- sha256 `{'e' * 64}`\n" in card
    assert "| r | 4 |\n| lora_alpha | 8 |" in card and "| learning_rate | 0.001 |" in card
    assert f"another adapter, sha256 {'9' * 64}" in card and f"sha256 `{'f' * 64}`" in card


def test_a_base_that_is_a_folder_has_no_name_until_a_person_says_it(lab: Lab) -> None:
    done = lab.ask(PUSH)
    assert done.stderr == "Note: the base is a folder; the card can't name it on the hub without --base-name.\n"
    files = lab.hub.files("lab/support")
    assert "base_model" not in front_matter(files) and "license" not in front_matter(files)
    card = files["README.md"].decode()
    assert "`Base-1B`, a folder whose name on the hub is not known," in card
    assert "Unknown: the license of `Base-1B` is not known here." in card
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "Base-1B"


@pytest.mark.parametrize(
    ("file", "text", "told"),
    [
        ("README.md", "---\nlicense: apache-2.0\n---\n# Base", {"license": "apache-2.0"}),
        ("config.json", '{"license": "mit"}', {"license": "mit"}),
        ("README.md", "---\nlicense: [mit]\n---", {"license": "mit"}),
        ("README.md", "---\nlicense: [mit, gpl]\n---", {}),
        ("README.md", "# license: mit", {}),
        ("README.md", "---\n{", {}),
        (
            "README.md",
            "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n",
            {"license": "other", "license_name": "own"},
        ),
    ],
)
def test_a_license_is_read_from_the_base_s_folder_and_never_guessed(
    lab: Lab, file: str, text: str, told: dict[str, str]
) -> None:
    (lab.base / file).write_text(text)
    lab.ask(PUSH)
    content = front_matter(lab.hub.files("lab/support"))
    assert {key: value for key, value in content.items() if key.startswith("license")} == told


def test_a_base_and_data_of_the_hub_are_named(lab: Lab) -> None:
    lab.hub.commit("models", "org/base", {"README.md": "---\nlicense: mit\n---\n"}, branch="v1")
    lab.finish(report("org/base", base={"commit": None}), base_model="org/base", revision="v1")
    assert lab.refused("adapters push 2 lab/other --base-name org/x").exit_code == ExitCode.USAGE
    assert lab.ask("adapters push 2 lab/other").stderr == ""
    content = front_matter(lab.hub.files("lab/other"))
    assert (content["base_model"], content["license"], content["datasets"]) == ("org/base", "mit", ["org/data"])


def test_a_second_push_is_a_commit_on_top_and_the_same_again_is_none(lab: Lab) -> None:
    first = lab.hub.commit("models", "lab/support", {"notes.txt": "of a person"})
    lab.hub.private.add("lab/support")
    assert "has it, as commit" in lab.ask(PUSH).stdout
    second, _ = lab.hub.find("models", "lab/support", "main")
    assert second != first and lab.hub.files("lab/support")["notes.txt"] == b"of a person"
    assert f"already has it, in commit {second[:12]}" in lab.ask(PUSH).stdout
    assert lab.hub.find("models", "lab/support", "main")[0] == second


def test_a_script_gets_the_commit_and_the_files_as_json(lab: Lab) -> None:
    pushed, again, looked = (
        json.loads(lab.ask(f"{PUSH} --json{more}").stdout) for more in ("", "", f" --to {lab.folder / 'look'}")
    )
    json_page.hold({"adapters push": [pushed, again, looked]})
    commit, _ = lab.hub.find("models", "lab/support", "main")
    assert (pushed["commit"], pushed["already_there"], pushed["private"]) == (commit, False, True)
    assert pushed["files"] == {n: len(c) for n, c in lab.hub.files("lab/support").items() if n != ".gitattributes"}
    assert again == {**pushed, "already_there": True}
    assert looked["files"] == pushed["files"] and looked["commit"] is looked["url"] is None


def test_a_public_repository_needs_a_word_and_a_private_one_stays_private(lab: Lab) -> None:
    before = lab.hub.commit("models", "lab/support", {"a.txt": "a"})
    error = lab.refused(PUSH)
    assert error.exit_code == ExitCode.USAGE and "lab/support is public" in error.sentence
    assert lab.hub.find("models", "lab/support", "main")[0] == before
    assert "lab/support (public) has it" in lab.ask(f"{PUSH} --public").stdout
    assert lab.ask("adapters push 1 lab/hidden").exit_code == 0
    told = lab.ask("adapters push 1 lab/hidden --public")
    assert "Note: lab/hidden stays private" in told.stderr and "lab/hidden (private)" in told.stdout
    assert lab.ask("adapters push 1 lab/open --public").exit_code == 0
    assert not lab.hub.is_private("lab/open") and lab.hub.is_private("lab/hidden")


def test_what_must_stay_in_the_lab_is_refused_before_the_hub_is_asked(lab: Lab) -> None:
    lab.finish(publish=False)
    lab.finish(report(lab.base, base={"commit": None, "publish": False}))
    lab.finish(lora={"init_from": "2"})  # submitted before job 2 was edited
    stays = {
        2: "its job says publish: false",
        3: "an adapter that must stay is merged into its base",
        4: "it was begun from that of job 2, whose job says publish: false",
    }
    for job, why in stays.items():
        for more in ("", f" --to {lab.folder / 'look'}"):
            error = lab.refused(f"adapters push {job} lab/support{more}")
            assert error.sentence == f"the adapter of job {job} must stay in the lab: {why}"
            assert error.exit_code == ExitCode.FAILED
    assert lab.hub.requests == [] and not (lab.folder / "look").exists()


def test_what_began_from_a_sweep_s_member_that_must_stay_is_refused(lab: Lab) -> None:
    new = NewSweep(name="tuned", varied={"lora.r": "4"})
    sweep_id = lab.store.sweeps.submit(new, [lab.job()])
    begun = lab.job(lora={"init_from": {"sweep": sweep_id}})
    last = lab.store.jobs.submit(replace(begun, spec=settle_predecessors(begun.spec, lab.store)))
    lab.store.jobs.edit(amendment(lab.store, 2, ["publish=false"]), USER)
    lab.end_well()
    lab.end_well()
    error = lab.refused(f"adapters push {last} lab/support")
    assert error.sentence.endswith("it was begun from that of job 2, whose job says publish: false")


def test_a_push_that_ends_before_it_reads_the_final_rows_is_no_look_at_them(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: Any) -> None:
        raise LoractlError("the hub is away", "try again")

    looks: list[str] = []
    monkeypatch.setattr(hub, "base_license", away)
    monkeypatch.setattr(push, "report", lambda *_: looks.append("look"))
    assert lab.refused(f"{PUSH} --base-name org/base").sentence == "the hub is away"
    assert not looks


def test_what_would_be_pushed_can_be_looked_at_without_a_token_or_a_hub(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.ask(f"{PUSH} --base-name org/base")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    done = lab.ask(f"{PUSH} --base-name org/base --to {lab.folder / 'look'}")
    assert done.exit_code == 0 and "What would be pushed of the adapter of job 1 (5 files, " in done.stdout
    assert "Note: the base's license is not known: HF_HUB_OFFLINE keeps this machine from the hub." in done.stderr
    pushed = lab.hub.files("lab/support")
    assert {path.name: path.read_bytes() for path in (lab.folder / "look").iterdir()} == {
        name: content for name, content in pushed.items() if name != ".gitattributes"
    }
    again = lab.refused(f"{PUSH} --to {lab.folder / 'look'}")
    assert "is not empty" in again.sentence and again.exit_code == ExitCode.USAGE


REFUSALS = [
    ("/api/whoami-v2", 401, ExitCode.FAILED, "the hub does not know the token"),
    ("/api/whoami-v2", 429, ExitCode.UNREACHABLE, "the hub is unreachable at {url}: too many requests"),
    ("/api/whoami-v2", 502, ExitCode.UNREACHABLE, "the hub is unreachable at {url}: status 502"),
    ("/api/repos/create", 403, ExitCode.FAILED, "the token may not write to lab/support"),
    ("/api/repos/create", 409, ExitCode.FAILED, "lab/support was made or changed meanwhile, or is hidden"),
    ("/preupload/main", 403, ExitCode.FAILED, "the token may not write to lab/support; the repository was made"),
    ("/objects/batch", 403, ExitCode.FAILED, "the token may not write to lab/support; the repository was made"),
    ("/lfs/verify", 400, ExitCode.FAILED, "the hub refuses the push to lab/support (status 400): Refused ***"),
    (
        "/commit/main",
        404,
        ExitCode.FAILED,
        "the hub has no lab/support, or hides it from this token; the repository was",
    ),
    ("/commit/main", 409, ExitCode.FAILED, "lab/support was made or changed meanwhile"),
    ("/commit/main", 412, ExitCode.FAILED, "lab/support was made or changed meanwhile"),
    ("/commit/main", 413, ExitCode.FAILED, "the hub refuses the push to lab/support (status 413): Refused ***"),
    (
        "/commit/main",
        429,
        ExitCode.UNREACHABLE,
        "the hub is unreachable at {url}: too many requests; the repository was",
    ),
]


@pytest.mark.parametrize(("where", "status", "code", "said"), REFUSALS)
def test_a_refusal_is_a_sentence_without_the_token_and_nothing_is_half_pushed(
    lab: Lab, where: str, status: int, code: ExitCode, said: str
) -> None:
    lab.hub.refuses = {where: HTTPStatus(status)}
    error = lab.refused(PUSH)
    assert error.sentence.startswith(said.format(url=lab.url)), error.sentence
    assert error.exit_code == code and lab.hub.messages == []


def test_a_commit_that_can_t_be_looked_at_is_named_and_the_same_push_makes_no_second_one(lab: Lab) -> None:
    lab.hub.refuses = {"/paths-info/": HTTPStatus.FORBIDDEN}
    said = lab.refused(PUSH).sentence
    commit, _ = lab.hub.find("models", "lab/support", "main")
    assert said.endswith(f"; commit {commit[:12]} was made, and not looked at")
    lab.hub.refuses = {}
    assert f"already has it, in commit {commit[:12]}" in lab.ask(PUSH).stdout and len(lab.hub.messages) == 1


def test_a_token_that_is_wrong_or_not_there_and_a_hub_that_is_away_are_told(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert lab.refused(PUSH).sentence == "the hub does not know the token"
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    theirs = lab.refused("adapters push 1 others/support")
    assert theirs.sentence == "the token may not write to others/support"
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free_port()}")
    away = lab.refused(PUSH)
    assert away.exit_code == ExitCode.UNREACHABLE and "the hub is unreachable at http://127.0.0.1:" in away.sentence
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE keeps this machine" in lab.refused(PUSH).sentence
    monkeypatch.delenv("HF_TOKEN")
    assert lab.refused(PUSH).sentence == "this machine has no token for the hub"
    assert not (lab.hub.folder / "models").exists()


def test_a_client_without_the_library_is_told_which_extra_has_it(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert lab.refused(PUSH).hint == "pip install 'loractl[hub]'"
    done = lab.ask(f"{PUSH} --base-name org/base --to {lab.folder / 'look'}")
    assert done.exit_code == 0 and "loractl adapters push needs huggingface_hub" in done.stderr


@pytest.mark.parametrize("name", ["support", "lab/", "/lab/support", "../lab", "a/b/c", "lab/sup port"])
def test_a_name_that_no_repository_has_is_a_usage_error(lab: Lab, name: str) -> None:
    done = CliRunner().invoke(cli, ["adapters", "push", "1", name])
    assert isinstance(done.exception, LoractlError) and done.exception.exit_code == ExitCode.USAGE
    assert "is not of the form OWNER/NAME" in done.exception.sentence and lab.hub.requests == []


def test_a_file_that_the_repository_ignores_is_missed(lab: Lab) -> None:
    lab.hub.ignored = {"adapter_model.safetensors"}
    assert re.match(r"lab/support did not take adapter_model.safetensors in commit \w{12}$", lab.refused(PUSH).sentence)


def test_an_adapter_that_somebody_has_replaced_is_not_pushed(lab: Lab) -> None:
    [weights] = lab.settings.home.rglob("adapter_model.safetensors")
    weights.write_bytes(weights_of("another"))
    assert "does not match its manifest" in str(lab.ask(PUSH).exception)
    assert not (lab.hub.folder / "models").exists()


@pytest.mark.parametrize("tokenizer", ["[]", "no JSON", "[" * 100_000])
def test_a_tokenizer_s_settings_that_are_none_are_refused(lab: Lab, tokenizer: str) -> None:
    lab.finish(tokenizer=tokenizer)
    said = lab.refused("adapters push 2 lab/support").sentence
    assert said == "the adapter's tokenizer_config.json is not a JSON object"


def test_a_hub_without_xet_storage_is_told_where_xet_is_on(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    error = lab.refused(PUSH)
    assert "need HF_HUB_DISABLE_XET=1" in str(error.hint) and lab.hub.messages == []
