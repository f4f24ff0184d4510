"""Questions and answers of POPE for its tests."""

from __future__ import annotations

from typing import Any

import pytest

from vlmpeft.errors import EvalError
from vlmpeft.eval import pope

Rows = list[dict[str, Any]]


def rows(labels: str, texts: list[str], first: int = 1) -> tuple[Rows, Rows]:
    """Questions with labels given as letters y and n, and their answers."""
    questions: Rows = []
    answers: Rows = []
    for number, (label, text) in enumerate(zip(labels, texts, strict=True), start=first):
        asked = f"Is there a thing {number} in the image?"
        truth = {"y": "yes", "n": "no"}[label]
        questions.append({"question_id": number, "image": f"{number}.jpg", "text": asked, "label": truth})
        answers.append({"question_id": number, "text": text})
    return questions, answers


# labels yyyyynnnnn; 3 of 5 yes found (fn 2), 4 of 5 no found (fp 1)
TEN = rows("yyyyynnnnn", ["Yes", "yes, it is", "", "No", "not there", "no", "No", "No.", "no,", "isn't"])


def refused(questions: Rows, answers: Rows, code: str = "V601") -> str:
    with pytest.raises(EvalError) as caught:
        pope.score(questions, answers)
    assert caught.value.code == code
    return caught.value.line()


def three_settings() -> tuple[Rows, Rows]:
    """Ids 1..4 in each setting; 4, 3 and 2 right answers."""
    questions: Rows = []
    answers: Rows = []
    said = {"random": "ynyn", "popular": "ynyy", "adversarial": "yyyy"}
    for setting, letters in said.items():
        q, a = rows("ynyn", [{"y": "Yes", "n": "No"}[letter] for letter in letters])
        questions += [{**row, "setting": setting} for row in q]
        answers += [{**row, "setting": setting} for row in a]
    return questions, answers
