"""Word alignment: before the first stage, image tokens move to the embeddings of the words said about their image.

A language model reads token embeddings. A fresh projector gives it vectors unlike any of them, and what a caption loss
first teaches such a projector is one common vector that brings out the captions' form. Here the language model is not
run at all: an image is a mixture of its tokens, each a softmax over words by similarity to their embeddings, and has to
explain the words of its answers. It costs a small part of one captioning pass, and the two stages then start from
tokens that mean something.

Letters: b images, n tokens of one, d width, w words.
p(word | image) = mean over tokens z of softmax(scale * z E^T)[word]; the loss is the cross entropy to the
image's words, uniform over them, plus 0.1 (|z| / mean |E| - 1)^2.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from vlmpeft.batch import IGNORE
from vlmpeft.data import Sample
from vlmpeft.recipe import AlignConfig
from vlmpeft.vlm import VLM

NORM_WEIGHT = 0.1


@dataclass(frozen=True)
class WordTargets:
    """images: files. words: (w,) token ids. targets: (images, w), rows sum to 1."""

    images: list[Path]
    words: Tensor
    targets: Tensor


def word_targets(samples: Iterable[Sample], max_share: float, excluded: Collection[int]) -> WordTargets | None:
    """The supervised tokens said about each image, over all samples with that image alone.

    Args:
        max_share: tokens said of a larger share of the images ("a", "Yes") carry nothing and are left out.
        excluded: ids that are never words, such as special tokens.

    Returns: None if no token is left.
    """
    said: dict[Path, set[int]] = {}
    for sample in samples:
        if len(sample.images) == 1:
            tokens = {t for t in sample.labels if t != IGNORE} - set(excluded)
            said.setdefault(sample.images[0], set()).update(tokens)
    counts = Counter(token for tokens in said.values() for token in tokens)
    words = sorted(token for token, count in counts.items() if count <= max_share * len(said))
    column = {token: i for i, token in enumerate(words)}
    images = sorted(path for path, tokens in said.items() if tokens & column.keys())
    if not images:
        return None
    targets = torch.zeros(len(images), len(words))
    for row, path in enumerate(images):
        targets[row, [column[t] for t in sorted(said[path] & column.keys())]] = 1
    return WordTargets(images, torch.tensor(words), targets / targets.sum(1, keepdim=True))


def alignment_loss(tokens: Tensor, embeddings: Tensor, targets: Tensor, scale: float, mean_norm: float) -> Tensor:
    """The loss of the module's head. Args: tokens (b, n, d), embeddings (w, d), targets (b, w). Returns: a scalar."""
    logits = scale * tokens.float() @ embeddings.float().T  # (b, n, w)
    image = torch.logsumexp(F.log_softmax(logits, -1), 1) - math.log(tokens.shape[1])  # (b, w) log p(word | image)
    norms = tokens.float().norm(dim=-1) / mean_norm
    return -(targets * image).sum(1).mean() + NORM_WEIGHT * ((norms - 1) ** 2).mean()


def align(
    model: VLM,
    samples: Iterable[Sample],
    load: Callable[[Path], Tensor],
    config: AlignConfig,
    excluded: Collection[int],
    seed: int,
) -> float | None:
    """Train the projector alone on word targets.

    Args:
        samples: of all stages.
        load: image file -> (3, h, w) pixels or (n, d) features.

    Returns: the mean loss of the last epoch; None if there was nothing to align, or nothing to align with.
    """
    found = word_targets(samples, config.max_share, excluded)
    parameters = list(model.projector.parameters())
    if found is None or not parameters:
        return None
    embed = model.language.get_input_embeddings()
    device = embed.weight.device
    embeddings = embed(found.words.to(device)).detach()
    mean_norm = float(embeddings.float().norm(dim=-1).mean())
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    count = len(found.images)
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(count, generator=generator) for _ in range(config.epochs)]
    steps = [index for order in orders for index in order.split(config.batch)]
    per_epoch = math.ceil(count / config.batch)
    losses: list[Tensor] = []
    model.projector.requires_grad_(True).train()
    bar = tqdm(steps, desc=f"align {count} images with {len(found.words)} words", unit="step")
    with bar, torch.random.fork_rng():
        torch.manual_seed(seed)  # of the projector's dropout
        for step, index in enumerate(bar):
            optimizer.param_groups[0]["lr"] = config.lr * 0.5 * (1 + math.cos(math.pi * step / len(steps)))
            pixels = torch.stack([load(found.images[i]) for i in index.tolist()]).to(device)
            loss = alignment_loss(
                model.image_embeddings(pixels),
                embeddings,
                found.targets[index].to(device),
                config.scale,
                mean_norm,
            )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
            if step % 10 == 0:
                bar.set_postfix(loss=f"{losses[-1].item():.3f}", refresh=False)
    model.projector.requires_grad_(False).eval()
    return float(torch.stack(losses[-per_epoch:]).mean())
