"""Samples in Arrow files: nothing lost on the way, read where they lie, several files as one."""

from __future__ import annotations

import pickle
import random
from array import array
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from vlmpeft.batch import IGNORE, IMAGE_TOKEN_ID
from vlmpeft.errors import DataError
from vlmpeft.mixture import Mixture, split_held_out, supervised_share
from vlmpeft.sample_store import ROWS, Sample, SampleStore, SampleWriter, packed, unpacked
from vlmpeft.sampling import epoch_batches


def sample(seed: int, images: int | None = None) -> Sample:
    """Random runs of text, answers and images in up to three turns."""
    rng = random.Random(seed)
    ids, labels, turns = array("i"), array("i"), array("i")
    for _ in range(rng.randint(1, 8)):
        length, kind, turn = rng.randint(1, 9), rng.choice("tai"), rng.randint(0, 2)
        text = [IMAGE_TOKEN_ID if kind == "i" else rng.randint(0, 300_000) for _ in range(length)]
        ids.extend(text)
        labels.extend(text if kind == "a" else [IGNORE] * length)
        turns.extend([turn] * length)
    count = rng.randint(0, 3) if images is None else images
    return Sample(f"s{seed}", ids, labels, turns, tuple(Path(f"/i/{rng.randint(0, 5)}.png") for _ in range(count)))


def store(directory: Path, samples: list[Sample], **faults: DataError) -> SampleStore:
    directory.mkdir()
    writer = SampleWriter(directory)
    for item in samples:
        writer.add(packed(item))
    writer.close((), (), {int(k[1:]): e for k, e in faults.items()})
    return SampleStore(directory)


def test_packing_loses_nothing() -> None:
    for seed in range(200):
        one = sample(seed)
        text, runs = packed(one).ids, packed(one).runs
        assert unpacked(text, runs) == (one.input_ids, one.labels, one.turns)
        assert len(text) == sum(i != IMAGE_TOKEN_ID for i in one.input_ids)


def test_store_gives_back_every_sample_and_its_counts(tmp_path: Path) -> None:
    samples = [sample(i) for i in range(ROWS + 7)]
    samples.append(Sample("\ud800\n", array("i", [1]), array("i", [1]), array("i", [0]), (Path("/i/\udcff.png"),)))
    found = store(tmp_path / "a", samples)
    assert list(found) == samples
    assert found[-1] == samples[-1]
    assert found.lengths.tolist() == [len(s.input_ids) for s in samples]
    assert found.pictures.tolist() == [len(s.images) for s in samples]
    assert found.supervised.tolist() == [sum(x != IGNORE for x in s.labels) for s in samples]
    assert set(found.images()) == {path for s in samples for path in s.images}
    assert len(list(found.images())) == len(set(found.images()))


def test_store_is_a_file_of_hugging_face_datasets(tmp_path: Path) -> None:
    found = store(tmp_path / "a", [sample(i) for i in range(5)])
    opened = Dataset.from_file(str(tmp_path / "a" / "samples.arrow"))
    assert opened[:]["length"] == found.lengths.tolist()
    assert [bytes(uid).decode() for uid in opened[:]["uid"]] == [s.uid for s in found]


def test_nothing_but_the_place_goes_to_another_process(tmp_path: Path) -> None:
    found = store(tmp_path / "a", [sample(i) for i in range(300)])
    assert len(pickle.dumps(found)) < 300
    assert list(pickle.loads(pickle.dumps(found))) == list(found)
    some = Mixture([found], [2.0]).take([3, 5])
    other = pickle.loads(pickle.dumps(some))
    assert (list(other), other.shares) == (list(some), some.shares)


def test_fault_and_empty_store_come_back(tmp_path: Path) -> None:
    found = store(tmp_path / "a", [], _3=DataError("D104", "bad\ud800", "mend"))
    assert (len(found), list(found), list(found.images())) == (0, [], [])
    assert {i: (e.code, e.message, e.fix) for i, e in found.faults().items()} == {3: ("D104", "bad\ud800", "mend")}


@pytest.fixture
def mixed(tmp_path: Path) -> Mixture:
    stores = [store(tmp_path / str(i), [sample(100 * i + j) for j in range(n)]) for i, n in enumerate((5, 7, 28))]
    return Mixture(stores, [1.0, 0.5, 2.0])


def test_mixture_is_its_files_one_after_the_other(mixed: Mixture) -> None:
    whole = [s for store in mixed.stores for s in store]
    assert list(mixed) == whole
    assert list(mixed.lengths) == [len(s.input_ids) for s in whole]
    assert list(mixed.pictures) == [len(s.images) for s in whole]
    assert mixed[-1] == whole[-1]
    with pytest.raises(IndexError):
        mixed[40]
    some = mixed[3:30:2]
    assert list(some) == whole[3:30:2]
    assert [(n, w) for n, w in some.shares] == [(1, 1.0), (4, 0.5), (9, 2.0)]
    assert supervised_share(some) == (
        sum(x != IGNORE for s in some for x in s.labels), sum(len(s.labels) for s in some)
    )  # fmt: skip


def test_held_out_samples_are_a_fixed_choice_of_the_seed(mixed: Mixture) -> None:
    def uids(samples: Mixture) -> list[str]:
        return [s.uid for s in samples]

    train, held = split_held_out(mixed, 0.25, seed=3)
    assert (len(train), len(held)) == (30, 10)
    assert sorted(uids(train) + uids(held)) == sorted(uids(mixed))
    assert uids(train) == [uid for uid in uids(mixed) if uid in uids(train)]
    assert sum(n for n, _ in train.shares) == 30
    assert [uids(part) for part in split_held_out(mixed, 0.25, seed=3)] == [uids(train), uids(held)]
    assert uids(split_held_out(mixed, 0.25, seed=4)[1]) != uids(held)
    assert [len(part) for part in split_held_out(mixed[:2], 0.01, seed=0)] == [1, 1]
    assert [len(part) for part in split_held_out(mixed, 0.0, seed=0)] == [40, 0]


def test_grouping_reads_no_sample(mixed: Mixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SampleStore, "__getitem__", lambda *_: pytest.fail("a sample was read"))
    steps = epoch_batches(mixed, 4, "modality", 0, 0)
    seen = np.bincount([i for step in steps for i in step], minlength=40)
    assert seen[:5].tolist() == [1] * 5
    assert seen[12:].tolist() == [2] * 28
    assert seen[5:12].sum() == 4
