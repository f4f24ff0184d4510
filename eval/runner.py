"""What every benchmark shares: reading the command line, asking a model, writing the results."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vlmpeft.errors import NumericError
from vlmpeft.eval.ablate import ablated, check_ablation
from vlmpeft.eval.arguments import parse_arguments, table
from vlmpeft.eval.compare import compare_files, texts_of
from vlmpeft.eval.distinct import answer_distinct
from vlmpeft.eval.identity import digest
from vlmpeft.eval.method import candidates_of, check_method, logliks_of
from vlmpeft.eval.paths import check_pictures, has_image, resolve_images, with_image
from vlmpeft.eval.rows import Row, read_rows, write_json, write_rows
from vlmpeft.eval.session import Evaluation, carry_out, prepare_folder
from vlmpeft.eval.wrong_page import Wrong

if TYPE_CHECKING:
    from PIL import Image
    from tqdm import tqdm

    from vlmpeft.decode import Answer, Request

__all__ = ["Answerer", "ask", "parse_arguments", "prepare_folder", "read_rows", "resolve_images", "run", "table"]
__all__ += ["write_json", "write_rows"]
OPTIONS = ("suffix", "batch_size", "max_new_tokens", "ablate", "method")  # of the command line, for `Evaluate`


class Answerer(Protocol):
    """A model that can be asked: what `vlmpeft.load` returns."""

    def answer(
        self,
        requests: Sequence[Request],
        *,
        max_new_tokens: int = 16,
        batch_size: int = 16,
        contrast: tuple[str, str] | None = None,
        on_batch: Callable[[Sequence[tuple[int, Answer]]], None] | None = None,
    ) -> list[Answer]:
        """Greedy answers in the order of the requests; `on_batch` gets (index, answer) after each finished batch.

        A request with candidates is answered by the likeliest, with `logliks`; a model that cannot leaves them None.
        """

    def blank_image(self, image: Path | Image.Image) -> Image.Image:
        """A picture of the same size in the encoder's mean colour."""


