"""Word alignment: the targets, the loss in closed form, and what it does to a projector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import run_train
from torch import nn

from vlmpeft import run
from vlmpeft.align import align, alignment_loss, word_targets
from vlmpeft.batch import IGNORE
from vlmpeft.data import Sample
from vlmpeft.projectors import MLPProjector
from vlmpeft.recipe import AlignConfig
from vlmpeft.vlm import VLM

A, B, C = Path("a.png"), Path("b.png"), Path("c.png")


def sample(image: Path | None, *words: int) -> Sample:
    ids = (7, *words)
    return Sample("s", ids, (IGNORE, *words), (0,) * len(ids), (image,) if image else ())


def test_targets_are_the_words_said_of_an_image_over_all_its_samples() -> None:
    found = word_targets([sample(A, 11, 12), sample(A, 13), sample(B, 11), sample(None, 40)], 1.0, excluded=())
    assert found is not None
    assert found.images == [A, B]
    assert found.words.tolist() == [11, 12, 13]
    torch.testing.assert_close(found.targets, torch.tensor([[1 / 3, 1 / 3, 1 / 3], [1.0, 0.0, 0.0]]))


def test_common_words_special_tokens_and_images_without_words_are_left_out() -> None:
    found = word_targets([sample(A, 1, 5, 11), sample(B, 1, 5, 12), sample(C, 1, 5)], 0.5, excluded={5})
    assert found is not None
    assert (found.images, found.words.tolist()) == ([A, B], [11, 12])
    assert word_targets([sample(A, 1), sample(B, 1)], 0.5, excluded=()) is None


def test_loss_equals_its_closed_form() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, embeddings = torch.randn(2, 3, 4, generator=generator), torch.randn(5, 4, generator=generator)
    targets = torch.tensor([[0.5, 0.5, 0, 0, 0], [0, 0, 0, 0, 1.0]])
    expected = 0.0
    for b in range(2):
        mixture = sum(torch.softmax(1.5 * embeddings @ tokens[b, n], 0) for n in range(3)) / 3
        expected -= float((targets[b] * mixture.log()).sum()) / 2
    expected += 0.1 * float(((tokens.norm(dim=-1) / 2.0 - 1) ** 2).mean())
    assert float(alignment_loss(tokens, embeddings, targets, 1.5, 2.0)) == pytest.approx(expected, abs=1e-5)


class Language(nn.Module):
    """An embedding table, which is all that alignment reads of a language model."""

    def __init__(self) -> None:
        super().__init__()
        self.config: Any = None
        self.table = nn.Embedding(50, 16)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.table


def model() -> VLM:
    torch.manual_seed(0)
    vlm = VLM(nn.Identity(), MLPProjector(6, 16, rms=1.0), Language())
    return vlm.requires_grad_(False)  # type: ignore[return-value]


FEATURES = {A: torch.eye(6)[:2], B: torch.eye(6)[2:4], C: torch.eye(6)[4:]}
SAMPLES = [sample(A, 11), sample(B, 12), sample(C, 13)]


def test_image_tokens_come_to_mean_their_words_and_nothing_else_changes() -> None:
    vlm = model()
    before = vlm.language.table.weight.clone()
    config = AlignConfig(epochs=150, lr=1e-2, batch=3)
    first = align(vlm, SAMPLES, FEATURES.__getitem__, AlignConfig(epochs=1, lr=1e-6, batch=3), (), seed=0)
    last = align(vlm, SAMPLES, FEATURES.__getitem__, config, (), seed=0)
    assert first is not None
    assert last is not None
    assert last < 0.1 * first
    for path, word in ((A, 11), (B, 12), (C, 13)):
        tokens = vlm.image_embeddings(FEATURES[path][None])[0]
        mixture = torch.softmax(3 * tokens @ vlm.language.table.weight[[11, 12, 13]].T, -1).mean(0)
        assert int(mixture.argmax()) == word - 11
    assert torch.equal(vlm.language.table.weight, before)
    assert not any(p.requires_grad for p in vlm.parameters())


def test_same_seed_gives_the_same_bits() -> None:
    runs = []
    for _ in range(2):
        vlm = model()
        align(vlm, SAMPLES, FEATURES.__getitem__, AlignConfig(epochs=5, batch=2), (), seed=3)
        runs.append(torch.cat([p.flatten() for p in vlm.projector.parameters()]))
    assert torch.equal(*runs)


def test_nothing_to_align_with_leaves_the_projector_alone() -> None:
    vlm = model()
    before = [p.clone() for p in vlm.projector.parameters()]
    assert align(vlm, [sample(None, 11)], FEATURES.__getitem__, AlignConfig(epochs=5), (), seed=0) is None
    assert all(torch.equal(a, b) for a, b in zip(before, vlm.projector.parameters(), strict=True))


def test_rms_option_fixes_the_scale_of_every_output_token() -> None:
    tokens = MLPProjector(6, 16, rms=0.133)(torch.randn(2, 5, 6))
    torch.testing.assert_close(tokens.pow(2).mean(-1).sqrt(), torch.full((2, 5), 0.133), atol=1e-5, rtol=0)
    assert list(MLPProjector(6, 16, rms=0.133).state_dict()) == list(MLPProjector(6, 16).state_dict())


@pytest.mark.parametrize(("source", "first_letters"), [("pretrain", "p"), ("instruct", "it"), ("all", "ipt")])
def test_run_aligns_once_before_the_first_stage_with_the_chosen_words(
    source: str, first_letters: str, tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def record(model: VLM, samples: list[Sample], *_: Any) -> float:
        seen.append("".join(sorted({s.uid[0] for s in samples})))
        return 0.0

    monkeypatch.setattr(run, "align", record)
    for _ in range(2):  # the second call finds the run complete
        assert run_train(tiny_recipe, tmp_path / "run", "align.epochs=1", f"align.source={source}") == 0
    assert seen == [first_letters]
