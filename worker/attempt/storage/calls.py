"""A node's calls of the artifact store, and how they and their answers cross a pipe, as JSON."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from loractl.common.artifacts import ArtifactStore, Binding, Manifest, StoredFile
from loractl.common.errors import ArtifactError, NotStorable, ResultTaken, ServiceUnreachable

Arguments = list[Any]


def carry_out(store: ArtifactStore, name: str, arguments: Arguments) -> Any:
    """Do what the node asks; the answer is JSON. Raises what the store raises."""
    return _CALLS[name](store, *arguments)


def manifest_of(answer: dict[str, Any]) -> Manifest:
    """The manifest that put_result wrote, or of what pull copied."""
    return {name: StoredFile(**file) for name, file in answer.items()}


def as_answer(error: Exception) -> dict[str, Any]:
    """An error for the pipe."""
    if isinstance(error, ServiceUnreachable):
        return {"kind": "unreachable", "facts": list(error.facts)}
    if isinstance(error, ResultTaken):
        return {"kind": "taken", "facts": [error.sentence, error.hint]}
    if isinstance(error, NotStorable):
        return {"kind": "not storable", "facts": [error.sentence, error.hint]}
    if isinstance(error, ArtifactError):
        return {"kind": "artifact", "facts": [error.sentence, error.hint]}
    if isinstance(error, OSError):
        return {
            "kind": "os",
            "facts": [error.errno, error.strerror or str(error), error.filename and str(error.filename)],
        }
    return {"kind": "other", "facts": [repr(error)]}


def as_error(answer: dict[str, Any]) -> Exception:
    """The error in an answer."""
    kinds: dict[str, Callable[..., Exception]] = {
        "unreachable": ServiceUnreachable,
        "artifact": ArtifactError,
        "taken": ResultTaken,
        "not storable": NotStorable,
        "os": OSError,
    }
    return kinds.get(answer["kind"], RuntimeError)(*answer["facts"])


def _fetch_dataset(store: ArtifactStore, uri: str, sha256: str, folder: str) -> str:
    return str(store.fetch_dataset(uri, sha256, Path(folder)))


def _pull(store: ArtifactStore, stored: dict[str, Any], target: str, part: str) -> dict[str, Any]:
    return {name: vars(file) for name, file in store.pull(Binding(**stored), part, Path(target)).items()}


def _put_result(store: ArtifactStore, folder: str, prefix: str) -> dict[str, Any]:
    return {name: vars(file) for name, file in store.put_result(Path(folder), prefix).items()}


_CALLS: dict[str, Callable[..., Any]] = {
    "fetch_dataset": _fetch_dataset,
    "pull": _pull,
    "put_result": _put_result,
    "remove_checkpoint": ArtifactStore.remove_checkpoint,
    "remove_checkpoints": ArtifactStore.remove_checkpoints,
}
