"""The versions of the packages that decide a training's arithmetic and its tokens."""

from __future__ import annotations

import functools
import importlib.metadata
import platform

from loractl import __version__

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "tokenizers")


@functools.cache
def installed_versions() -> dict[str, str]:
    """Package -> version, from the packages' metadata: nothing is imported."""
    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"loractl": __version__, "python": platform.python_version(), **packages}
