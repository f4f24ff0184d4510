"""Captions: CIDEr-D against closed forms and coco-caption, BLEU and ROUGE-L as their libraries give them."""

from __future__ import annotations

import builtins
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from told_bundle import load_told, touch

from vlmpeft.errors import EnvironmentFault, EvalError, run_command
from vlmpeft.eval import caption
from vlmpeft.eval.cider import cider_d
from vlmpeft.eval.rows import write_rows

CAPTIONS = ["A dog runs on the grass.", "a red cat, sleeps", "Two men ride a horse"]
REFERENCES = [
    ["a dog runs on grass", "The brown dog is running on the green grass."],
    ["a cat sleeps on a bed", "a small cat is sleeping"],
    ["a man rides a horse on the beach", "two people riding horses"],
]
COCO = [3.9514466123036938, 1.495503652770659, 0.8020514316971988]  # pycocoevalcap 1.2 cider_scorer.py on these words


def words(*texts: str) -> list[list[str]]:
    return [text.split() for text in texts]


def test_cider_d_equals_coco_captions() -> None:
    tokenize = caption.Words().tokenize
    found = cider_d([tokenize(c) for c in CAPTIONS], [[tokenize(r) for r in group] for group in REFERENCES])
    assert found == pytest.approx(COCO, abs=1e-12)


def test_caption_equal_to_its_only_reference_scores_ten() -> None:
    same = words("a b c d e", "f g h i j k")
    assert cider_d(same, [[s] for s in same]) == pytest.approx([10, 10])


def test_short_caption_has_no_longer_n_grams_to_agree_on() -> None:
    same = words("a b", "c d e f")
    assert cider_d(same, [[s] for s in same]) == pytest.approx([5, 10])  # of two words only n = 1 and 2 count


def test_nothing_in_common_scores_zero_and_so_does_an_empty_caption() -> None:
    assert cider_d(words("x y z w", ""), [words("a b c d"), words("e f g h")]) == [0, 0]


def test_words_that_every_image_has_weigh_nothing() -> None:
    assert cider_d(words("the", "the"), [words("the"), words("the")]) == [0, 0]
    assert cider_d(words("a b c d"), [words("a b c d")]) == [0]  # with one image, that is every word


def test_score_is_the_mean_over_references() -> None:
    found = cider_d(words("a b c d", "e f g h"), [words("a b c d", "x y z w"), words("e f g h")])
    assert found == pytest.approx([5, 10])


def test_half_the_words_give_the_closed_form() -> None:
    # 2 images; caption "a b" against "a c": one of two unigrams, weights all log 2, so cosine 1/2; bigrams differ
    assert cider_d(words("a b", "e"), [words("a c"), words("e")])[0] == pytest.approx(10 * 0.5 / 4)


def test_repeated_words_are_clipped_and_length_is_punished() -> None:
    # "a a a" against "a": counts 3 and 1, clipped 1 * 1 / (3 * 1); 2 bigrams against 0, sigma 6
    found = cider_d(words("a a a", "e"), [words("a"), words("e")])[0]
    assert found == pytest.approx(10 / 4 / 3 * math.exp(-(2**2) / (2 * 6**2)))


