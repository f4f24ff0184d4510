"""Frozen vision encoders behind one protocol. Letters: i images, n tokens, d width, h w pixels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from einops import rearrange
from torch import Tensor, nn

from vlmpeft import fs
from vlmpeft.errors import ModelError, nearest
from vlmpeft.sources import resolve, unreachable

RANDOM = "random"  # vision.weights=random: untrained weights, for smoke tests


class VisionEncoder(Protocol):
    """(i, 3, h, w) -> (i, n, d). What the rest of the library reads from an encoder.

    width: d. grid: rows and columns of tokens; rows * columns == n. prefix_tokens: tokens before the grid (CLS, registers)
    that the model declares and `forward` drops. mean, std: per channel. image_size: side in pixels.
    """

    width: int
    grid: tuple[int, int]
    prefix_tokens: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    image_size: int

    def __call__(self, pixel_values: Tensor) -> Tensor: ...


class Encoder(nn.Module):
    """What the encoders share: eval mode while frozen, no graph while frozen, one probe that settles grid and width.

    Args:
        backbone: the pretrained network.
        prefix_tokens: tokens before the grid, as the backbone declares them.
    """

    def __init__(
        self, backbone: nn.Module, prefix_tokens: int, mean: tuple[float, float, float], std: tuple[float, float, float], image_size: int
    ) -> None:
        super().__init__()
        self.backbone, self.prefix_tokens = backbone, prefix_tokens
        self.mean, self.std, self.image_size = mean, std, image_size
        self.grid, self.width = (0, 0), 0

    def features(self, pixel_values: Tensor) -> Tensor:
        """(i, 3, h, w) -> (i, d, rows, columns) or (i, prefix + n, d), as the backbone gives it."""
        raise NotImplementedError

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(i, 3, h, w) -> (i, n, d) without prefix tokens, in the backbone's dtype."""
        tuned = any(p.requires_grad for p in self.backbone.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and tuned):
            features = self.features(pixel_values.to(next(self.backbone.parameters()).dtype))
            if features.ndim == 4:
                return rearrange(features, "i d r c -> i (r c) d")
            return features[:, self.prefix_tokens :]

    def train(self, mode: bool = True) -> Encoder:
        """Stay in eval mode while frozen: batch statistics and dropout of a frozen encoder must not move."""
        tuned = any(p.requires_grad for p in self.backbone.parameters())
        super().train(mode and tuned)
        return self

    def probe(self, grid: tuple[int, int] | None) -> None:
        """Run one blank image and settle `grid` and `width`.

        Args: grid: what the model declares; None takes a square.
        Raises: ModelError M512 if the tokens do not fill the grid.
        """
        device = next(self.backbone.parameters()).device
        with torch.no_grad():
            raw = self.features(torch.zeros(1, 3, self.image_size, self.image_size, device=device))
        if raw.ndim == 4:
            self.grid, self.width = (raw.shape[2], raw.shape[3]), raw.shape[1]
            return
        tokens, self.width = raw.shape[1] - self.prefix_tokens, raw.shape[2]
        side = int(tokens**0.5)
        self.grid = grid or (side, side)
        if self.grid[0] * self.grid[1] != tokens:
            raise ModelError(
                "M512",
                f"the encoder gives {raw.shape[1]} tokens with {self.prefix_tokens} declared before the grid; {self.grid[0]}x{self.grid[1]} expected.",
                "check vision.image_size and the model's declared prefix tokens.",
            )

    @property
    def num_tokens(self) -> int:
        """n: tokens of one image."""
        return self.grid[0] * self.grid[1]


class TimmEncoder(Encoder):
    """A timm model: its last feature map, or the output of a transformer block.

    Args:
        layer: -1 for the model's final features (after its final norm); -2, -3, ... for the output of an earlier block
            without the final norm, as LLaVA takes CLIP's `hidden_states[-2]`.
    """

    def __init__(
        self, backbone: Any, layer: int, mean: tuple[float, float, float], std: tuple[float, float, float], image_size: int
    ) -> None:
        super().__init__(backbone, int(getattr(backbone, "num_prefix_tokens", 0)), mean, std, image_size)
        self.layer = layer
        embed = getattr(backbone, "patch_embed", None)
        self.probe(getattr(embed, "grid_size", None) if layer == -1 else None)

    def features(self, pixel_values: Tensor) -> Tensor:
        """See `Encoder.features`."""
        if self.layer == -1:
            return self.backbone.forward_features(pixel_values)
        selected: list[Tensor] = self.backbone.forward_intermediates(
            pixel_values, indices=[self.layer], norm=False, stop_early=True, output_fmt="NCHW", intermediates_only=True
        )
        return selected[0]


class TransformersEncoder(Encoder):
    """A Hugging Face vision transformer (CLIP, SigLIP, DINOv2): `hidden_states[layer]`, as LLaVA selects.

    Args:
        layer: index into the hidden states: -2 is the input of the last block, without the final norm.
    """

    def __init__(
        self, backbone: Any, layer: int, mean: tuple[float, float, float], std: tuple[float, float, float], image_size: int
    ) -> None:
        super().__init__(backbone, _declared_prefix(backbone), mean, std, image_size)
        self.layer = layer
        side = image_size // backbone.config.patch_size
        self.probe((side, side))

    def features(self, pixel_values: Tensor) -> Tensor:
        """See `Encoder.features`."""
        hidden: tuple[Tensor, ...] = self.backbone(pixel_values=pixel_values, output_hidden_states=True).hidden_states
        return hidden[self.layer]


