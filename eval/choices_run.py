"""The command line that the multiple-choice benchmarks share: ask a model about items, or score given answers."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmpeft.errors import ConfigError, EvalError, nearest
from vlmpeft.eval.ablate import ablated, check_ablation
from vlmpeft.eval.choices import (
    Item,
    Judge,
    Predictions,
    Verdict,
    answer_rows,
    keyed,
    refuse_repeated,
    score_items,
    tally,
    verdicts_of,
)
from vlmpeft.eval.compare import compare_files, texts_of
from vlmpeft.eval.model import open_model
from vlmpeft.eval.rows import read_rows, write_json, write_rows
from vlmpeft.eval.runner import Answerer, parse_arguments, prepare_folder, table

if TYPE_CHECKING:
    from tqdm import tqdm

    from vlmpeft.decode import Answer, Request

ASKING = {"batch_size": 16, "ablate": "none", "max_new_tokens": 64, "device": "auto"}
OPTIONAL = {"compare": None}
Summary = Callable[[Sequence[Item], Sequence[Verdict]], dict[str, Any]]


@dataclass(frozen=True)
class ChoiceBenchmark:
    """What a benchmark adds to the shared command line.

    Args:
        doc: printed by `--help`.
        read: the items; the second argument says whether a model will be asked, so that their images are needed.
        judges: by the name of their parser; the first is the default.
        options: further keys with their defaults.
    """

    name: str
    doc: str
    read: Callable[[Mapping[str, Any], bool], list[Item]]
    judges: Mapping[str, Judge]
    options: Mapping[str, Any] = field(default_factory=dict)
    required: tuple[str, ...] = ("data",)
    summarise: Summary = tally

    @property
    def defaults(self) -> dict[str, Any]:
        return {"parser": next(iter(self.judges)), **self.options}

    def judge(self, parser: str) -> Judge:
        """Raises: ConfigError C102 for an unknown parser."""
        if parser not in self.judges:
            raise ConfigError("C102", f"parser={parser}: no such parser{nearest(parser, self.judges)}")
        return self.judges[parser]


def command(argv: Sequence[str], benchmark: ChoiceBenchmark) -> None:
    """Score given answers (answers=FILE), or ask a model and score it."""
    given = any(argument.startswith("answers=") for argument in argv)
    (_score_files if given else _run_model)(argv, benchmark)


def _score_files(argv: Sequence[str], benchmark: ChoiceBenchmark) -> None:
    """With answers=FILE: scores as JSON on stdout; imports no torch."""
    known = {**benchmark.defaults, **OPTIONAL}
    arguments = parse_arguments(argv, known, (*benchmark.required, "answers"), benchmark.doc)
    judge, items = benchmark.judge(arguments["parser"]), benchmark.read(arguments, False)
    answers = answer_rows(read_answers(arguments["answers"]))
    metrics = score_items(items, answers, judge, benchmark.summarise)
    about = {"benchmark": benchmark.name, **{key: arguments[key] for key in benchmark.defaults}}
    print(json.dumps({**about, **metrics, **_compared(items, answers, arguments, judge)}, ensure_ascii=False, indent=2))


def _run_model(argv: Sequence[str], benchmark: ChoiceBenchmark) -> None:
    """With model=DIR: writes answers.jsonl and metrics.json into out, prints a table."""
    needed = ("model", *benchmark.required, "out")
    arguments = parse_arguments(argv, {**benchmark.defaults, **ASKING, **OPTIONAL}, needed, benchmark.doc)
    check_ablation(arguments["ablate"])
    judge, items = benchmark.judge(arguments["parser"]), benchmark.read(arguments, True)
    refuse_repeated(items)
    if arguments["compare"]:
        texts_of(arguments["compare"], keyed(items))
    out = prepare_folder(arguments["out"])

    bundle = open_model(arguments["model"], arguments["device"])
    asking = {key: arguments[key] for key in ("batch_size", "max_new_tokens", "ablate")}
    answers, metrics = evaluate(bundle, items, judge, summarise=benchmark.summarise, **asking)
    metrics |= _compared(items, answers, arguments, judge)
    write_rows(out / "answers.jsonl", answers)
    source = {key: arguments[key] for key in ("model", *benchmark.required)}
    about = {"benchmark": benchmark.name, **source, **{key: arguments[key] for key in benchmark.defaults}, **asking}
    write_json(out / "metrics.json", {**about, **metrics})
    print(summary_table(metrics))


def _compared(
    items: Sequence[Item], answers: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any], judge: Judge
) -> dict[str, Any]:
    """`compare`: the paired test against the run that compare= names, if it does."""
    if not arguments["compare"]:
        return {}
    by_id = {item.id: item for item in items}

    def correct(row: Mapping[str, Any], text: str) -> bool:
        return judge(by_id[row["question_id"]], text).correct

    return {"compare": compare_files(keyed(items), answers, arguments["compare"], correct)}


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


def read_answers(path: str | Path) -> Predictions:
    """Answers of a file: JSON lines, one JSON list of rows, or one JSON object {id: text}.

    Raises: ConfigError C102 if there is no such file; EvalError V601 for an id twice in an object, V602 for bad JSON.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"), object_pairs_hook=_once)
    except (OSError, ValueError, RecursionError):
        return read_rows(path)  # JSON lines, or it says what is wrong with the file
    if isinstance(content, dict) and not {"question_id", "id"} & content.keys():
        return content
    rows = content if isinstance(content, list) else [content]
    if not all(isinstance(row, dict) for row in rows):
        raise EvalError("V602", f"{path}: expected a list of objects.", "write one object an answer.")
    return rows


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        raise EvalError("V601", f"{len(twice)} repeated answers: {', '.join(twice[:20])}.", "keep one of each.")
    return found


def summary_table(metrics: Mapping[str, Any]) -> str:
    """Groups and the whole as aligned lines; of hidden answers the counts."""
    if "accuracy" not in metrics:
        return f"{metrics['n']} answers, {metrics['unparsable']} unparsable; the right answers are hidden"
    kinds = {kind: found for kind, found in metrics.items() if isinstance(found, dict) and kind != "compare"}
    groups = [(f"{kind}: {name}", m) for kind, found in kinds.items() for name, m in found.items()]
    rows = [["group", "n", "correct", "accuracy"]]
    rows += [[name, str(m["n"]), str(m["correct"]), f"{m['accuracy']:.4f}"] for name, m in [*groups, ("all", metrics)]]
    return table(rows) + f"\n{metrics['unparsable']} unparsable, {metrics['by_chance']} decided by chance"