def rows(captions: list[str] = CAPTIONS) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Questions with their references, and captions as answers."""
    questions = [
        {"question_id": i, "image": f"{i}.png", "text": f"Describe {i}.", "references": group}
        for i, group in enumerate(REFERENCES)
    ]
    return questions, [{"question_id": i, "text": text} for i, text in enumerate(captions)]


def test_corpus_bleu_equals_counts_by_hand() -> None:
    questions, answers = rows()
    metrics = caption.score(questions, answers[::-1])
    # words found in a reference: 6 of 6, 3 of 4, 3 of 5 (two, a, horse); 15 words; closest references 5, 5, 4 -> 14
    assert metrics["bleu_1"] == pytest.approx(12 / 15)
    # pairs: 4 of 5 (the-grass is none), 1 of 3 (cat-sleeps), 1 of 4 (a-horse)
    assert metrics["bleu_2"] == pytest.approx(math.sqrt(12 / 15 * 6 / 12))
    assert metrics["bleu_4"] < metrics["bleu_3"] < metrics["bleu_2"]
    assert metrics["cider_d"] == pytest.approx(sum(COCO) / 3)


def test_short_captions_pay_the_brevity_penalty() -> None:
    questions, answers = rows(["a dog", "a cat", "a horse"])
    assert caption.score(questions, answers)["bleu_1"] == pytest.approx(math.exp(1 - 14 / 6))  # 5 + 5 + 4 words


def test_rouge_l_is_the_best_f1_over_the_references() -> None:
    assert caption.rouge_l(CAPTIONS[0], REFERENCES[0]) == pytest.approx(2 * 5 / (6 + 5))  # 5 in order, 6 and 5 words
    assert caption.rouge_l("dog a", ["a dog"]) == pytest.approx(0.5)  # order counts
    assert caption.rouge_l("", ["a dog"]) == 0.0


def test_references_may_differ_in_number_and_case_and_marks_do_not_count() -> None:
    questions, answers = rows(["A DOG runs, on grass!", "A cat sleeps on a bed", "TWO people riding horses"])
    questions[0]["references"] = [*REFERENCES[0], "a dog runs on grass"]
    metrics = caption.score(questions, answers)
    assert [metrics[name] for name in ("bleu_1", "bleu_4", "rouge_l")] == pytest.approx([1, 1, 1])
    assert metrics["rouge_l_ci95"] == pytest.approx([1, 1])


def test_no_and_empty_captions_are_scored_zero_and_counted() -> None:
    metrics = caption.score(*rows(["", " ", ""]))
    assert [metrics[name] for name in caption.MEASURES] == [0.0] * 6
    assert (metrics["n"], metrics["empty"]) == (3, 3)
    assert caption.score([], [])["n"] == 0


def test_wrong_ids_and_references_are_refused() -> None:
    questions, answers = rows()
    with pytest.raises(EvalError, match=r"V601.*missing answers: 2.*repeated answers: 0"):
        caption.score(questions, [*answers[:2], answers[0]])
    for wrong in (None, [], "a dog", [""], [3]):
        with pytest.raises(EvalError, match=r"V602.*question 0: references must be a list of texts"):
            caption.score([{**questions[0], "references": wrong}, *questions[1:]], answers)


def test_missing_library_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith(("sacrebleu", "rouge_score")):
            raise ModuleNotFoundError(name)
        return whole(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(EnvironmentFault, match=r"E414.*rouge-score.*pip install vlmpeft\[caption\]"):
        caption.rouge_l("a", ["a"])
    with pytest.raises(EnvironmentFault, match=r"E414.*sacrebleu"):
        caption.bleu([["a"]], [[["a"]]])


def test_command_asks_without_a_suffix_and_its_answers_score_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "q.jsonl", rows()[0])
    bundle = load_told(monkeypatch, {f"Describe {i}": text for i, text in enumerate(CAPTIONS)})
    images = touch(tmp_path / "images", "0.png", "1.png", "2.png")
    out = tmp_path / "out"
    assert (
        run_command(caption.main, ["model=M", f"questions={tmp_path / 'q.jsonl'}", f"images={images}", f"out={out}"])
        == 0
    )
    assert [r.prompt for r in bundle.requests] == [f"Describe {i}." for i in range(3)]
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["measure", *caption.MEASURES]
    assert run_command(caption.main, [f"questions={tmp_path / 'q.jsonl'}", f"answers={out / 'answers.jsonl'}"]) == 0
    scored = json.loads(capsys.readouterr().out)
    assert scored["cider_d"] == pytest.approx(sum(COCO) / 3)
    assert json.loads((out / "metrics.json").read_text()).items() >= scored.items()


def test_scoring_imports_no_torch() -> None:
    code = (
        "import sys; from vlmpeft.eval import caption; q = {'question_id': 1, 'text': '?', 'references': ['a b']}; "
        "caption.score([q], [{'question_id': 1, 'text': 'a b'}]); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
