"""Local tasks for lmms-eval: YAML files over parquet files of a few drawn pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

SHAPES = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220)}
UTILS = """
from lmms_eval.tasks.pope.utils import *
from lmms_eval.tasks.mmmu.utils import *


def picture(doc):
    return [doc["image"].convert("RGB")]


def pictures(doc):
    return [doc["image"].convert("RGB"), doc["second"].convert("RGB")]


def keep(doc, results):
    return {"kept": 1.0}
"""
HEAD = """
task: {task}
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: "{file}"}}, cache_dir: "{cache}"}}
test_split: test
"""
GENERATE = (
    HEAD
    + """
output_type: generate_until
doc_to_visual: !function utils.{visual}
doc_to_text: "{text}"
doc_to_target: answer
generation_kwargs: {settings}
process_results: !function utils.keep
metric_list: [{{metric: kept, aggregation: mean, higher_is_better: true}}]
"""
)
CHOICE = (
    HEAD
    + """
output_type: multiple_choice
doc_to_visual: !function utils.picture
doc_to_text: "{text}"
doc_to_target: gold
doc_to_choice: ["red", "green", "a blue image"]
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
)


def rows(count: int = 6) -> list[dict[str, Any]]:
    """Two questions a picture."""
    made = []
    for i in range(count):
        colours = list(SHAPES)
        first, second = (Image.new("RGB", (40, 30), SHAPES[colours[(i // 2 + k) % 3]]) for k in (0, 1))
        question = ("Is there a red square in the image?", "What is shown?")[i % 2]
        answer = ("yes", "no")[i % 2]
        row = {"question_id": i, "question": question, "answer": answer, "gold": i % 3, "category": "random"}
        made.append({**row, "image": first, "second": second})
    return made


def write_tasks(folder: Path, **settings: str) -> Path:
    """The folder with the tasks `one` (a picture), `two` (two, marked in the text) and `choice`.

    Args: settings: of generation, by task, as YAML.
    """
    import datasets

    kept = rows()
    table = datasets.Dataset.from_dict({key: [row[key] for row in kept] for key in kept[0]})
    table.to_parquet(folder / "data.parquet")
    (folder / "utils.py").write_text(UTILS)
    common = {"file": folder / "data.parquet", "cache": folder / "cache"}
    plain = "{max_new_tokens: 6, do_sample: false, temperature: 0, top_p: 1.0, num_beams: 1}"
    one = GENERATE.format(
        task="one", visual="picture", text="{{question}}", settings=settings.get("one", plain), **common
    )
    two = GENERATE.format(
        task="two", visual="pictures", text="<image> or <image>: {{question}}",
        settings=settings.get("two", plain), **common,
    )  # fmt: skip
    (folder / "one.yaml").write_text(one)
    (folder / "two.yaml").write_text(two)
    (folder / "choice.yaml").write_text(CHOICE.format(task="choice", text="{{question}}", **common))
    return folder
