"""Complete model directories: written whole or not at all, verified before they are believed."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmpeft import fs
from vlmpeft.build import Bundle, assemble, choose_device, choose_dtype, enter_stage
from vlmpeft.config import load_recipe, to_yaml
from vlmpeft.errors import CheckpointError, ModelError
from vlmpeft.images import ImageTransform
from vlmpeft.weights import read_strict

FORMAT = 1
MANIFEST = "manifest.json"
PROJECTOR = "projector.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
PACKAGES = ("vlmpeft", "torch", "transformers", "timm", "accelerate", "safetensors", "tokenizers")


def versions() -> dict[str, str]:
    """Installed versions of what a run depends on."""
    found: dict[str, str] = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def save(bundle: Bundle, target: Path, extra: Callable[[Path], Mapping[str, Any]] | None = None) -> None:
    """Write a complete model directory at `target`: temporary name, fsync, manifest last, rename, verify.

    Args: extra: writes more files into the directory and returns entries for the manifest.
    Raises: CheckpointError K201 disk full; ModelError M504 if something trained would not be saved.
    """
    with fs.new_directory(target) as directory:
        entries = dict(extra(directory)) if extra else {}
        saved = bundle.tuned.save(directory)
        projector = dict(bundle.model.projector.named_parameters())
        fs.write_tensors(directory / PROJECTOR, bundle.model.projector.state_dict())
        saved |= {f"projector.{name}" for name in projector}
        lost = sorted(n for n, p in bundle.model.named_parameters() if p.requires_grad and n not in saved)
        if lost:
            raise ModelError("M504", f"{len(lost)} trained tensors would not be saved, first '{lost[0]}'.", "train them through a tuner.")
        fs.write_text(directory / "recipe.yaml", to_yaml(bundle.recipe))
        bundle.tokenizer.save_pretrained(directory / "tokenizer")
        fs.write_json(directory / "image_processor.json", dataclasses.asdict(bundle.image_transform))
        fs.write_json(directory / MANIFEST, {**_manifest(bundle), **entries, "files": _digests(directory)})
    verify(target)


def _manifest(bundle: Bundle) -> dict[str, Any]:
    stage = next(name for name, stage in bundle.recipe.stages.items() if stage is bundle.stage or stage == bundle.stage)
    return {
        "format": FORMAT,
        "base": {
            "vision": {"name": bundle.recipe.vision.name, "fingerprint": bundle.fingerprints["vision"]},
            "language": {"name": bundle.recipe.language.name, "fingerprint": bundle.fingerprints["language"]},
        },
        "stage": stage,
        "template": bundle.stage.template,
        "tuners": {name: {"kind": a.tuner.kind, "part": a.tuner.part} for name, a in bundle.tuned.applied.items()},
        "tuner_stage": {name: _stage_of(bundle, name) for name in bundle.tuned.applied},
        "trained": sorted(bundle.tuned.tuned_names()),
        "versions": versions(),
    }


def _stage_of(bundle: Bundle, name: str) -> str:
    """The last stage up to the current one whose recipe holds the tuner `name`."""
    found = ""
    for stage_name, stage in bundle.recipe.stages.items():
        if name in stage.tuners:
            found = stage_name
        if stage == bundle.stage:
            break
    return found


def _digests(directory: Path) -> dict[str, dict[str, Any]]:
    files = sorted(p for p in directory.rglob("*") if p.is_file())
    return {p.relative_to(directory).as_posix(): {"size": p.stat().st_size, "sha256": fs.sha256(p)} for p in files}


def verify(directory: Path) -> dict[str, Any]:
    """Check every file of a model directory against its manifest. Returns: the manifest.

    Raises: CheckpointError K202 with the file, and what was expected and found.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise CheckpointError("K202", f"{directory} is no complete model directory: {MANIFEST} is missing.", "name a `final` or `checkpoints/step-N` folder.")
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        files = manifest["files"].items()
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError("K202", f"{path} is damaged: {error}.", "use another checkpoint.") from error
    if manifest.get("format") != FORMAT:
        raise CheckpointError("K203", f"{path} has format {manifest.get('format')}, this version reads {FORMAT}.", "use the version of vlmpeft that wrote it.")
    for name, expected in files:
        file = directory / name
        size = file.stat().st_size if file.is_file() else None
        if size != expected["size"]:
            found = "is missing" if size is None else f"has {size} bytes"
            raise CheckpointError("K202", f"{file} {found}, expected {expected['size']} bytes.", "use another checkpoint.")
        if fs.sha256(file) != expected["sha256"]:
            raise CheckpointError("K202", f"{file} is damaged: its sha256 is not the manifest's.", "use another checkpoint.")
    return manifest


def restore(bundle: Bundle, directory: Path, manifest: Mapping[str, Any], allow_base_mismatch: bool = False) -> None:
    """Bring the tuned weights of a verified directory into a freshly assembled bundle.

    Raises: ModelError M501 for another base, M502, M503 for tensors that do not fit.
    """
    for part, base in manifest["base"].items():
        if bundle.fingerprints[part] != base["fingerprint"] and not allow_base_mismatch:
            raise ModelError(
                "M501",
                f"{directory} was trained on {part} '{base['name']}' ({base['fingerprint']}), but '{getattr(bundle.recipe, part).name}' here is {bundle.fingerprints[part]}.",
                "load it on the base it was trained on.",
            )
    tuners = {name: bundle.recipe.stages[stage].tuners[name] for name, stage in manifest["tuner_stage"].items()}
    bundle.tuned.apply(tuners)
    restore_weights(bundle, directory)


