"""What an evaluation is of: the model and the questions by their content, so that equal names are no proof."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ENDS = 1 << 20  # bytes read at either end of a file of weights that no manifest vouches for


def model_facts(model: str) -> dict[str, Any]:
    """The model of a command line, before it is loaded.

    Returns:
        model_fingerprint: the seal of a model directory's manifest, which covers every file and the base weights; of
        another folder a digest of its files, of large ones the size and both ends; of a name that is no folder, itself.
        template: of the prompts, as the manifest names it; None where the model brings its own.
    """
    from vlmpeft.manifest import MANIFEST, SEAL

    folder = Path(model.removeprefix("hf:"))
    if not folder.is_dir():
        return {"model_fingerprint": model, "template": None}
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return {"model_fingerprint": manifest[SEAL][:16], "template": manifest["template"]}
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
    ):  # not one of ours; if it should be, loading it says what is wrong
        return {"model_fingerprint": _digest_of(folder), "template": None}


def _digest_of(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(ENDS))
            if size > ENDS:
                file.seek(max(ENDS, size - ENDS))
                digest.update(file.read())
    return digest.hexdigest()[:16]


def digest(rows: Iterable[object]) -> str:
    """16 hex digits that rows of JSON values, in this order, have in common with no others."""
    found = hashlib.sha256()
    for row in rows:
        found.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return found.hexdigest()[:16]