def _declared_prefix(backbone: Any) -> int:
    """Tokens before the patches: a class embedding or CLS token if the model has one, and its registers."""
    names = {name.rsplit(".", 1)[-1] for name, _ in backbone.named_parameters()}
    registers = int(getattr(backbone.config, "num_register_tokens", 0)) if "register_tokens" in names else 0
    return int("class_embedding" in names or "cls_token" in names) + registers


def load_vision(
    name: str,
    *,
    layer: int = -1,
    weights: str | None = None,
    weights_by: Literal["name", "order"] = "name",
    image_size: int | None = None,
    mean: tuple[float, float, float] | None = None,
    std: tuple[float, float, float] | None = None,
) -> Encoder:
    """Build a frozen encoder from `timm:NAME` or `hf:NAME_OR_DIR`.

    Args:
        weights: None takes the pretrained ones of the name, "random" none at all, else a file (`package:` allowed).
        weights_by: match tensors by "name", or by "order" with every shape checked.
        image_size, mean, std: override what the model declares.

    Raises: ModelError M541 for an unknown source, M542 for weights that do not fit; EnvironmentFault E420 if not to be had.
    """
    source, _, rest = name.partition(":")
    if source == "timm":
        encoder = _timm(rest, layer, weights, weights_by, image_size, mean, std)
    elif source == "hf":
        encoder = _transformers(rest, layer, image_size, mean, std)
    else:
        raise ModelError("M541", f"vision.name '{name}' names no source.", "write timm:NAME or hf:NAME_OR_DIR.")
    return encoder.requires_grad_(False).eval()


def _timm(name: str, layer: int, weights: str | None, by: str, image_size: int | None, mean: Any, std: Any) -> Encoder:
    import timm
    from timm.data import resolve_model_data_config

    options: dict[str, Any] = {"img_size": image_size} if image_size else {}
    if not timm.is_model(name.split(".")[0]):
        raise ModelError("M543", f"timm has no model '{name}'{nearest(name, timm.list_models(f'{name[:3]}*'))[:300]}")
    try:
        backbone = timm.create_model(name, pretrained=weights is None, **options)
    except (OSError, RuntimeError) as error:
        raise unreachable(f"timm:{name}", error) from error
    if weights not in (None, RANDOM):
        _load_weights(backbone, Path(resolve(str(weights))), by)
    if hasattr(backbone, "reset_classifier"):
        backbone.reset_classifier(0)
    data = resolve_model_data_config(backbone)
    return TimmEncoder(backbone, layer, tuple(mean or data["mean"]), tuple(std or data["std"]), image_size or data["input_size"][-1])


def _transformers(name: str, layer: int, image_size: int | None, mean: Any, std: Any) -> Encoder:
    from transformers import AutoModel
    from transformers.image_processing_base import ImageProcessingMixin

    name = resolve(name)
    try:
        model = AutoModel.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise unreachable(f"hf:{name}", error) from error
    backbone = getattr(model, "vision_model", model)
    try:
        processor, _ = ImageProcessingMixin.get_image_processor_dict(name)
    except OSError:
        processor = {}
    mean, std = mean or processor.get("image_mean"), std or processor.get("image_std")
    if mean is None or std is None:
        raise ModelError("M544", f"hf:{name} has no preprocessor_config.json, so its pixel mean and std are unknown.", "set vision.mean=[r,g,b] and vision.std=[r,g,b].")
    return TransformersEncoder(backbone, layer, tuple(mean), tuple(std), image_size or backbone.config.image_size)


def _load_weights(model: nn.Module, path: Path, by: str) -> None:
    """Load a weights file into `model`, all of it. Raises: ModelError M542 naming the first tensor that does not fit."""
    found = _read_weights(path)
    expected = model.state_dict()
    if by == "order":
        if len(found) != len(expected):
            raise ModelError("M542", f"{path.name} holds {len(found)} tensors, the model {len(expected)}.", "set vision.weights_by=name.")
        found = dict(zip(expected, found.values(), strict=True))
    wrong = sorted(found.keys() ^ expected.keys()) + [k for k in found.keys() & expected.keys() if found[k].shape != expected[k].shape]
    if wrong:
        raise ModelError("M542", f"{path.name} does not fit the model: {len(wrong)} tensors differ, first '{wrong[0]}'.", "check vision.name and vision.weights.")
    model.load_state_dict(found, strict=True)


def _read_weights(path: Path) -> Mapping[str, Tensor]:
    """Tensors of a safetensors file, or of a pickled state dict converted once to safetensors (order kept)."""
    from safetensors.torch import load_file

    if not path.is_file():
        raise ModelError("M540", f"no weights file {path}.", "check vision.weights.")
    if path.suffix == ".safetensors":
        return load_file(path)
    converted = fs.cache_dir() / f"vision-{path.stem}-{fs.sha256(path)[:12]}.safetensors"
    if not converted.is_file():
        state: Mapping[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        fs.write_tensors(converted, {f"{i:05d}|{k}": v for i, (k, v) in enumerate(state.items())})
    tensors = load_file(converted)  # safetensors sorts by name: the index in front restores the file's order
    return {k.split("|", 1)[1]: tensors[k] for k in sorted(tensors)}