def restore_weights(bundle: Bundle, directory: Path) -> None:
    """Read the tuned weights and the projector of a directory into a bundle that has its tuners."""
    bundle.tuned.load(directory)
    state = bundle.model.projector.state_dict()
    if state:
        found = read_strict(directory / PROJECTOR, state)
        with torch.no_grad():
            for name, tensor in state.items():
                tensor.copy_(found[name])


def load(directory: str | Path, device: str = "auto", dtype: torch.dtype | None = None) -> Bundle:
    """A saved model, ready to be asked or trained on.

    Args:
        directory: `final/` or any `checkpoints/step-N/`.
        device: "auto" takes an accelerator if there is one.
        dtype: of the frozen weights; None chooses as training did.

    Raises: CheckpointError K202 for a damaged directory; ModelError M501 for a changed base.
    """
    directory = Path(directory)
    manifest = verify(directory)
    recipe = load_recipe(str(directory / "recipe.yaml"))
    where = choose_device(device)
    bundle = assemble(recipe, where, dtype or choose_dtype(recipe.run.precision, where), recipe.run.seed)
    restore(bundle, directory, manifest)
    enter_stage(bundle, recipe.stages[manifest["stage"]])
    bundle.image_transform = _transform(json.loads((directory / "image_processor.json").read_text(encoding="utf-8")))
    bundle.model.eval()
    return bundle


def _transform(values: Mapping[str, Any]) -> ImageTransform:
    return ImageTransform(values["size"], tuple(values["mean"]), tuple(values["std"]), values["mode"])


def save_optimizer(optimizer: torch.optim.Optimizer, directory: Path) -> None:
    """Optimizer state as safetensors, keyed by parameter name: no pickle."""
    tensors: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["parameter_names"], group["params"], strict=True):
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{name}|{key}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    fs.write_tensors(directory / OPTIMIZER, tensors)


def load_optimizer(optimizer: torch.optim.Optimizer, directory: Path) -> None:
    """The inverse of `save_optimizer`. Raises: CheckpointError K204 if the state is of other parameters."""
    from safetensors.torch import load_file

    found = load_file(directory / OPTIMIZER)
    names = {n: p for g in optimizer.param_groups for n, p in zip(g["parameter_names"], g["params"], strict=True)}
    for key, tensor in found.items():
        name, _, entry = key.rpartition("|")
        if name not in names:
            raise CheckpointError("K204", f"{directory / OPTIMIZER} holds state of '{name}', which does not train here.", "resume with the recipe of the run.")
        parameter = names[name]
        optimizer.state[parameter][entry] = tensor if entry == "step" else tensor.to(parameter.device)


@dataclasses.dataclass(frozen=True)
class Position:
    """Where a run stands. stage: index of the stage; step: its optimizer steps done; total: those of all stages together."""

    stage: int = 0
    step: int = 0
    total: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    bad_evals: int = 0


def save_checkpoint(bundle: Bundle, run_dir: Path, position: Position, optimizer: torch.optim.Optimizer | None, keep: int, facts: Mapping[str, Any]) -> Path:
    """Write `checkpoints/step-N`, then drop the oldest beyond `keep` (the best is never dropped)."""
    folder = run_dir / "checkpoints"
    target = folder / f"step-{position.total}"

    def extra(directory: Path) -> dict[str, Any]:
        if optimizer is not None:
            save_optimizer(optimizer, directory)
        fs.write_json(directory / STATE, dataclasses.asdict(position))
        return {"facts": dict(facts)}

    save(bundle, target, extra)
    kept = checkpoints(run_dir)
    best = f"step-{position.best_step}" if position.best_step is not None else ""
    for old in [p for p in kept[:-keep] if p.name != best]:
        fs.remove(old)
    return target


def checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoint folders by step, oldest first, whether or not they verify."""
    found = [p for p in (run_dir / "checkpoints").glob("step-*") if p.name.removeprefix("step-").isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def newest_valid(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files verify, and why newer ones were passed over."""
    rejected: list[str] = []
    for path in reversed(checkpoints(run_dir)):
        try:
            verify(path)
            return path, rejected
        except CheckpointError as error:
            rejected.append(error.line())
    return None, rejected


def position_of(directory: Path) -> Position:
    """The position a checkpoint was written at."""
    return Position(**json.loads((directory / STATE).read_text(encoding="utf-8")))


def start_from(bundle: Bundle, directory: Path) -> None:
    """Take the projector of another run's model directory, as stage 2 starts from stage 1.

    Raises: ModelError M533 if that run tuned more than the projector: this run would not carry it; M502 for another shape.
    """
    manifest = verify(directory)
    more = [name for name in manifest["trained"] if not name.startswith("projector.")]
    if more:
        raise ModelError("M533", f"init={directory} also tuned '{more[0]}' ({len(more)} tensors), which this run cannot start from.", "export a merged base first.")
    state = bundle.model.projector.state_dict()
    found = read_strict(directory / PROJECTOR, state)
    with torch.no_grad():
        for name, tensor in state.items():
            tensor.copy_(found[name])
