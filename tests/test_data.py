"""From a file to batches: truncation, the check before training with its accounting, loading."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_records import BAD, record, turns, write_folder
from conftest import write_images

from vlmpeft.batch import IGNORE, IMAGE_TOKEN_ID
from vlmpeft.data import Prepared, Sample, Samples, load_batches, prepare, split_held_out, supervised_share, truncated
from vlmpeft.errors import DataError
from vlmpeft.layouts import Segment
from vlmpeft.recipe import DataConfig
from vlmpeft.template import IMAGE, Encoding, Exchange, TurnEncoder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path)


@pytest.fixture
def encoder(tokenizer: Any) -> TurnEncoder:
    return TurnEncoder(tokenizer, "chatml", 4)


def prepared(tmp_path: Path, records: list[Any], encoder: TurnEncoder, **options: Any) -> Prepared:
    path = tmp_path / "train.json"
    path.write_text(json.dumps(records))
    config = DataConfig(images=str(tmp_path / "images"), **options)
    return prepare(path, config, encoder, independent=False, report=tmp_path / "bad.jsonl")


def two_images(encoder: TurnEncoder, k: int) -> tuple[Encoding, int]:
    """A conversation with an image in both questions, and the length at which k answer tokens of the first are left."""
    encoding = encoder.encode([Exchange((IMAGE, "\nask"), "A photo of a square."), Exchange((IMAGE, "\nask"), "Yes")])
    return encoding, next(i for i, x in enumerate(encoding.labels) if x != IGNORE) + k


@pytest.mark.parametrize("k", [1, 2, 3])
def test_truncation_keeps_exactly_the_answer_tokens_that_fit(k: int, encoder: TurnEncoder) -> None:
    encoding, length = two_images(encoder, k)
    cut, images = truncated(encoding, [Path("a"), Path("b")], length, 4, "right")
    assert (len(cut.input_ids), cut.num_supervised, images) == (length, k, (Path("a"),))
    assert cut.input_ids == encoding.input_ids[:length]


def test_no_length_cuts_an_image_or_leaves_a_sample_without_answer(encoder: TurnEncoder) -> None:
    encoding, first = two_images(encoder, 1)
    for length in range(1, len(encoding.input_ids) + 2):
        if length < first:
            with pytest.raises(DataError, match=r"D109.*images take 8"):
                truncated(encoding, [Path("a"), Path("b")], length, 4, "right")
            continue
        cut, images = truncated(encoding, [Path("a"), Path("b")], length, 4, "right")
        assert len(cut.input_ids) <= length
        assert cut.input_ids.count(IMAGE_TOKEN_ID) == 4 * len(images)
        assert cut.num_supervised >= 1
        assert len(cut.input_ids) == len(cut.labels) == len(cut.turns)


def test_sample_of_exactly_the_limit_is_whole_and_other_policies_do_not_cut(encoder: TurnEncoder) -> None:
    encoding, _ = two_images(encoder, 1)
    size = len(encoding.input_ids)
    for policy in ("right", "skip", "error"):
        assert truncated(encoding, [Path("a")], size, 4, policy)[0] == encoding
    for policy in ("skip", "error"):
        with pytest.raises(DataError, match=f"needs {size} tokens, data.max_length is {size - 1}"):
            truncated(encoding, [Path("a")], size - 1, 4, policy)


EXTRA = {  # what only shows when a record is encoded
    "lone surrogate in a question": ("D111", record("<image>\nab\ud800")),
    "lone surrogate in an answer": ("D111", record(answer="ab\udfff")),
    "longer than max_length": ("D109", record("<image>\n" + "ask " * 400)),
}


def good(count: int) -> list[Any]:
    kinds = [
        record(image="a.png"),
        record("<image> and <image>?", image=["a.png", "sub/d.png"]),
        record("What?", image=None),
        turns(("human", "a</s>"), ("gpt", "<image> 😀"), ("user", "c\r\n"), ("assistant", "7")),
        {**record(), "id": None, "extra": {"kept": 1}},
    ]
    return [kinds[i % len(kinds)] for i in range(count)]


def mixed() -> tuple[list[Any], dict[int, str]]:
    """100 good records with every kind of bad one between them. Returns: records, code of each bad index."""
    bad, records, codes = list((BAD | EXTRA).values()), [], {}
    for i, value in enumerate(good(100)):
        if i % 2 == 0 and i // 2 < len(bad):
            codes[len(records)], row = bad[i // 2]
            records.append(row)
        records.append(value)
    assert len(codes) == len(bad)
    return records, codes


def test_every_bad_record_is_reported_and_no_good_one(folder: Path, tmp_path: Path, encoder: TurnEncoder) -> None:
    records, codes = mixed()
    with pytest.raises(DataError, match="D100") as caught:
        prepared(tmp_path, records, encoder, max_length=256)
    assert f"{len(codes)} of {len(records)} records are bad" in caught.value.message
    assert "data.on_bad_sample=skip" in caught.value.fix
    assert caught.value.line().isprintable()
    rows = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert {row["record"]: row["code"] for row in rows} == codes
    assert all(f"record {row['record']} id=" in row["message"] for row in rows)


def test_skipping_leaves_every_record_either_used_or_skipped(
    folder: Path, tmp_path: Path, encoder: TurnEncoder
) -> None:
    records, codes = mixed()
    share = len(codes) / len(records)
    found = prepared(tmp_path, records, encoder, max_length=256, on_bad_sample="skip", max_bad_fraction=share)
    assert (len(found.samples), len(found.skipped), found.records) == (100, len(codes), len(records))
    assert all(s.labels.count(IGNORE) < len(s.labels) for s in found.samples)
    with pytest.raises(DataError, match=r"more than data\.max_bad_fraction=") as caught:
        prepared(tmp_path, records, encoder, max_length=256, on_bad_sample="skip", max_bad_fraction=share - 0.001)
    assert caught.value.code == "D100"


def test_clean_file_leaves_no_report_and_a_single_bad_record_is_the_error(
    folder: Path, tmp_path: Path, encoder: TurnEncoder
) -> None:
    assert prepared(tmp_path, good(20), encoder).skipped == []
    assert not (tmp_path / "bad.jsonl").exists()
    with pytest.raises(DataError) as caught:
        prepared(tmp_path, [*good(3), record(answer="")], encoder)
    assert caught.value.code == "D110"
    assert 'record 3 id="x"' in caught.value.message


def test_too_long_records_may_be_left_out_and_are_counted(folder: Path, tmp_path: Path, encoder: TurnEncoder) -> None:
    records = [*good(5), EXTRA["longer than max_length"][1]]
    found = prepared(tmp_path, records, encoder, max_length=256, truncate="skip")
    assert (len(found.samples), [e.code for e in found.skipped]) == (5, ["D109"])
    assert json.loads((tmp_path / "bad.jsonl").read_text())["record"] == 5
    with pytest.raises(DataError, match=r"D112.*0 of 5 are bad, 5 longer") as caught:
        prepared(tmp_path, good(5), encoder, max_length=16, truncate="skip")
    assert caught.value.code == "D112"


def test_template_that_supervises_nothing_or_hides_an_image_is_refused(
    folder: Path, tmp_path: Path, encoder: TurnEncoder
) -> None:
    class Without:
        def __init__(self, kind: str) -> None:
            self.kind = kind

        def segments(self, exchanges: Any, system: Any) -> list[Segment]:
            rows = [Segment("image"), Segment("text", "q"), Segment("answer", "a")]
            return [s for s in rows if s.kind != self.kind]

    for kind, code in (("answer", "D110"), ("image", "D107")):
        encoder.template = Without(kind)
        with pytest.raises(DataError, match=code):
            prepared(tmp_path, [record()], encoder)


def test_fingerprint_changes_with_text_image_order_and_what_was_skipped(
    folder: Path, tmp_path: Path, encoder: TurnEncoder
) -> None:
    def key(*records: Any) -> str:
        options = {"on_bad_sample": "skip", "max_bad_fraction": 1.0}
        return prepared(tmp_path, list(records), encoder, **options).fingerprint

    one, two = record(), record(answer="B")
    others = [
        key(two, one),
        key(one, record(answer="C")),
        key(one, {**two, "image": "b.png"}),
        key(one, record(answer=""), two),
    ]
    assert key(one, two) == key(one, two)
    assert len({key(one, two), *others}) == 5


@pytest.fixture
def samples(tmp_path: Path, encoder: TurnEncoder) -> list[Sample]:
    write_images(tmp_path / "images", 6)
    records = [{**record("<image>\nWhat?", f"It is {i}.", f"{i:03d}.png"), "id": i} for i in range(6)]
    return prepared(tmp_path, [*records, {**record("Why?", "So.", None), "id": 6}], encoder).samples


def pixels(path: Path) -> torch.Tensor:
    return torch.full((3, 2, 2), float(path.stem))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_carry_their_own_samples_images_whatever_the_workers(workers: int, samples: list[Sample]) -> None:
    plan = [[3, 6, 0], [6], [5, 1]]
    loaded = list(load_batches(Samples(samples, pixels), plan, workers))
    assert [item.uids for item in loaded] == [tuple(str(i) for i in step) for step in plan]
    assert loaded[1].batch.pixel_values is None
    for item, step in zip(loaded, plan, strict=True):
        shown = [] if item.batch.pixel_values is None else item.batch.pixel_values[:, 0, 0, 0].tolist()
        assert shown == [float(i) for i in step if i != 6]
        for row, i in enumerate(step):
            real = item.batch.attention_mask[row]
            assert item.batch.input_ids[row][real].tolist() == list(samples[i].input_ids)
            assert item.batch.labels[row][real].tolist() == list(samples[i].labels)


@pytest.mark.parametrize("workers", [0, 1])
def test_file_that_went_bad_since_the_check_is_named(workers: int, samples: list[Sample]) -> None:
    def load(path: Path) -> torch.Tensor:
        if path.stem == "002":
            raise DataError("D104", f"image {path} cannot be read.")
        return pixels(path)

    def uids() -> Iterator[tuple[str, ...]]:
        yield from (item.uids for item in load_batches(Samples(samples, load), [[0], [1, 2]], workers))

    batches = uids()
    assert next(batches) == ("0",)
    with pytest.raises(DataError, match=r'sample "2".*002') as caught:
        next(batches)
    assert caught.value.code == "D104"


def test_empty_share_of_a_step_gives_a_batch_without_loss(samples: list[Sample]) -> None:
    text_first = [samples[6], *samples[:6]]
    item = next(load_batches(Samples(text_first, pixels), [[]], 0))
    assert (item.uids, item.batch.num_supervised, len(item.batch.input_ids)) == ((), 0, 1)
    assert item.batch.pixel_values is not None  # the graph of a process with images


def test_loading_leaves_the_global_generator_alone(samples: list[Sample]) -> None:
    before = torch.random.get_rng_state()
    list(load_batches(Samples(samples, pixels), [[0], [1]], 0))
    assert torch.equal(before, torch.random.get_rng_state())


def test_held_out_samples_are_a_fixed_choice_of_the_seed(samples: list[Sample]) -> None:
    many = [replace(samples[0], uid=str(i)) for i in range(40)]
    train, held = split_held_out(many, 0.25, seed=3)
    assert (len(train), len(held)) == (30, 10)
    assert sorted(s.uid for s in train + held) == sorted(s.uid for s in many)
    assert split_held_out(many, 0.25, seed=3) == (train, held)
    assert split_held_out(many, 0.25, seed=4)[1] != held
    assert [len(part) for part in split_held_out(many[:2], 0.01, seed=0)] == [1, 1]
    assert split_held_out(many, 0.0, seed=0) == (many, [])
    supervised, total = supervised_share(samples)
    assert total == sum(len(s.input_ids) for s in samples)
    assert supervised == sum(x != IGNORE for s in samples for x in s.labels)
