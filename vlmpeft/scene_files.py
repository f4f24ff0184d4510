"""The files of the drawn data set: captions, training turns and test questions as rows. `scenes` draws and writes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from vlmpeft.scene_questions import Balance, Scene, even_labels, existence

CAPTION_REQUEST = "<image>\nDescribe the image briefly."
POPE_LABELS = (True, False) * 3  # questions about a test image
TYPES_PER_IMAGE = 4  # rows of types_test.jsonl for a test image, one of them yes/no


def captions(scenes: Sequence[Scene]) -> list[dict[str, Any]]:
    """LLaVA rows with one caption for each scene."""
    rows = []
    for i, scene in enumerate(scenes):
        turns = [{"from": "human", "value": CAPTION_REQUEST}, {"from": "gpt", "value": scene.caption}]
        rows.append({"id": f"pretrain_{i:04d}", "image": f"pretrain_{i:04d}.png", "conversations": turns})
    return rows


def pope(scenes: Sequence[Scene], rng: random.Random) -> list[dict[str, Any]]:
    """POPE rows (arXiv:2305.10355): yes and no in turn, labels in lower case."""
    asked = existence(scenes, [POPE_LABELS] * len(scenes), rng)
    rows = [(i, q) for i, questions in enumerate(asked) for q in questions]
    return [
        {"question_id": n, "image": f"test_{i:04d}.png", "text": q.text, "label": q.answer.lower()}
        for n, (i, q) in enumerate(rows, start=1)
    ]


def types(scenes: Sequence[Scene], rng: random.Random) -> list[dict[str, Any]]:
    """Rows of every category with the exact short answer as label, a yes/no one for each scene among them."""
    balance = Balance(rng)
    rows: list[dict[str, Any]] = []
    for i, questions in enumerate(existence(scenes, even_labels([1] * len(scenes), rng), rng)):
        for q in questions + balance.choose(scenes[i], TYPES_PER_IMAGE - 1):
            row = {"question_id": len(rows) + 1, "image": f"test_{i:04d}.png", "text": q.text}
            rows.append({**row, "label": q.answer, "category": q.category})
    return rows


def existence_turns(scenes: Sequence[Scene], rng: random.Random) -> list[dict[str, Any]]:
    """LLaVA rows of the questions that `pope` asks, for training scenes: many labels a token, for short trainings."""
    asked = existence(scenes, [POPE_LABELS] * len(scenes), rng)
    rows = []
    for i, questions in enumerate(asked):
        rng.shuffle(questions)
        turns = []
        for q in questions:
            turns += [{"from": "human", "value": q.text}, {"from": "gpt", "value": q.answer}]
        turns[0]["value"] = f"<image>\n{turns[0]['value']}"
        rows.append({"id": f"train_{i:04d}", "image": f"train_{i:04d}.png", "conversations": turns})
    return rows
