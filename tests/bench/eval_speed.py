"""Questions a second on POPE-like data, six questions a picture and file: our runner against asking one by one.

python tests/bench/eval_speed.py [pictures=2] [files=3] [new_tokens=2] [batch_size=16] [repeats=3] [device=cpu]
POPE comes as three files, whose questions about what is in a picture are the same and whose others differ; files=1 is
one of them.
Three sides, alternating in one process on the quickstart's real parts (SmolLM2-135M, EfficientNet-Lite0, an untrained
projector): `eval.pope`; the same model's embeddings through transformers' `generate`, a question at a time; and
lmms-eval's own loop at batch size 1 (`make install-dev` installs it). A trained model answers POPE with two tokens, the
word and its end. The figures are ratios of medians. On a CPU the process's own time is taken (with OMP_NUM_THREADS=1
that of a machine with nothing else to do), so that other programs do not count.
"""

from __future__ import annotations

import gc
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vlmpeft.build import Bundle, build
from vlmpeft.config import load_recipe
from vlmpeft.decode import Request, exchange_of, generate_each, stop_tokens
from vlmpeft.eval import pope
from vlmpeft.images import ImageReader

OBJECTS = ("dog", "person", "dining table", "car", "traffic light", "chair", "bicycle", "handbag", "bottle", "cup")
OBJECTS += ("fork", "bus")
Rows = list[dict[str, Any]]
Clock = Callable[[], float]


