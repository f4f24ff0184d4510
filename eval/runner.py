"""What every benchmark shares: reading the command line, asking a model, writing the results."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vlmpeft.errors import ConfigError, NumericError, nearest
from vlmpeft.eval.ablate import ablated, check_ablation
from vlmpeft.eval.compare import compare_files, texts_of
from vlmpeft.eval.model import open_model
from vlmpeft.eval.paths import has_image, resolve_images, with_image
from vlmpeft.eval.rows import Row, read_rows, write_json, write_rows

if TYPE_CHECKING:
    from PIL import Image
    from tqdm import tqdm

    from vlmpeft.decode import Answer, Request

__all__ = ["Answerer", "ask", "parse_arguments", "prepare_folder", "read_rows", "resolve_images", "run", "table"]
__all__ += ["write_json", "write_rows"]


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
        """Greedy answers in the order of the requests; `on_batch` gets (index, answer) after each finished batch."""

    def blank_image(self, image: Path | Image.Image) -> Image.Image:
        """A picture of the same size in the encoder's mean colour."""


def parse_arguments(
    argv: Sequence[str], defaults: Mapping[str, Any], required: Sequence[str], doc: str
) -> dict[str, Any]:
    """Read `key=value` arguments; a value takes the type of its default, required ones are text.

    Raises:
        ConfigError: C101 for an unknown key, C102 for a missing key or a value of the wrong type.
        SystemExit: after `--help`, which prints `doc` and the keys with their defaults.
    """
    if "--help" in argv or "-h" in argv:
        keys = [f"  {key}=...  required" for key in required]
        keys += [f"  {key}={json.dumps(value).strip(chr(34))}" for key, value in defaults.items()]
        print(doc.strip(), "", "Keys:", *keys, sep="\n")
        raise SystemExit(0)
    values: dict[str, Any] = {}
    for argument in argv:
        key, equals, value = argument.partition("=")
        if not equals or key.startswith("-"):
            example = f"write for example {required[0]}=PATH."
            raise ConfigError("C102", f"expected key=value, got '{argument}'.", example)
        if key not in defaults and key not in required:
            raise ConfigError("C101", f"no key '{key}'{nearest(key, [*required, *defaults])}")
        if key in values:
            raise ConfigError("C102", f"{key} is given twice.", "keep one.")
        values[key] = _convert(key, value, defaults[key]) if key in defaults else value
    for key in required:
        if not values.get(key):
            raise ConfigError("C102", f"{key} is not given.", f"add {key}=PATH; --help lists every key.")
    return {**defaults, **values}


def _convert(key: str, value: str, default: Any) -> Any:
    if isinstance(default, bool):
        if value.lower() not in ("true", "false"):
            raise ConfigError("C102", f"{key}={value}: expected true or false.")
        return value.lower() == "true"
    if isinstance(default, int):
        if not re.fullmatch(r"[0-9]{1,9}", value) or int(value) < 1:
            raise ConfigError("C102", f"{key}={value}: expected an integer from 1.")
        return int(value)
    if default is None:  # a path
        return value
    return value.replace("\\n", "\n")  # so that a suffix with a line break can be typed in any shell


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
) -> list[dict[str, Any]]:
    """Ask every question about its image, greedily; one whose `text_only` is true is asked without.

    Args:
        suffix: appended to each question that does not already end in it.
        ablate: what to show instead of the image: none, blank, shuffle or noise; see `vlmpeft.eval.ablate`.
        contrast: two words; `margin` is then logit(first) - logit(second) at the first answer position.
        correct: scores (question, text), from 0 to 1, for the accuracy beside the progress bar.

    Returns:
        one row a question, in order: setting (if the question has one), question_id, image, prompt, text, margin.
        The text is stripped once and otherwise raw.

    Raises:
        DataError: D103 or D120 for an image, before the model is asked anything.
        NumericError: N301 if a margin is not finite.
    """
    from tqdm import tqdm

    from vlmpeft.decode import Request

    shown = iter(ablated(bundle, resolve_images(with_image(questions), images), ablate))
    pictures = [(next(shown),) if has_image(question) else () for question in questions]
    prompts = [q["text"] if q["text"].endswith(suffix) else q["text"] + suffix for q in questions]
    requests = [Request(images=p, prompt=prompt) for p, prompt in zip(pictures, prompts, strict=True)]
    with tqdm(total=len(requests), unit="question", disable=not progress, mininterval=1.0) as bar:
        answers = bundle.answer(
            requests,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            contrast=contrast,
            on_batch=_progress(bar, questions, correct),
        )
    return [_row(q, prompt, answer) for q, prompt, answer in zip(questions, prompts, answers, strict=True)]


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
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Returns: answer rows, metrics."""


def run(
    arguments: Mapping[str, Any],
    questions: Sequence[Row],
    evaluate: Evaluate,
    about: Mapping[str, str],
    correct: Callable[[Row, str], float] | None = None,
) -> dict[str, Any]:
    """Evaluate the model of a command line and write out/answers.jsonl and out/metrics.json.

    Images, output folder and the answers to compare with are checked before the model is loaded. Returns: the metrics,
    with `compare` if the arguments name a folder of that name; `correct` then judges (question, text).
    """
    check_ablation(arguments["ablate"])
    resolve_images(with_image(questions), arguments["images"])
    other = arguments.get("compare")
    if other:
        texts_of(other, questions)
    out = prepare_folder(arguments["out"])

    bundle = open_model(arguments["model"], arguments["device"])
    options = {key: arguments[key] for key in ("suffix", "batch_size", "max_new_tokens", "ablate")}
    answers, metrics = evaluate(bundle, questions, arguments["images"], **options)
    if correct and other:
        metrics = {**metrics, "compare": compare_files(questions, answers, other, correct)}
    write_rows(out / "answers.jsonl", answers)
    source = {key: arguments[key] for key in ("model", "questions", "images")}
    write_json(out / "metrics.json", {**about, **source, **options, **metrics})
    return metrics


def prepare_folder(out: str | Path) -> Path:
    """Create the output folder. Raises: ConfigError C111 if nothing can be written there."""
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("C111", f"out={out}: {error.strerror}.", "choose a folder that can be written.") from error
    if not os.access(folder, os.W_OK):
        raise ConfigError("C111", f"out={out} cannot be written.", "choose a folder that can be written.")
    return folder


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as aligned lines: the first column to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    padded = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    lines = ["  ".join([row[0].ljust(widths[0]), *cells[1:]]) for row, cells in zip(rows, padded, strict=True)]
    return "\n".join(lines)
