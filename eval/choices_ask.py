"""Ask a model multiple-choice items, pictures and all, and judge what it says."""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmpeft.errors import ConfigError, nearest
from vlmpeft.eval.ablate import ablated
from vlmpeft.eval.choices import Item, Judge, Summary, Verdict, judge_with, tally, verdicts_of
from vlmpeft.eval.method import candidates_of, logliks_of
from vlmpeft.eval.rows import Row
from vlmpeft.eval.runner import Answerer
from vlmpeft.eval.wrong_page import Wrong

if TYPE_CHECKING:
    from tqdm import tqdm

    from vlmpeft.decode import Answer, Request

CANDIDATES = ("letters", "texts")


def check_candidates(kind: str) -> None:
    """Raises: ConfigError C102 unless `kind` is one of CANDIDATES."""
    if kind not in CANDIDATES:
        raise ConfigError("C102", f"no candidates '{kind}'{nearest(kind, CANDIDATES)}")


def evaluate(
    bundle: Answerer,
    items: Sequence[Item],
    judge: Judge,
    *,
    batch_size: int = 16,
    max_new_tokens: int = 64,
    ablate: str = "none",
    progress: bool = True,
    summarise: Summary = tally,
    method: str = "generate",
    candidates: str = "letters",
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Ask a model every item, greedily, and judge it.

    Args:
        ablate: what to show instead of the images: none, blank, shuffle or noise; see `vlmpeft.eval.ablate`.
        method: see `method.candidates_of`; open items are generated whatever it is.
        candidates: of that, the options' `letters` or their `texts`; the answer is a letter either way.

    Returns: rows in the order of the items (question_id, prompt, text as it came, parsed, by_chance, correct, answer;
    by likelihood logliks); the metrics.
    """
    from tqdm import tqdm

    check_candidates(candidates)
    chosen = [candidates_of(method, _candidates(item, candidates)) for item in items]
    judge = judge if method == "generate" else _by_letter(judge)

    with (
        tempfile.TemporaryDirectory(prefix="vlmpeft-") as folder,
        tqdm(total=len(items), unit="question", disable=not progress, mininterval=1.0) as bar,
    ):
        requests = _requests(bundle, items, ablate, Path(folder))
        answers = bundle.answer(
            [replace(request, **more) for request, more in zip(requests, chosen, strict=True)],
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            on_batch=_progress(bar, items, judge, chosen),
        )
    said = [_said(item, answer, more) for item, answer, more in zip(items, answers, chosen, strict=True)]
    verdicts = verdicts_of(items, [text for text, _ in said], judge)
    rows = [
        {**_row(item, text, verdict), **logliks}
        for item, (text, logliks), verdict in zip(items, said, verdicts, strict=True)
    ]
    return rows, summarise(items, verdicts)


def _candidates(item: Item, kind: str) -> tuple[str, ...]:
    return tuple(item.options if kind == "letters" else item.options.values())


def _said(item: Item, answer: Answer, chosen: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The text of an answer, of a chosen one the option's letter; and the log-likelihood of each letter."""
    if not chosen:
        return answer.text.strip(), {}
    letters = list(item.options)
    return letters[chosen["candidates"].index(answer.text)], logliks_of(answer, letters, item.id)


def _by_letter(judge: Judge) -> Judge:
    """Options by the letter that was chosen, which no parser has to find; open items by `judge`."""
    choose = judge_with(lambda text, options: text if text in options else None)
    return lambda item, text: (choose if item.options else judge)(item, text)


def _progress(
    bar: tqdm[Any], items: Sequence[Item], judge: Judge, chosen: Sequence[Mapping[str, Any]]
) -> Callable[[Sequence[tuple[int, Answer]]], None]:
    """What to do after a batch: move the bar on, with the accuracy so far."""
    right = 0

    def on_batch(batch: Sequence[tuple[int, Answer]]) -> None:
        nonlocal right
        said = [(index, _said(items[index], answer, chosen[index])[0]) for index, answer in batch]
        right += sum(judge(items[index], text).correct for index, text in said)
        bar.set_postfix_str(f"accuracy {right / (bar.n + len(batch)):.3f}", refresh=False)
        bar.update(len(batch))

    return on_batch


def _requests(bundle: Answerer, items: Sequence[Item], ablate: str, folder: Path) -> list[Request]:
    """Requests whose pictures are files, so that they are opened, checked and turned upright as all others are."""
    from vlmpeft.decode import Request

    files: dict[bytes, Path] = {}
    images = [[_file(image, files, folder, item.id) for image in item.images] for item in items]
    shown = iter(ablated(bundle, [path for paths in images for path in paths], ablate))
    pictures = [tuple(next(shown) for _ in paths) for paths in images]
    return [Request(images=p, prompt=item.prompt) for p, item in zip(pictures, items, strict=True)]


def _file(image: Path | bytes, files: dict[bytes, Path], folder: Path, item_id: str) -> Path:
    """The file of an image; equal bytes share one, so that questions about one picture also share its features."""
    if isinstance(image, Path):
        return image
    digest = hashlib.sha256(image).digest()
    if digest not in files:
        files[digest] = folder / f"{len(files):06d}-{re.sub(r'[^0-9A-Za-z_-]', '_', item_id)[:80]}"
        files[digest].write_bytes(image)
    return files[digest]


def _row(item: Item, text: str, verdict: Verdict) -> dict[str, Any]:
    judged = {"parsed": verdict.parsed, "by_chance": verdict.by_chance, "correct": verdict.correct}
    if item.answer is None:
        del judged["correct"]
    return {"question_id": item.id, "prompt": item.prompt, "text": text, **judged, "answer": item.answer}


def facts(item: Item) -> list[Any]:
    """What an item is, as JSON; of images that are files the name alone."""
    images = [i.name if isinstance(i, Path) else hashlib.sha256(i).hexdigest() for i in item.images]
    return [item.id, dict(item.options), item.answer, item.prompt, images]


def wrong_of(items: Sequence[Item], answers: Sequence[Row]) -> list[Wrong]:
    """The items that were answered wrong; none where the right answers are hidden."""
    pairs = zip(items, answers, strict=True)
    return [_wrong(item, answer) for item, answer in pairs if answer.get("correct") is False]


def _wrong(item: Item, answer: Row) -> Wrong:
    right = [item.answer] if isinstance(item.answer, str) else item.answer or ()
    expected = ", ".join(f"{a}. {item.options[a]}" if a in item.options else str(a) for a in right)
    parsed = "nothing, so by chance" if answer["by_chance"] else str(answer["parsed"] or "nothing")
    kind = next(iter(item.groups.values()), "")
    return Wrong(item.id, item.prompt, expected, answer["text"], parsed, item.images, kind)
