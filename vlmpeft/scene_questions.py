"""What a scene holds, and questions about it whose text alone does not give the answer away.

Every phrase is asked as often with "yes" as with "no", and the answers of every other question are kept even by
counting, so that a model that does not look at the image stays at chance (the flaw VQA v2 mends, arXiv:1612.00837).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SHAPES = ("circle", "square", "triangle", "star", "heart")
COLORS = ("red", "green", "blue", "yellow", "black", "white")
SIZES = ("large", "small")
CELLS = ("top left", "top right", "bottom left", "bottom right", "center")  # "center" only where an object is alone
NUMBERS = ("one", "two", "three", "four")
OPPOSITES = (
    *(("hot", "cold"), ("cold", "hot"), ("up", "down"), ("down", "up"), ("day", "night"), ("night", "day")),
    *(("open", "closed"), ("wet", "dry"), ("dry", "wet"), ("early", "late"), ("fast", "slow"), ("slow", "fast")),
)
KIND_WEIGHTS = (0.6, 0.2, 0.2)  # how often "red circle", "circle", "red object" are asked for
YES_NO, DETAIL_TURNS = (True, True, False, False), 3  # questions about a training image
TEXT_ONLY = 0.05  # share of training rows without an image
SUFFIX = "\nAnswer the question using a single word or phrase."
SUFFIX_SHARE = 0.5  # share of the first turns that carry it


@dataclass(frozen=True)
class Thing:
    """One object; `x`, `y` its centre and `width` its diameter, as fractions of the image side, `turn` in degrees."""

    shape: str
    color: str
    size: str
    cell: str
    x: float
    y: float
    width: float
    turn: float

    @property
    def phrases(self) -> tuple[str, str, str]:
        """The names it answers to: colour and shape, shape, colour."""
        return f"{self.color} {self.shape}", self.shape, f"{self.color} object"


@dataclass(frozen=True)
class Scene:
    """Objects in reading order, no two alike in colour and shape, on a background (pattern, two RGB tones, angle)."""

    things: tuple[Thing, ...]
    pattern: str
    tones: tuple[tuple[int, int, int], tuple[int, int, int]]
    angle: float

    @property
    def description(self) -> str:
        """Everything a question can be about; equal descriptions are the same scene."""
        return ", ".join(f"{t.size} {t.color} {t.shape} {t.cell}" for t in self.things)

    @property
    def caption(self) -> str:
        """For example "a large red circle and a small blue star."."""
        names = [f"a {t.size} {t.color} {t.shape}" for t in self.things]
        return " and ".join(filter(None, (", ".join(names[:-1]), names[-1]))) + "."

    @property
    def phrases(self) -> frozenset[str]:
        """Every phrase that is true of some object."""
        return frozenset(p for t in self.things for p in t.phrases)


@dataclass(frozen=True)
class Question:
    """A question and its answer; `groups` are (what is kept even, this question's value, number of values)."""

    category: str
    text: str
    answer: str
    groups: tuple[tuple[str, str, int], ...] = ()


def even_labels(turns: Sequence[int], rng: random.Random) -> list[list[bool]]:
    """Yes or no for `turns[i]` questions about scene i, over all as many yes as no; an odd last one is left out."""
    half = sum(turns) // 2
    labels = [True] * half + [False] * half
    rng.shuffle(labels)
    return [[labels.pop() for _ in range(min(n, len(labels)))] for n in turns]


def existence(scenes: Sequence[Scene], labels: Sequence[Sequence[bool]], rng: random.Random) -> list[list[Question]]:
    """Yes/no questions for each scene, `labels` in order (at most three yes); a phrase gets as many no as yes.

    The phrases asked with yes are dealt out again, as questions with no, to scenes where nothing answers to them.
    """
    present: list[list[str]] = [[] for _ in scenes]
    for scene, phrases, wanted in zip(scenes, present, labels, strict=True):
        while len(phrases) < sum(wanted):
            phrase = rng.choices(rng.choice(scene.things).phrases, KIND_WEIGHTS)[0]
            if phrase not in phrases:
                phrases.append(phrase)
    pool = [p for phrases in present for p in phrases]
    slots = [i for i, wanted in enumerate(labels) for label in wanted if not label]
    rng.shuffle(pool)
    rng.shuffle(slots)
    absent = _deal(pool, slots, [set(s.phrases) for s in scenes])
    rows = []
    for yes, no, wanted in zip(present, absent, labels, strict=True):
        rows.append([_existence(yes.pop() if label else no.pop(), label) for label in wanted])
    return rows


def _existence(phrase: str, label: bool) -> Question:
    return Question("yesno", f"Is there a {phrase} in the image?", "Yes" if label else "No")


def _deal(pool: list[str], slots: Sequence[int], taken: list[set[str]]) -> list[list[str]]:
    """A phrase of `pool` for every slot i, none that is in `taken[i]`; swaps with an earlier slot at a dead end."""
    dealt: list[list[str]] = [[] for _ in taken]
    for slot in slots:
        phrase = next((p for p in pool if p not in taken[slot]), None)
        if phrase is None:
            phrase = _swap(pool, slot, dealt, taken)
        else:
            pool.remove(phrase)
        dealt[slot].append(phrase)
        taken[slot].add(phrase)
    return dealt


def _swap(pool: list[str], slot: int, dealt: list[list[str]], taken: list[set[str]]) -> str:
    """A phrase given up by another slot for one of `pool`; in a set too small for that, any absent phrase."""
    for other, phrases in enumerate(dealt):
        for n, phrase in enumerate(phrases):
            instead = next((p for p in pool if p not in taken[other]), None)
            if phrase not in taken[slot] and instead is not None:
                phrases[n] = instead
                taken[other] = taken[other] - {phrase} | {instead}
                pool.remove(instead)
                return phrase
    pool.pop()
    return next(p for c in COLORS for s in SHAPES if (p := f"{c} {s}") not in taken[slot])


def details(scene: Scene) -> list[Question]:
    """Every question of the other categories that has one answer in this scene."""
    number = NUMBERS[len(scene.things) - 1]
    found = [_question("count", "How many objects are there?", number, len(NUMBERS))]
    shapes = Counter(t.shape for t in scene.things)
    colors = Counter(t.color for t in scene.things)
    for t in scene.things:
        name = f"{t.color} {t.shape}"
        found.append(_question("where", f"Where is the {name}?", t.cell, len(CELLS)))
        found += _either("size", f"Is the {name} {{}} or {{}}?", t.size, SIZES)
        if t.cell != "center":
            row, column = t.cell.split()
            found += _either("position", f"Is the {name} on the {{}} or on the {{}}?", column, ("left", "right"))
            found += _either("position", f"Is the {name} at the {{}} or at the {{}}?", row, ("top", "bottom"))
        if shapes[t.shape] == 1:
            found.append(_question("color", f"What color is the {t.shape}?", t.color, len(COLORS)))
            found += _either("choice", f"Is the {t.shape} {{}} or {{}}?", t.color, COLORS)
        if colors[t.color] == 1:
            found.append(_question("shape", f"What shape is the {t.color} object?", t.shape, len(SHAPES)))
            found += _either("choice", f"Is the {t.color} object a {{}} or a {{}}?", t.shape, SHAPES)
    return found


def _question(category: str, text: str, answer: str, values: int) -> Question:
    answer = answer.capitalize()
    return Question(category, text, answer, ((category, answer, values), (text, answer, values)))


def _either(category: str, text: str, true: str, values: Sequence[str]) -> list[Question]:
    """`text` with the true value and each other one, in both orders; the first is true as often as the second."""
    found = []
    for other in values:
        for place, pair in (("first", (true, other)), ("second", (other, true))):
            pair_group = text.format(*sorted(pair))
            groups = ((f"{category} {sorted(pair)}", true, 2), (pair_group, true, 2), (category, place, 2))
            if other != true:
                found.append(Question(category, text.format(*pair), true.capitalize(), groups))
    return found


class Balance:
    """Chooses questions so that categories, and the answers within every group, come out even."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.categories: Counter[str] = Counter()
        self.totals: Counter[str] = Counter()
        self.values: Counter[tuple[str, str]] = Counter()

    def choose(self, scene: Scene, n: int) -> list[Question]:
        """At most `n` questions of different categories about `scene`."""
        left = details(scene)
        chosen: list[Question] = []
        while left and len(chosen) < n:
            best = min(left, key=lambda q: (self._excess(q), self.rng.random()))
            chosen.append(best)
            left = [q for q in left if q.category != best.category]
            self.categories[best.category] += 1
            for group, value, _ in best.groups:
                self.totals[group] += 1
                self.values[group, value] += 1
        return chosen

    def _excess(self, question: Question) -> float:
        """How much more than its even share this category and this answer have been asked."""
        uneven = sum(self.values[g, v] - self.totals[g] / size for g, v, size in question.groups)
        return self.categories[question.category] + uneven


def text_only(rng: random.Random) -> Question:
    """A question that needs no image: a sum or an opposite."""
    if rng.random() < 0.6:
        a, b = rng.randint(2, 40), rng.randint(2, 40)
        return Question("text", f"What is {a} plus {b}?", str(a + b))
    word, opposite = rng.choice(OPPOSITES)
    return Question("text", f"What is the opposite of {word}?", opposite.capitalize())


def instruct(scenes: Sequence[Scene], rng: random.Random) -> list[dict[str, Any]]:
    """LLaVA rows with several turns for each scene, among them a few without an image."""
    asked = existence(scenes, [rng.sample(YES_NO, len(YES_NO)) for _ in scenes], rng)
    balance, rows = Balance(rng), []
    for i, (scene, questions) in enumerate(zip(scenes, asked, strict=True)):
        rest = balance.choose(scene, DETAIL_TURNS)
        rng.shuffle(rest)
        lead = rng.choice((0, 1))  # "the red circle" would tell that there is one, so at most one such turn comes first
        questions = rest[:lead] + questions + rest[lead:]
        head = "<image>\n{}" + (SUFFIX if rng.random() < SUFFIX_SHARE else "")
        name = f"train_{i:04d}"
        rows.append({"id": name, "image": f"{name}.png", "conversations": _turns(questions, head)})
    for i in range(round(len(scenes) * TEXT_ONLY / (1 - TEXT_ONLY))):
        rows.append({"id": f"text_{i:04d}", "conversations": _turns([text_only(rng)], "{}")})
    rng.shuffle(rows)
    return rows


def _turns(questions: Sequence[Question], head: str) -> list[dict[str, str]]:
    turns = []
    for i, q in enumerate(questions):
        turns.append({"from": "human", "value": q.text if i else head.format(q.text)})
        turns.append({"from": "gpt", "value": q.answer})
    return turns
