"""How long a start waits for its data: the first time, when records are checked and encoded, and the second.

python tests/bench/data_start.py [records=665000] [images=1000] [folder=DIR]
Synthetic LLaVA records of one to four turns are written to a scratch folder; each start is a process of its own, and
its peak of memory is that above what the imported libraries take.
"""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

WORDS = [
    *("a", "the", "red", "green", "dog", "sits", "on", "near", "under", "table", "what", "how", "many", "because"),
    *("is", "in", "this", "picture", "people", "are", "there"),
]


def write_records(path: Path, count: int, images: int) -> None:
    """A LLaVA list of `count` records about flat pictures beside it."""
    folder = path.parent / "images"
    folder.mkdir()
    for i in range(images):
        Image.new("RGB", (336, 336), (i % 255, 0, 0)).save(folder / f"{i}.jpg")
    rng = random.Random(0)

    def text(length: int) -> str:
        return " ".join(rng.choices(WORDS, k=length))

    with path.open("w") as file:
        for i in range(count):
            turns = [(text(12), text(rng.randint(4, 90))) for _ in range(rng.randint(1, 4))]
            turns[0] = ("<image>\n" + turns[0][0], turns[0][1])
            rows = [{"from": who, "value": t} for q, a in turns for who, t in (("human", q), ("gpt", a))]
            record = {"id": str(i), "image": f"{rng.randrange(images)}.jpg", "conversations": rows}
            file.write(("[" if i == 0 else ",\n") + json.dumps(record))
        file.write("]")


def start(path: Path) -> None:
    """Prepare the file and plan an epoch; print seconds and memory."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from conftest import make_tokenizer

    from vlmpeft.data_config import DataConfig, DataFile
    from vlmpeft.prepare import prepare
    from vlmpeft.record_encoder import Preparation
    from vlmpeft.sampling import epoch_batches
    from vlmpeft.template import TurnEncoder

    how = Preparation(DataConfig(images=str(path.parent / "images")), TurnEncoder(make_tokenizer(), "vicuna_v1", 576))
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    worked = time.process_time()
    found = prepare([DataFile(str(path))], how)
    ready, busy = time.perf_counter() - began, time.process_time() - worked
    steps = epoch_batches(found.samples, 128, "modality", 0, 0)
    planned = time.perf_counter() - began - ready
    for i in steps[0]:
        found.samples[i]
    read = (time.perf_counter() - began - ready - planned) / len(steps[0])
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(
        f"ready {ready:.1f} s ({busy:.1f} s of CPU), epoch of {len(steps):,} steps planned in {planned:.1f} s, "
        f"{read * 1e6:.0f} us a sample, peak +{peak:.0f} MiB",
        flush=True,
    )


def main(records: int, images: int, folder: str) -> None:
    """Write the records, then start twice."""
    with tempfile.TemporaryDirectory(dir=folder or None) as directory:
        path = Path(directory) / "train.json"
        write_records(path, records, images)
        print(f"{records:,} records, {path.stat().st_size / 2**20:.0f} MiB of JSON", flush=True)
        environment = {**os.environ, "VLMPEFT_CACHE": f"{directory}/cache", "TQDM_DISABLE": "1"}
        for name in ("first", "second"):
            print(f"{name} start: ", end="", flush=True)
            subprocess.run([sys.executable, __file__, f"start={path}"], env=environment, check=True)
        size = sum(p.stat().st_size for p in Path(directory, "cache").rglob("*") if p.is_file())
        print(f"cache {size / 2**20:.0f} MiB")


if __name__ == "__main__":
    options = dict(argument.split("=", 1) for argument in sys.argv[1:])
    if "start" in options:
        start(Path(options["start"]))
    else:
        main(int(options.get("records", 665_000)), int(options.get("images", 1000)), options.get("folder", ""))
