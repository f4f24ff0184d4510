"""VQA accuracy of VQAv2, TextVQA and VizWiz: short answers against those of ten annotators.

Run and score a model:
  python -m vlmpeft.eval.vqa dataset=textvqa model=DIR questions=FILE images=DIR out=DIR [ocr=true] [key=value ...]
Score given answers, without a model:
  python -m vlmpeft.eval.vqa dataset=textvqa questions=FILE answers=FILE

questions: JSON lines with question_id, image, text, answers (the annotators' ten) and, if wanted, category and
ocr_tokens (a list of words).
dataset: vqav2, textvqa or vizwiz (whose prompt allows "Unanswerable").
normaliser: evalai (TextVQA's and the VQAv2 server's) or vqav2 (the official script: raw texts where all ten agree).
ocr: put the ocr_tokens into the prompt, as LLaVA's TextVQA files do; worth ten points, so always said with the score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlmpeft.errors import ConfigError, EvalError, nearest, run_command
from vlmpeft.eval.benchmark import Benchmark, Command, by_category, category_table
from vlmpeft.eval.rows import Row, read_rows
from vlmpeft.eval.vqa_text import evalai, official, tidy

QUESTION_KEYS = ("question_id", "image", "text")
DATASETS = ("vqav2", "textvqa", "vizwiz")
NORMALISERS = ("evalai", "vqav2")
OPTIONS = {"dataset": "vqav2", "normaliser": "evalai", "ocr": False}
HOW = "give what the annotators said as `answers`."
UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."  # LLaVA-1.5, table 9


def vqa_accuracy(text: str, answers: Sequence[str]) -> float:
    """Mean over the annotators of min(1, matches among the others / 3): 0, .3, .6, .9, 1 of ten; texts as compared.

    Source: VQA (arXiv:1505.00468) section 4, as the official vqaEval.py computes it; not min(1, matches / 3) of all.
    """
    matches = sum(answer == text for answer in answers)
    shares = [min(1.0, (matches - (answer == text)) / 3) for answer in answers]
    return round(sum(shares) / len(shares), 9) if shares else 0.0


def answer_accuracy(text: str, answers: Sequence[str], normaliser: str = "evalai") -> float:
    """`vqa_accuracy` after normalisation by `evalai` or `vqav2`."""
    if normaliser == "evalai":
        return vqa_accuracy(evalai(text), [evalai(answer) for answer in answers])
    raw = [tidy(answer) for answer in answers]
    if len(set(raw)) == 1:
        return vqa_accuracy(tidy(text), raw)
    return vqa_accuracy(official(text), [official(answer) for answer in answers])


def score(questions: Sequence[Row], answers: Sequence[Row], *, normaliser: str = "evalai") -> dict[str, Any]:
    """Join by id and score.

    Args:
        questions: question_id, text and answers (a list of texts) each; `category` adds an accuracy per category.
        answers: question_id and text (or answer) each.

    Returns:
        accuracy, accuracy_ci95, n, empty, unparsable (the empty ones), by_chance (always 0) and, with categories,
        `categories`.

    Raises:
        EvalError: V601 for missing, extra or repeated ids, V602 for answers that are no list of texts.
    """
    return benchmark({**OPTIONS, "normaliser": normaliser}).score(questions, answers)


def benchmark(options: Mapping[str, Any]) -> Benchmark:
    """The benchmark for `dataset`, `normaliser` and `ocr`. Raises: ConfigError C102 for an unknown name."""
    for key, known in (("dataset", DATASETS), ("normaliser", NORMALISERS)):
        if options[key] not in known:
            raise ConfigError("C102", f"no {key} '{options[key]}'{nearest(options[key], known)}")
    normaliser = str(options["normaliser"])

    def points(question: Row, text: str) -> float:
        return answer_accuracy(text, _annotations(question), normaliser)

    return Benchmark(
        about={
            "benchmark": str(options["dataset"]),
            "parser": f"{normaliser} normalisation, leave-one-out VQA accuracy",
            "ocr_tokens": "in the prompt" if options["ocr"] else "not in the prompt",
        },
        judge=lambda question, text: {"answers": question.get("answers"), "score": points(question, text)},
        total=lambda pairs: by_category(pairs, points),
    )


def _annotations(question: Row) -> list[str]:
    answers = question.get("answers")
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        place = f"question {question.get('question_id')}"
        raise EvalError("V602", f"{place}: answers must be a list of texts, got {answers!r:.80}.", HOW)
    return answers


def read_questions(arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Questions as they are asked: with the OCR tokens if wanted, and VizWiz's leave to say "Unanswerable".

    Raises: EvalError V602 for a row without what it needs.
    """
    rows = read_rows(arguments["questions"], QUESTION_KEYS)
    unanswerable = UNANSWERABLE if arguments["dataset"] == "vizwiz" else ""
    return [{**row, "text": row["text"] + (_ocr(row) if arguments["ocr"] else "") + unanswerable} for row in rows]


def _ocr(row: Row) -> str:
    """LLaVA's line of OCR tokens (llava_textvqa_val_v051_ocr.jsonl)."""
    tokens = row.get("ocr_tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        place = f"question {row.get('question_id')}"
        raise EvalError("V602", f"{place}: ocr=true, but ocr_tokens is {tokens!r:.80}.", "give a list of words.")
    return "\nReference OCR token: " + ", ".join(tokens)


COMMAND = Command(__doc__ or "", read_questions, benchmark, category_table, OPTIONS)
main = COMMAND.main

if __name__ == "__main__":
    raise SystemExit(run_command(main))
