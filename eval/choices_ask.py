"""Ask a model multiple-choice items, pictures and all, and judge what it says."""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmpeft.eval.ablate import ablated
from vlmpeft.eval.choices import Item, Judge, Summary, Verdict, tally, verdicts_of
from vlmpeft.eval.runner import Answerer

if TYPE_CHECKING:
    from tqdm import tqdm

    from vlmpeft.decode import Answer, Request


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
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Ask a model every item, greedily, and judge it.

    Args:
        ablate: what to show instead of the images: none, blank, shuffle or noise; see `vlmpeft.eval.ablate`.

    Returns: rows in the order of the items (question_id, prompt, text as it came, parsed, by_chance, correct, answer);
    the metrics.
    """
    from tqdm import tqdm

    with (
        tempfile.TemporaryDirectory(prefix="vlmpeft-") as folder,
        tqdm(total=len(items), unit="question", disable=not progress, mininterval=1.0) as bar,
    ):
        answers = bundle.answer(
            _requests(bundle, items, ablate, Path(folder)),
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            on_batch=_progress(bar, items, judge),
        )
    texts = [answer.text.strip() for answer in answers]
    verdicts = verdicts_of(items, texts, judge)
    rows = [_row(item, text, verdict) for item, text, verdict in zip(items, texts, verdicts, strict=True)]
    return rows, summarise(items, verdicts)


def _progress(bar: tqdm[Any], items: Sequence[Item], judge: Judge) -> Callable[[Sequence[tuple[int, Answer]]], None]:
    """What to do after a batch: move the bar on, with the accuracy so far."""
    right = 0

    def on_batch(batch: Sequence[tuple[int, Answer]]) -> None:
        nonlocal right
        right += sum(judge(items[index], answer.text.strip()).correct for index, answer in batch)
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
