"""CIDEr-D (arXiv:1411.5726, section 5): how much of its references' rare words a caption says, and not too long."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

ORDERS = 4
SIGMA = 6.0
Words = Sequence[str]
Vector = dict[tuple[str, ...], float]


def cider_d(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """The score of each caption, from 0 to 10; their mean is that of the corpus.

    CIDEr-D_n(c, S) = 10/|S| sum over s of exp(-(l(c) - l(s))^2 / 2 sigma^2) min(g(c), g(s)) . g(s) / (|g(c)| |g(s)|),
    averaged over n = 1..4; g_k = count of n-gram k times log(images / images whose references have k). Lengths are
    counted in bigrams, as in coco-caption's cider_scorer.py. With one image every weight, and so every score, is 0.

    Args:
        captions: the words of each caption.
        references: the words of each of its references, one or more a caption.
    """
    images = len(references)
    seen = Counter(gram for group in references for gram in {g for words in group for g in _grams(words)})
    weights = {gram: math.log(images / count) for gram, count in seen.items()}
    rarest = math.log(images) if images else 0.0

    def vectors(words: Words) -> list[Vector]:
        found: list[Vector] = [{} for _ in range(ORDERS)]
        for gram, count in _grams(words).items():
            found[len(gram) - 1][gram] = count * weights.get(gram, rarest)
        return found

    scores = []
    for caption, group in zip(captions, references, strict=True):
        candidate = vectors(caption)
        total = sum(_likeness(candidate, vectors(words)) * _brevity(caption, words) for words in group)
        scores.append(10 * total / len(group))
    return scores


def _grams(words: Words) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for n in range(1, ORDERS + 1) for i in range(len(words) - n + 1))


def _likeness(candidate: Sequence[Vector], reference: Sequence[Vector]) -> float:
    """Mean over n of the cosine of the two vectors, the candidate's clipped to the reference's."""
    total = 0.0
    for ours, theirs in zip(candidate, reference, strict=True):
        lengths = math.hypot(*ours.values()) * math.hypot(*theirs.values())
        overlap = sum(min(weight, theirs.get(gram, 0.0)) * theirs.get(gram, 0.0) for gram, weight in ours.items())
        total += overlap / lengths if lengths else 0.0
    return total / len(candidate)


def _brevity(caption: Words, reference: Words) -> float:
    difference = max(0, len(caption) - 1) - max(0, len(reference) - 1)
    return math.exp(-(difference**2) / (2 * SIGMA**2))
