"""Captions against references: BLEU (sacrebleu), ROUGE-L (rouge-score) and CIDEr-D.

Run and score a model:
  python -m vlmpeft.eval.caption model=DIR questions=FILE images=DIR out=DIR [key=value ...]
Score given captions, without a model:
  python -m vlmpeft.eval.caption questions=FILE answers=FILE

questions: JSON lines with question_id, image, text (what is asked), references (a list of captions).
answers: JSON lines with question_id and text.
All three see the same words: lower case, letters and digits, an apostrophe inside a word, no punctuation. The
tokenizer of coco-caption (Stanford's, in Java) and its ROUGE-L (beta 1.2) differ: compare with numbers made here.
Needs: pip install vlmpeft[caption]
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from vlmpeft.errors import EnvironmentFault, EvalError, run_command
from vlmpeft.eval.benchmark import Benchmark, Command, Pair
from vlmpeft.eval.cider import cider_d
from vlmpeft.eval.interval import interval
from vlmpeft.eval.rows import Row, read_rows

QUESTION_KEYS = ("question_id", "image", "text")
HOW = "give one caption or more as `references`."
MEASURES = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider_d")


class Words:
    """The tokenizer of all three measures."""

    def tokenize(self, text: str) -> list[str]:
        """The words of a text, in lower case."""
        return re.findall(r"\w+(?:'\w+)*", text.lower())


def score(questions: Sequence[Row], answers: Sequence[Row]) -> dict[str, Any]:
    """Join by id and score.

    Returns:
        bleu_1 to bleu_4 (corpus, not smoothed), rouge_l (mean of the best F1 over the references; with rouge_l_ci95),
        all in [0, 1]; cider_d in [0, 10]; n and empty.

    Raises:
        EvalError: V601 for missing, extra or repeated ids, V602 for references that are no list of texts.
        EnvironmentFault: E414 if sacrebleu or rouge-score is not installed.
    """
    return BENCHMARK.score(questions, answers)


def rouge_l(caption: str, references: Sequence[str]) -> float:
    """The best F1 of the longest common subsequence of words. Raises: EnvironmentFault E414."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ModuleNotFoundError as error:
        raise _missing("rouge-score") from error
    scorer = RougeScorer(["rougeL"], tokenizer=Words())
    return float(scorer.score_multi(list(references), caption)["rougeL"].fmeasure)


def bleu(captions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> dict[str, float]:
    """Corpus BLEU-1 to 4 of words, each from 0 to 1. Raises: EnvironmentFault E414."""
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ModuleNotFoundError as error:
        raise _missing("sacrebleu") from error
    most = max((len(group) for group in references), default=0)
    columns: Any = [[" ".join(group[i]) if i < len(group) else None for group in references] for i in range(most)]
    spoken = [" ".join(words) for words in captions]
    found = {}
    for order in range(1, 5):
        metric = BLEU(max_ngram_order=order, tokenize="none", smooth_method="none", force=True)
        found[f"bleu_{order}"] = metric.corpus_score(spoken, columns).score / 100 if spoken else 0.0
    return found


def _missing(package: str) -> EnvironmentFault:
    message = f"captions are scored with the package {package}, which is not installed."
    return EnvironmentFault("E414", message, "pip install vlmpeft[caption]")


def _references(question: Row) -> list[str]:
    found = question.get("references")
    if not isinstance(found, list) or not found or not all(isinstance(text, str) and text.strip() for text in found):
        place = f"question {question.get('question_id')}"
        raise EvalError("V602", f"{place}: references must be a list of texts, got {found!r:.80}.", HOW)
    return found


def _judge(question: Row, text: str) -> dict[str, Any]:
    return {"references": question.get("references"), "score": rouge_l(text, _references(question))}


def _total(pairs: Sequence[Pair]) -> dict[str, Any]:
    words = Words()
    captions = [words.tokenize(text) for _, text in pairs]
    references = [[words.tokenize(text) for text in _references(question)] for question, _ in pairs]
    rouge = [rouge_l(text, _references(question)) for question, text in pairs]
    cider = cider_d(captions, references)
    return {
        **bleu(captions, references),
        "rouge_l": sum(rouge) / len(rouge) if rouge else 0.0,
        "rouge_l_ci95": interval(rouge),
        "cider_d": sum(cider) / len(cider) if cider else 0.0,
        **{"n": len(pairs), "empty": sum(not text.strip() for _, text in pairs)},
    }


def _table(metrics: Mapping[str, Any]) -> list[list[str]]:
    return [["measure", "value"], *([name, f"{metrics[name]:.4f}"] for name in MEASURES)]


ABOUT = {"benchmark": "caption", "parser": "none; words in lower case without punctuation"}
BENCHMARK = Benchmark(ABOUT, _judge, _total, suffix="", max_new_tokens=64)
COMMAND = Command(
    __doc__ or "", lambda arguments: read_rows(arguments["questions"], QUESTION_KEYS), lambda _: BENCHMARK, _table
)
main = COMMAND.main

if __name__ == "__main__":
    raise SystemExit(run_command(main))
