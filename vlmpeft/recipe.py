"""What a recipe holds: frozen dataclasses, one a section."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from vlmpeft.data_config import DataConfig as DataConfig
from vlmpeft.data_config import DataFile as DataFile
from vlmpeft.diagnose_config import DiagnoseConfig as DiagnoseConfig
from vlmpeft.eval_config import EvalConfig as EvalConfig
from vlmpeft.quant import QuantConfig as QuantConfig
from vlmpeft.tuners.base import Tuner, check


@dataclass(frozen=True)
class VisionConfig:
    """The encoder; see `vision.load_vision`."""

    name: str
    layer: int = -1
    weights: str | None = None
    weights_by: Literal["name", "order"] = "name"
    image_size: int | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    compat: Literal["tinyllava_siglip"] | None = None

    def __post_init__(self) -> None:
        check(self.image_size is None or self.image_size >= 1, "vision.image_size", self.image_size, "at least 1 pixel")
        check(self.std is None or all(s > 0 for s in self.std), "vision.std", self.std, "three numbers above 0")


@dataclass(frozen=True)
class LanguageConfig:
    """The language model; see `language.load_language`.

    scale_image_embeddings: multiply image tokens by sqrt(width), as Gemma's embedding does with words. transformers 4
    did it to both, so VLMs trained there on a Gemma need it.
    """

    name: str
    attention: str = "auto"
    eos: str | None = None
    scale_image_embeddings: bool = False


@dataclass(frozen=True)
class TokensConfig:
    """New tokens; see `tokens.add_tokens`. Their rows train in every stage."""

    add: tuple[str, ...] = ()
    init: Literal["mean", "text"] = "mean"

    def __post_init__(self) -> None:
        plain = all(len(token) > 1 and token == token.strip() for token in self.add)
        check(plain, "tokens.add", self.add, "tokens of 2 letters or more without space around them")
        check(len(set(self.add)) == len(self.add), "tokens.add", self.add, "every token once")


@dataclass(frozen=True)
class ProjectorConfig:
    """The projector's name in the registry and its own options."""

    name: str = "mlp2x_gelu"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule.

    name: torch's AdamW, or one of bitsandbytes; see `optim`. lr: of tuners without one of their own. clip: gradient
    norm, null for none. steps: null trains `epochs`. l2_sp: pull towards the starting weights, 0 for none; see `drift`.
    """

    name: Literal["adamw", "adamw8bit", "paged_adamw8bit", "paged_adamw32bit"] = "adamw"
    lr: float = 2e-4
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float | None = None
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.03
    epochs: float = 1.0
    steps: int | None = None
    l2_sp: float = 0.0

    def __post_init__(self) -> None:
        check(self.l2_sp >= 0, "optim.l2_sp", self.l2_sp, "0 or more")
        check(0 < self.lr <= 1, "optim.lr", self.lr, "a number in (0, 1]")
        check(0 <= self.weight_decay < 1, "optim.weight_decay", self.weight_decay, "a number in [0, 1)")
        check(0 <= self.warmup < 1, "optim.warmup", self.warmup, "a share in [0, 1)")
        check(self.epochs > 0, "optim.epochs", self.epochs, "a number above 0")
        check(self.steps is None or self.steps >= 1, "optim.steps", self.steps, "at least 1")
        check(self.clip is None or self.clip > 0, "optim.clip", self.clip, "a number above 0, or null")
        check(all(0 <= b < 1 for b in self.betas), "optim.betas", self.betas, "two numbers in [0, 1)")
        check(self.eps > 0, "optim.eps", self.eps, "a number above 0")


@dataclass(frozen=True)
class BatchConfig:
    """How samples form batches.

    size: samples an optimizer step sees, over all processes. micro: samples in one forward. group: batches of like
    length, or of one modality and like length.
    """

    size: int = 128
    micro: int = 16
    group: Literal["none", "length", "modality"] = "none"

    def __post_init__(self) -> None:
        check(self.size >= 1, "batch.size", self.size, "at least 1")
        check(1 <= self.micro <= self.size, "batch.micro", self.micro, f"1 to batch.size ({self.size})")


@dataclass(frozen=True)
class Stage:
    """One training stage.

    source: which file of the data section. turns: "chat" trains a conversation in order; "independent" lets each
    question see the images and itself only, as if it had been asked alone, at the price of one image.
    """

    source: Literal["pretrain", "instruct"] = "instruct"
    template: str = "vicuna_v1"
    system: str | None = None
    turns: Literal["chat", "independent"] = "chat"
    gradient_checkpointing: bool = False
    tuners: Mapping[str, Tuner] = field(default_factory=dict)
    optim: OptimConfig = field(default_factory=OptimConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)


@dataclass(frozen=True)
class AlignConfig:
    """Word alignment of a fresh projector before the first stage; see `align`.

    epochs: 0 for none. source: whose answers give the words: those of the stages on data.pretrain, on data.instruct,
    or all. scale: of the similarity between image tokens and word embeddings. max_share: words said of a larger share
    of the images are left out.
    """

    epochs: int = 0
    source: Literal["pretrain", "instruct", "all"] = "all"
    lr: float = 2e-3
    weight_decay: float = 0.01
    batch: int = 32
    scale: float = 2.0
    max_share: float = 0.6

    def __post_init__(self) -> None:
        check(self.epochs >= 0, "align.epochs", self.epochs, "0 or more")
        check(0 < self.lr <= 1, "align.lr", self.lr, "a number in (0, 1]")
        check(0 <= self.weight_decay < 1, "align.weight_decay", self.weight_decay, "a number in [0, 1)")
        check(self.batch >= 1, "align.batch", self.batch, "at least 1")
        check(self.scale > 0, "align.scale", self.scale, "a number above 0")
        check(0 < self.max_share <= 1, "align.max_share", self.max_share, "a share in (0, 1]")


@dataclass(frozen=True)
class RetentionConfig:
    """Text alone, before the first stage and after the last: what the language model still knows; see `retention`.

    data: a JSONL file, or "builtin" for the small one that comes along.
    """

    data: str | None = None
    batch_size: int = 8

    def __post_init__(self) -> None:
        check(self.batch_size >= 1, "retention.batch_size", self.batch_size, "at least 1")


OVERRIDABLE = re.compile(r"(stages\.[^.]+\.)?(optim\.(?!name$)\w+|(tuners\.)?[^.]+\.lr)")


@dataclass(frozen=True)
class RunConfig:
    """How and where a run runs.

    precision: "auto" takes bf16 where the hardware multiplies it, else fp32. resume: "auto", "never" or a checkpoint.
    save_every, eval_every: optimizer steps, 0 for the end of a stage only. keep: newest checkpoints kept. patience:
    evaluations without a better loss before a stage ends early, 0 for never. trackers: names accelerate knows.
    dry_run: print what would train, from config.json files alone, and stop. timeout_s: seconds a process waits for the
    others; longer than the evaluations, which one process makes while the others wait. best_by: what chooses the best
    checkpoint: "loss" on held-out samples, or in the last stage a figure of eval.questions, as "eval.pope.accuracy".
    override: keys a resumed run may change, of `optim` or a tuner's lr, as [optim.lr]. allow_base_mismatch: start or go
    on from weights that were trained on another base of the same shapes.
    """

    dir: str = "runs/run"
    seed: int = 42
    device: str = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    resume: str = "auto"
    overwrite: bool = False
    log_every: int = 1
    save_every: int = 0
    eval_every: int = 0
    keep: int = 2
    patience: int = 0
    best_by: str = "loss"
    trackers: tuple[str, ...] = ()
    project: str = "vlmpeft"
    dry_run: bool = False
    timeout_s: int = 7200
    override: tuple[str, ...] = ()
    allow_base_mismatch: bool = False

    def __post_init__(self) -> None:
        check(0 <= self.seed < 2**63, "run.seed", self.seed, "an integer from 0 to 2**63 - 1")
        check(self.keep >= 2, "run.keep", self.keep, "at least 2: the newest may be in the making when a run dies")
        check(self.timeout_s >= 1, "run.timeout_s", self.timeout_s, "at least 1 second")
        check(self.log_every >= 1, "run.log_every", self.log_every, "at least 1")
        for name in ("save_every", "eval_every", "patience"):
            check(getattr(self, name) >= 0, f"run.{name}", getattr(self, name), "0 or more")
        for key in self.override:
            check(OVERRIDABLE.fullmatch(key) is not None, "run.override", key, "keys of optim, or a tuner's lr")


@dataclass(frozen=True)
class Recipe:
    """A whole run.

    init: what to start from instead of the bare base: a model directory, or `hf:DIR_OR_ID` for a LLaVA or LLaVA-NeXT of
    transformers; see `llava_source`.
    """

    vision: VisionConfig
    language: LanguageConfig
    stages: Mapping[str, Stage]
    quant: QuantConfig = field(default_factory=QuantConfig)
    tokens: TokensConfig = field(default_factory=TokensConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    data: DataConfig = field(default_factory=DataConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    retention: RetentionConfig = field(default_factory=RetentionConfig)
    diagnose: DiagnoseConfig = field(default_factory=DiagnoseConfig)
    run: RunConfig = field(default_factory=RunConfig)
    init: str | None = None
    imports: tuple[str, ...] = ()
    title: str = ""
