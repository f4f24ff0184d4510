"""Cached features: the encoder's own bits, computed once, whole or absent."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_images
from PIL import Image
from torch import Tensor, nn

from vlmpeft import fs
from vlmpeft.encoder import Encoder, Pixels
from vlmpeft.errors import DataError
from vlmpeft.features import FeatureCache, cache_features
from vlmpeft.images import ImageReader, ImageTransform, open_image

FORK = multiprocessing.get_context("fork")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


class Patches(Encoder):
    """A convolution as encoder; counts its calls and can do something before one of them."""

    def __init__(self, seed: int = 0, width: int = 5) -> None:
        torch.manual_seed(seed)
        super().__init__(nn.Conv2d(3, width, 8, stride=8), 0, Pixels(MEAN, STD, 32))
        self.layer, self.calls, self.before_call = -1, 0, lambda call: None
        self.probe(None)
        self.calls = 0
        self.requires_grad_(False).eval()

    def features(self, pixel_values: Tensor) -> Tensor:
        self.calls += 1
        self.before_call(self.calls)
        out: Tensor = self.backbone(pixel_values)
        return out


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLMPEFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    write_images(tmp_path / "images", 7)
    return sorted((tmp_path / "images").iterdir())


TRANSFORM = ImageTransform(32, MEAN, STD)


def built(
    paths: list[Path], encoder: Patches | None = None, transform: ImageTransform = TRANSFORM
) -> tuple[FeatureCache, int]:
    """Returns: cache, encoder calls it took."""
    encoder = encoder or Patches()
    return cache_features(encoder, ImageReader(transform), paths, batch_size=3), encoder.calls


def pixels(path: Path) -> Tensor:
    return TRANSFORM(open_image(path))[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_are_the_encoders_own_bit_for_bit(dtype: torch.dtype, cache: Path, paths: list[Path]) -> None:
    encoder = Patches().to(dtype)
    features, _ = built([*reversed(paths), paths[0]], encoder)
    for start in range(0, len(paths), 3):
        expected = encoder(torch.stack([pixels(p) for p in paths[start : start + 3]]))
        for path, feature in zip(paths[start : start + 3], expected, strict=True):
            assert feature.dtype == dtype
            assert torch.equal(features(path), feature[None])


def test_a_real_encoder_gives_its_own_bits_too(cache: Path, paths: list[Path]) -> None:
    from vlmpeft.vision import load_vision

    encoder = load_vision("timm:test_efficientnet", weights="random")
    transform = ImageTransform(encoder.image_size, encoder.mean, encoder.std)
    features = cache_features(encoder, ImageReader(transform), paths[:4], batch_size=4)
    expected = encoder(torch.cat([transform(open_image(p)) for p in paths[:4]]))
    assert all(torch.equal(features(p)[0], e) for p, e in zip(paths, expected, strict=False))


def test_second_use_encodes_nothing(cache: Path, paths: list[Path]) -> None:
    first, calls = built(paths)
    second, again = built(list(reversed(paths)))
    assert (calls, again) == (3, 0)
    assert torch.equal(first.values, second.values)


@pytest.mark.parametrize(
    "change",
    [
        lambda paths: (paths, Patches(seed=1), TRANSFORM),
        lambda paths: (paths, Patches().to(torch.bfloat16), TRANSFORM),
        lambda paths: (paths, Patches(), ImageTransform(32, MEAN, STD, "square")),
        lambda paths: (paths, Patches(), ImageTransform(32, MEAN, (0.2, 0.3, 0.5))),
        lambda paths: (paths[1:], Patches(), TRANSFORM),
    ],
    ids=["weights", "dtype", "crop", "std", "images"],
)
def test_any_change_of_encoder_transform_or_images_is_another_cache(
    change: Callable[[list[Path]], tuple[Any, ...]], cache: Path, paths: list[Path]
) -> None:
    built(paths)
    _, calls = built(*change(paths))
    assert calls > 0
    assert built(paths)[1] == 0  # beside the first, not in its place


def test_changed_image_is_encoded_again(cache: Path, paths: list[Path]) -> None:
    red, green = (p.read_bytes() for p in paths[:2])
    size = max(len(red), len(green))
    paths[1].write_bytes(green.ljust(size, b"\0"))
    old = built(paths)[0](paths[1]).clone()
    stat = paths[1].stat()
    paths[1].write_bytes(red.ljust(size, b"\0"))  # another picture under the old name, as long as before
    os.utime(paths[1], ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    after, calls = built(paths)
    assert calls > 0
    assert not torch.equal(after(paths[1]), old)
    expected = Patches()(torch.stack([pixels(p) for p in paths[:3]]))
    assert torch.equal(after(paths[1])[0], expected[1])


def test_file_that_lost_bytes_is_built_again(cache: Path, paths: list[Path]) -> None:
    whole = built(paths)[0].values.clone()
    (file,) = cache.glob("features-*.bin")
    file.write_bytes(file.read_bytes()[:-4])
    again, calls = built(paths)
    assert calls == 3
    assert torch.equal(again.values, whole)


def test_unreadable_image_stops_the_build_and_leaves_nothing(cache: Path, paths: list[Path]) -> None:
    paths[5].write_bytes(b"no image")
    with pytest.raises(DataError, match="D104"):
        built(paths)
    assert [p.suffix for p in cache.iterdir()] == [".lock"]


def test_without_locks_everyone_builds_alone(cache: Path, paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no locks available")

    built(paths)
    (file,) = cache.glob("features-*.bin")
    file.unlink()
    foreign = cache / f"{fs.TEMPORARY}{file.name}-01234567"  # of another process, which may be alive
    foreign.touch()
    monkeypatch.setattr(fcntl, "flock", refuse)
    assert built(paths)[1] == 3
    assert foreign.exists()


def _killed_at(call: int, paths: list[Path]) -> None:
    encoder = Patches()

    def kill(current: int) -> None:
        if current == call:
            os.kill(os.getpid(), signal.SIGKILL)

    encoder.before_call = kill
    built(paths, encoder)


@pytest.mark.parametrize("call", [1, 3])
def test_killed_build_leaves_no_cache_and_no_litter(call: int, cache: Path, paths: list[Path]) -> None:
    child = FORK.Process(target=_killed_at, args=(call, paths))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert not list(cache.glob("features-*.bin"))
    assert list(cache.glob(f"{fs.TEMPORARY}*"))  # what the dead process was writing
    features, calls = built(paths)
    assert calls == 3
    assert torch.equal(features(paths[0])[0], Patches()(torch.stack([pixels(p) for p in paths[:3]]))[0])
    assert sorted(p.suffix for p in cache.iterdir()) == [".bin", ".lock"]


def _build_together(paths: list[Path], start: Any, results: Any) -> None:
    start.wait()
    features, calls = built(paths)
    results.put((calls, features.values.sum().item()))


def test_processes_that_want_the_same_cache_build_it_once(cache: Path, paths: list[Path]) -> None:
    start, results = FORK.Barrier(3), FORK.Queue()
    children = [FORK.Process(target=_build_together, args=(paths, start, results)) for _ in range(3)]
    for child in children:
        child.start()
    found = [results.get(timeout=20) for _ in children]
    for child in children:
        child.join()
    assert sorted(calls for calls, _ in found) == [0, 0, 3]
    assert len({total for _, total in found}) == 1


def test_an_image_of_several_views_keeps_them_together(cache: Path, paths: list[Path]) -> None:
    transform = ImageTransform(32, MEAN, STD, "anyres", ((1, 2), (2, 2), (3, 1)))
    Image.new("RGB", (32, 96), (9, 9, 9)).save(paths[2])
    read, encoder = ImageReader(transform), Patches()
    features = cache_features(encoder, read, paths, batch_size=3)
    assert [len(features(path)) for path in paths[:4]] == [5, 5, 4, 5]
    for path in paths:
        assert torch.equal(features(path), Patches()(read(path)))
    assert cache_features(Patches(), read, paths).rows == features.rows