def ask(
    bundle: Answerer,
    questions: Sequence[Row],
    images: str | Path,
    *,
    suffix: str,
    batch_size: int = 16,
    max_new_tokens: int = 16,
    ablate: str = "none",
    contrast: tuple[str, str] | None = None,
    progress: bool = True,
    correct: Callable[[Row, str], float] | None = None,
    method: str = "generate",
    candidates: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Ask every question about its image, greedily, equal ones once; one whose `text_only` is true without an image.

    Args:
        suffix: appended to each question that does not already end in it.
        ablate: what to show instead of the image: none, blank, shuffle or noise; see `vlmpeft.eval.ablate`.
        contrast: two words; `margin` is then logit(first) - logit(second) at the first answer position.
        correct: scores (question, text), from 0 to 1, for the accuracy beside the progress bar.
        method, candidates: see `method.candidates_of`.

    Returns:
        one row a question, in order: setting (if the question has one), question_id, image, prompt, text, margin and,
        by likelihood, logliks. The text is stripped once and otherwise raw.

    Raises:
        DataError: D103 or D120 for an image, before the model is asked anything.
        EvalError: V605 for a model that cannot answer by likelihood.
        NumericError: N301 if a margin is not finite.
    """
    from tqdm import tqdm

    from vlmpeft.decode import Request

    shown = iter(ablated(bundle, resolve_images(with_image(questions), images), ablate))
    pictures = [(next(shown),) if has_image(question) else () for question in questions]
    prompts = [q["text"] if q["text"].endswith(suffix) else q["text"] + suffix for q in questions]
    chosen = candidates_of(method, candidates)
    requests = [Request(images=p, prompt=prompt, **chosen) for p, prompt in zip(pictures, prompts, strict=True)]
    with tqdm(total=len(requests), unit="question", disable=not progress, mininterval=1.0) as bar:
        answers = answer_distinct(
            bundle,
            requests,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            contrast=contrast,
            on_batch=_progress(bar, questions, correct),
        )
    return [
        {**_row(question, prompt, answer), **logliks_of(answer, candidates if chosen else (), question["question_id"])}
        for question, prompt, answer in zip(questions, prompts, answers, strict=True)
    ]


def _progress(
    bar: tqdm[Any], questions: Sequence[Row], correct: Callable[[Row, str], float] | None
) -> Callable[[Sequence[tuple[int, Answer]]], None]:
    """What to do after a batch: move the bar on, with the accuracy so far."""
    right = 0.0

    def on_batch(batch: Sequence[tuple[int, Answer]]) -> None:
        nonlocal right
        if correct is not None:
            right += sum(correct(questions[index], answer.text.strip()) for index, answer in batch)
            bar.set_postfix_str(f"accuracy {right / (bar.n + len(batch)):.3f}", refresh=False)
        bar.update(len(batch))

    return on_batch


def _row(question: Row, prompt: str, answer: Answer) -> dict[str, Any]:
    if answer.margin is not None and not math.isfinite(answer.margin):
        raise NumericError(
            "N301",
            f"question {question['question_id']}: the margin between the two words is {answer.margin}.",
            "the model's logits are not finite; try dtype float32 or an earlier checkpoint.",
        )
    setting = {"setting": question["setting"]} if "setting" in question else {}
    row = {"question_id": question["question_id"], "image": question.get("image"), "prompt": prompt}
    return {**setting, **row, "text": answer.text.strip(), "margin": answer.margin}


class Evaluate(Protocol):
    """What a benchmark does with a model: `pope.evaluate`, `short.evaluate`."""

    def __call__(
        self,
        bundle: Answerer,
        questions: Sequence[Row],
        images: str | Path,
        *,
        suffix: str,
        batch_size: int,
        max_new_tokens: int,
        ablate: str,
        progress: bool = True,
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Returns: answer rows, metrics."""


def run(
    arguments: Mapping[str, Any],
    questions: Sequence[Row],
    evaluate: Evaluate,
    about: Mapping[str, str],
    correct: Callable[[Row, str], float] | None = None,
    show: Callable[[Mapping[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Evaluate the model of a command line in its output folder; see `session.carry_out`.

    Images, output folder and the answers to compare with are checked before the model is loaded.
    Args: correct: judges (question, text), for `compare` and the page of wrong answers. show: told the metrics.
    Returns: the metrics, with `compare` if the arguments name a folder of that name.
    """
    check_ablation(arguments["ablate"])
    check_method(arguments.get("method", "generate"))
    check_pictures(resolve_images(with_image(questions), arguments["images"]))
    other = arguments.get("compare")
    if other:
        texts_of(other, questions)
    options: dict[str, Any] = {key: arguments[key] for key in OPTIONS if key in arguments}

    def ask_model(bundle: Answerer, progress: bool) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        quiet: dict[str, Any] = {} if progress else {"progress": False}
        return evaluate(bundle, questions, arguments["images"], **options, **quiet)

    def compare(answers: Sequence[Row]) -> dict[str, Any]:
        return {"compare": compare_files(questions, answers, other, correct)} if correct and other else {}

    def wrong(answers: Sequence[Row]) -> list[Wrong]:
        paths = iter(resolve_images(with_image(questions), arguments["images"]))
        pictures = [(next(paths),) if has_image(question) else () for question in questions]
        pairs = zip(questions, pictures, answers, strict=True)
        return [_wrong(*pair) for pair in pairs if correct and correct(pair[0], pair[2]["text"]) < 1]

    return carry_out(
        Evaluation(
            settings={**about, **options, "questions_sha256": digest(questions)},
            source={key: arguments[key] for key in ("model", "questions", "images")},
            ask=ask_model,
            compare=compare if correct and other else None,
            wrong=wrong if correct else None,
        ),
        arguments,
        show,
    )


def _wrong(question: Row, pictures: tuple[Path, ...], answer: Row) -> Wrong:
    """A card of the page of wrong answers; of several right answers each is named once."""
    right = next((question[key] for key in ("label", "answers", "references") if key in question), "")
    expected = ", ".join(dict.fromkeys(map(str, right))) if isinstance(right, list) else str(right)
    parsed = None if "parsed" not in answer else str(answer["parsed"])
    kind = str(question.get("setting", question.get("category", "")))
    return Wrong(str(question["question_id"]), question["text"], expected, answer["text"], parsed, pictures, kind)
