"""The manifest of a model directory: what it is, what it was trained on, and a digest of every file and of itself."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vlmpeft import fs
from vlmpeft.errors import CheckpointError

FORMAT = 1
MANIFEST = "manifest.json"
SEAL = "seal"  # sha256 of the manifest's other entries
PACKAGES = ("vlmpeft", "torch", "transformers", "timm", "accelerate", "safetensors", "tokenizers")
ELSE = "use another checkpoint."


@functools.cache
def versions() -> Mapping[str, str]:
    """Installed versions of what a run depends on; looked up once, as it takes longer than writing them."""
    found: dict[str, str] = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return MappingProxyType(found)


def write_manifest(directory: Path, entries: Mapping[str, Any]) -> None:
    """Write `manifest.json` over the files of `directory`: the last file of a model directory."""
    files = sorted(p for p in directory.rglob("*") if p.is_file() and p != directory / MANIFEST)
    digests = {p.relative_to(directory).as_posix(): {"size": p.stat().st_size, "sha256": fs.sha256(p)} for p in files}
    values = {"format": FORMAT, "versions": dict(versions()), **entries, "files": digests}
    fs.write_json(directory / MANIFEST, {**values, SEAL: _seal(values)})


def _seal(values: Mapping[str, Any]) -> str:
    plain = {k: v for k, v in values.items() if k != SEAL}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def verify(directory: Path) -> dict[str, Any]:
    """Check a model directory, every file, against its manifest. Returns: the manifest.

    Raises: CheckpointError K202 with the file, and what was expected and found; K203 for another format.
    """
    path = directory / MANIFEST
    if not path.is_file():
        message = f"{directory} is no complete model directory: {_lack(directory)}."
        raise CheckpointError("K202", message, _meant(directory))
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        whole = manifest[SEAL] == _seal(manifest)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError("K202", f"{path} is damaged: {error or type(error).__name__}.", ELSE) from error
    if not whole:
        raise CheckpointError("K202", f"{path} is damaged: its sha256 is not the one it holds.", ELSE)
    if manifest.get("format") != FORMAT:
        message = f"{path} has format {manifest.get('format')}, this version reads {FORMAT}."
        raise CheckpointError("K203", message, "use the version of vlmpeft that wrote it.")
    for name, expected in manifest["files"].items():
        _check(directory / name, expected)
    return manifest


def _lack(directory: Path) -> str:
    if directory.is_dir():
        return f"{MANIFEST} is missing"
    return "it is a file" if directory.exists() else "there is no such folder"


def _meant(directory: Path) -> str:
    """The remedy for a folder without a manifest: the model in it, what transformers loads, or what a model is."""
    if (directory / "final" / MANIFEST).is_file():
        return f"did you mean {directory / 'final'}?"
    if (directory / "config.json").is_file():
        return f"a model of transformers is asked as hf:{directory} by `generate` and the evaluations."
    return "name a `final` or `checkpoints/step-N` folder."


def _check(file: Path, expected: Mapping[str, Any]) -> None:
    size = file.stat().st_size if file.is_file() else None
    if size != expected["size"]:
        found = "is missing" if size is None else f"has {size} bytes"
        raise CheckpointError("K202", f"{file} {found}, expected {expected['size']} bytes.", ELSE)
    if fs.sha256(file) != expected["sha256"]:
        raise CheckpointError("K202", f"{file} is damaged: its sha256 is not the manifest's.", ELSE)