def write_questions(folder: Path, pictures: int, files: int) -> Rows:
    """Pictures of COCO's size, and six questions about each in each of POPE's files."""
    rng, rows = random.Random(0), []
    for i in range(pictures):
        Image.frombytes("RGB", (16, 12), rng.randbytes(576)).resize((640, 480)).save(folder / f"{i}.jpg")
        names = rng.sample(OBJECTS, 12)
        for setting in range(files):
            for n in range(6):
                name = names[n // 2] if n % 2 == 0 else names[3 + 3 * setting + n // 2]
                row = {"question_id": len(rows), "setting": f"file {setting}", "image": f"{i}.jpg"}
                rows.append({**row, "text": f"Is there a {name} in the image?", "label": ("yes", "no")[n % 2]})
    return rows


def one_by_one(bundle: Bundle, rows: Rows, folder: Path, new_tokens: int) -> list[str]:
    """transformers' `generate`, a question at a time."""
    encoder, read, texts = bundle.turn_encoder(), ImageReader(bundle.image_transform), []
    stops = stop_tokens(encoder)
    for row in rows:
        request = Request((folder / row["image"],), row["text"] + pope.SUFFIX)
        with torch.no_grad():
            encoding = encoder.encode([exchange_of(request)])
            tokens, _ = generate_each(bundle.model, [encoding], list(read(request.images[0])), new_tokens, stops)
        texts.append(said(bundle.tokenizer, tokens[0].tolist(), stops))
    return texts


def said(tokenizer: Any, tokens: list[int], stops: list[int]) -> str:
    """The text before the first stop."""
    end = next((i for i, token in enumerate(tokens) if token in stops), len(tokens))
    text: str = tokenizer.decode(tokens[:end], skip_special_tokens=True)
    return text.strip()


def ours(bundle: Bundle, rows: Rows, folder: Path, new_tokens: int, batch_size: int) -> list[str]:
    """`eval.pope`, margins and scores included."""
    answers, _ = pope.evaluate(
        bundle, rows, folder, batch_size=batch_size, max_new_tokens=new_tokens, progress=False
    )  # fmt: skip
    return [answer["text"] for answer in answers]


class Loop:
    """lmms-eval over the same questions: POPE's own task on a local file."""

    def __init__(self, bundle: Bundle, rows: Rows, folder: Path, new_tokens: int, clock: Clock) -> None:
        import datasets
        from lmms_eval.tasks import TaskManager

        from vlmpeft.eval import harness

        table = [{**r, "question": r["text"], "answer": r["label"], "image": str(folder / r["image"])} for r in rows]
        data = datasets.Dataset.from_list(table).cast_column("image", datasets.Image())
        data.to_parquet(folder / "data.parquet")
        (folder / "utils.py").write_text("from lmms_eval.tasks.pope.utils import *\n")
        (folder / "local.yaml").write_text(
            f"task: local\ndataset_path: parquet\ntest_split: test\noutput_type: generate_until\n"
            f"dataset_kwargs: {{data_files: {{test: {folder / 'data.parquet'}}}, cache_dir: {folder / 'cache'}}}\n"
            f"doc_to_visual: !function utils.pope_doc_to_visual\ndoc_to_text: !function utils.pope_doc_to_text\n"
            f"doc_to_target: answer\ngeneration_kwargs: {{max_new_tokens: {new_tokens}, do_sample: false}}\n"
            f"process_results: !function utils.pope_process_results\n"
            f"metric_list: [{{metric: pope_accuracy, aggregation: !function utils.pope_aggregate_accuracy}}]\n"
            f'lmms_eval_specific_kwargs: {{default: {{post_prompt: "\\n{pope.SUFFIX.strip()}"}}}}\n'
        )
        self.tasks = TaskManager(include_path=str(folder), include_defaults=False, verbosity="ERROR")
        harness.open_model = lambda name, device: bundle
        self.model: Any = harness.Vlmpeft("in memory", batch_size=1)
        self.answer, self.model.generate_until = self.model.generate_until, self._timed
        self.clock, self.seconds = clock, 0.0

    def _timed(self, requests: Any) -> Any:
        start = self.clock()
        found = self.answer(requests)
        self.seconds = self.clock() - start
        return found

    def run(self) -> list[str]:
        """The texts; `seconds` is what asking took, without what lmms-eval does before and after."""
        from lmms_eval.evaluator import simple_evaluate

        found: Any = simple_evaluate(
            self.model, tasks=["local"], batch_size=1, task_manager=self.tasks, bootstrap_iters=0
        )
        return [sample["resps"][0][0] for sample in found["samples"]["local"]]


def timed(side: Callable[[], list[str]], clock: Clock) -> tuple[float, list[str]]:
    """Seconds and texts."""
    start = clock()
    texts = side()
    return clock() - start, texts


def main(
    pictures: int = 2,
    files: int = 3,
    new_tokens: int = 2,
    batch_size: int = 16,
    repeats: int = 3,
    device: str = "cpu",
) -> None:
    """Print questions a second of each side, and the ratios."""
    bundle = build(load_recipe("quickstart", [f"run.device={device}"]))
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        rows = write_questions(folder, pictures, files)
        clock = time.process_time if device == "cpu" else time.perf_counter
        loop = Loop(bundle, rows, folder, new_tokens, clock)
        gc.collect()
        gc.freeze()  # or the collector walks over the libraries on whichever side it happens to run
        times: dict[str, list[float]] = {"ours": [], "one by one": [], "lmms-eval": []}
        for repeat in range(repeats + 1):
            seconds, texts = timed(lambda: ours(bundle, rows, folder, new_tokens, batch_size), clock)
            plain_seconds, plain_texts = timed(lambda: one_by_one(bundle, rows, folder, new_tokens), clock)
            loop_texts = loop.run()
            same = sum(a == b == c for a, b, c in zip(texts, plain_texts, loop_texts, strict=True))
            if repeat:  # the first round warms up
                for name, value in zip(times, (seconds, plain_seconds, loop.seconds), strict=True):
                    times[name].append(value)
    medians = {name: statistics.median(values) for name, values in times.items()}
    asked = f"{len(rows)} questions about {pictures} pictures, {new_tokens} new tokens"
    print(f"{asked}, {bundle.model.language.dtype}, {same} answers alike")
    for name, median in medians.items():
        print(f"{name}: {len(rows) / median:.1f} questions/s; ours is {median / medians['ours']:.2f} times as fast")


if __name__ == "__main__":
    options = dict(argument.split("=", 1) for argument in sys.argv[1:])
    main(**{key: value if key == "device" else int(value) for key, value in options.items()})
