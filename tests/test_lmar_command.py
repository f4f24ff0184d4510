"""`python -m vlmpeft.lmar`: its numbers against the library's, generated answers, files, pictures, refusals."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from runs import make_bundle

import vlmpeft
from vlmpeft import checkpoint, lmar
from vlmpeft.batch import IGNORE, collate
from vlmpeft.build import Bundle
from vlmpeft.errors import ConfigError, DataError, EvalError, VlmpeftError
from vlmpeft.images import ImageReader, ImageTransform
from vlmpeft.layouts import IMAGE, Exchange
from vlmpeft.lmar_heat import box_of, caption, chosen, token_grid
from vlmpeft.lmar_samples import answered_by_data, answered_by_model, run, with_images
from vlmpeft.projectors import PROJECTORS
from vlmpeft.steering import lmar as probe_of
from vlmpeft.steering.pictures import Heat, Line, _upsampled, heat_figure, layers_figure
from vlmpeft.template import TurnEncoder


@pytest.fixture(scope="module")
def models(tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two saved models of one recipe with different weights."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("one", "two")):
        checkpoint.save(make_bundle(tiny_recipe, seed=seed), folder / name / "final")
    return [str(folder / name / "final") for name in ("one", "two")]


@pytest.fixture(scope="module")
def bundle(models: list[str]) -> Bundle:
    return vlmpeft.load(models[0], device="cpu")


def arguments(data_dir: Path, out: Path, *more: str) -> list[str]:
    files = [f"data={data_dir / 'instruct.json'}", f"images={data_dir / 'images'}"]
    return [*files, f"out={out}", "device=cpu", *more]


def test_its_numbers_are_those_of_the_model_called_on_the_same_batch(
    models: list[str], bundle: Bundle, data_dir: Path, tmp_path: Path
) -> None:
    lmar.main([f"model={models[0]}", *arguments(data_dir, tmp_path, "n=5", "text_scope=prompt", "batch_size=2")])
    found = json.loads((tmp_path / "lmar.json").read_text())
    conversations = with_images(str(data_dir / "instruct.json"), str(data_dir / "images"), 5)
    encoder, read = bundle.turn_encoder(), ImageReader(bundle.image_transform)
    encodings = [encoder.encode(c.exchanges, independent=True) for c in conversations]
    batch = collate(encodings, [view for c in conversations for path in c.images for view in read(path)])
    with torch.no_grad(), probe_of(bundle.model, text_scope="prompt") as probe:
        bundle.model.eval()(**batch.tensors())
    model = found["models"][0]
    assert (model["name"], model["samples"], model["left_out"]) == ("one", 5, 0)
    torch.testing.assert_close(torch.tensor(model["rho"]), probe.per_sample(), rtol=1e-4, atol=0)
    torch.testing.assert_close(torch.tensor(model["visual_mass"]), probe.mass(), rtol=1e-4, atol=0)
    torch.testing.assert_close(torch.tensor(model["lmar"]["mean"]), probe.ratio(), rtol=1e-4, atol=0)
    assert all(a <= b <= c for a, b, c in zip(*(model["lmar"][k] for k in ("low", "mean", "high")), strict=True))
    assert found["settings"]["text_scope"] == "prompt"


TURNS = [Exchange((IMAGE, "\nIs there a red square?"), "Yes"), Exchange(("What is shown?",), "A square")]


@pytest.mark.parametrize("template", ["vicuna_v1", "chatml", "tokenizer"])
@pytest.mark.parametrize("independent", [False, True])
def test_what_a_user_says_is_known_token_by_token(template: str, independent: bool, bos_tokenizer: Any) -> None:
    encoding = TurnEncoder(bos_tokenizer, template, 3, system="Be brief.").encode(TURNS, independent)
    said = bos_tokenizer.decode([i for i, user in zip(encoding.input_ids, encoding.user, strict=True) if user])
    assert " ".join(said.replace("?", "? ").split()) == "Is there a red square? What is shown?"
    assert not any(user for user, label in zip(encoding.user, encoding.labels, strict=True) if label != IGNORE)


def test_in_a_layout_tokenised_whole_the_text_joined_to_a_question_counts_with_it(bos_tokenizer: Any) -> None:
    encoding = TurnEncoder(bos_tokenizer, "vicuna_v1_legacy", 3, system="Be brief.").encode(TURNS)
    said = bos_tokenizer.decode([i for i, user in zip(encoding.input_ids, encoding.user, strict=True) if user])
    assert said == "\nIs there a red square? ASSISTANT:USER: What is shown? ASSISTANT:"


def test_the_instruction_leaves_out_the_template_and_other_turns(bundle: Bundle, data_dir: Path) -> None:
    shown = answered_by_data(bundle, with_images(str(data_dir / "instruct.json"), str(data_dir / "images"), 3))
    found = {}
    for scope in ("instruction", "prompt"):
        with probe_of(bundle.model, text_scope=scope) as probe:  # type: ignore[arg-type]
            run(bundle, shown)
        found[scope] = probe
    (forward,) = found["instruction"]._forwards
    users = [row[: len(s.encoding.user)].tolist() for row, s in zip(forward.asked.text, shown, strict=True)]
    assert users == [s.encoding.user for s in shown]
    assert not found["instruction"].ratio().equal(found["prompt"].ratio())


def test_generated_answers_are_the_models_own_tokens_and_read_as_if_forced(bundle: Bundle, data_dir: Path) -> None:
    conversations = with_images(str(data_dir / "instruct.json"), str(data_dir / "images"), 3)
    shown = answered_by_model(bundle, conversations, max_new_tokens=6, batch_size=2)
    for one in shown:
        labels = one.encoding.labels
        new = [token for token in labels if token != IGNORE]
        assert one.encoding.input_ids[-len(new) :] == new
        assert set(labels[: -len(new)]) == {IGNORE}
        question = "".join(c for c in one.conversation.exchanges[0].question if isinstance(c, str)).strip()
        text = bundle.tokenizer.decode(new, skip_special_tokens=True).strip()
        assert text == bundle.generate(list(one.images), question, max_new_tokens=6)
    with probe_of(bundle.model) as probe:
        run(bundle, shown)
    assert probe.per_sample().shape == (3, 2)
    asked = probe._forwards[0].asked
    lengths = [len([x for x in s.encoding.labels if x != IGNORE]) for s in shown]
    assert asked.real.sum(1).tolist() == lengths  # one query for each token, the prompt's last the first of them


def test_two_models_are_laid_over_each_other_and_the_table_has_a_block_each(
    models: list[str], data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("n=4", "mode=generated", "max_new_tokens=3", "token=2", "layers=0,1", "sample=2", "drop_sink=1")
    lmar.main([f"model={','.join(models)}", *arguments(data_dir, tmp_path, *more)])
    out = capsys.readouterr().out
    assert out.startswith("one: 4 samples\nlayer")
    assert "\n\ntwo: 4 samples\n" in out
    assert out.count("\n0 ") == out.count("\n1 ") == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["heat.png", "lmar.json", "lmar.png"]
    for name in ("heat.png", "lmar.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.format == "PNG"
            assert min(picture.size) > 300
    found = json.loads((tmp_path / "lmar.json").read_text())
    assert found["settings"]["mode"] == "generated"
    assert found["models"][0]["rho"] != found["models"][1]["rho"]


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        (["text_scope=promt"], ConfigError, "did you mean 'prompt'"),
        (["mode=free"], ConfigError, "known: generated, teacher"),
        (["drop_sink=-1"], ConfigError, "drop_sink=-1"),
        (["token=last"], ConfigError, "token=last"),
        (["layers=1;2"], ConfigError, "layers=1;2"),
        (["layers=0,7"], ConfigError, "layers 0 to 1"),
        (["sample=4", "n=3"], ConfigError, "there are 3"),
        (["token=900", "n=1"], ConfigError, "another sample"),
        (["drop_sink=400", "n=2"], EvalError, "V620.*no sample has both"),
    ],
)
def test_what_cannot_be_done_is_said(
    wrong: list[str], error: type[VlmpeftError], says: str, models: list[str], data_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=says):
        lmar.main([f"model={models[0]}", *arguments(data_dir, tmp_path, *wrong)])


def test_data_without_images_is_refused_before_a_model_loads(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    (tmp_path / "text.json").write_text(json.dumps([{"id": "a", "conversations": turns}]))
    with pytest.raises(DataError, match=r"D112.*no record shows an image"):
        lmar.main(["model=nowhere", f"data={tmp_path / 'text.json'}", f"images={tmp_path}", f"out={tmp_path / 'o'}"])


def test_models_are_named_after_their_runs_unless_that_is_ambiguous() -> None:
    assert lmar.names(["runs/a/final", "b"]) == ["a", "b"]
    assert lmar.names(["x/a/final", "y/a/final"]) == ["x/a/final", "y/a/final"]


def test_the_caption_shows_the_turn_of_the_token_that_is_explained(bundle: Bundle, data_dir: Path) -> None:
    conversations = with_images(str(data_dir / "instruct.json"), str(data_dir / "images"), 1)
    (shown,) = answered_by_data(bundle, conversations)
    count = len([x for x in shown.encoding.labels if x != IGNORE])
    captions = [caption(bundle, shown, token) for token in range(1, count + 1)]
    assert captions[0] == "Is there a red square? \u2192 [Ye]s"
    assert captions[-1] == "What is shown? \u2192 A red square[<|im_end|>]"
    plain = dict.fromkeys(re.sub(r"\[<.im_end.>\]|[\[\]]", "", c) for c in captions)
    asked = [("".join(c for c in e.question if isinstance(c, str)), e.answer) for e in conversations[0].exchanges]
    assert list(plain) == [f"{question.strip()} \u2192 {answer}" for question, answer in asked]


@pytest.mark.parametrize("size", [(90, 60), (60, 90), (64, 64)])
@pytest.mark.parametrize("mode", ["pad", "square", "anyres"])
def test_the_box_of_a_photo_is_what_the_model_is_shown(mode: Any, size: tuple[int, int]) -> None:
    values = np.random.default_rng(0).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    photo = Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)
    transform = ImageTransform(32, (0.5, 0.5, 0.5), (1.0, 1.0, 1.0), mode)
    view = (transform(photo)[0].permute(1, 2, 0).numpy() + 0.5) * 255
    left, top, right, bottom = box_of(mode, size)
    canvas = Image.new("RGB", (200, 200), transform.fill)
    canvas.paste(photo, (50, 50))
    ours = canvas.resize((32, 32), Image.Resampling.BICUBIC, (left + 50, top + 50, right + 50, bottom + 50))
    assert np.abs(np.asarray(ours, np.float32) - view).mean() < 3


@pytest.mark.parametrize("size", [(90, 60), (60, 90)])
def test_a_token_is_drawn_where_it_lies_on_the_photo(size: tuple[int, int]) -> None:
    weights = np.zeros((6, 6), np.float32)
    weights[3, 2] = 1.0  # in a padded square of 90 pixels: rows 45 to 60, columns 30 to 45
    drawn = _upsampled(weights, box_of("pad", size), size)
    assert drawn.shape == (size[1], size[0])
    row, column = np.unravel_index(drawn.argmax(), drawn.shape)
    shift = (15, 0) if size == (90, 60) else (0, 15)
    assert 45 <= row + shift[0] < 60
    assert 30 <= column + shift[1] < 45
    short = _upsampled(np.ones((2, 2), np.float32), box_of("square", size), size)
    assert (short == 0).sum() == 60 * 30  # what the crop leaves out is not coloured


def test_tokens_lie_on_the_image_unless_the_projector_mixes_them(bundle: Bundle) -> None:
    vision: Any = bundle.model.vision
    assert token_grid(bundle) == vision.grid == (2, 2)
    own = bundle.model.projector
    try:
        for name, options, grid in (("pixel_shuffle", {"factor": 2}, (1, 1)), ("resampler", {"queries": 2}, None)):
            bundle.model.projector = PROJECTORS.build(name, vision.width, 32, **options)  # type: ignore[assignment]
            assert token_grid(bundle) == grid
    finally:
        bundle.model.projector = own


def test_figures_are_the_same_bytes_every_time_and_bear_layers_without_values() -> None:
    nan = float("nan")
    lines = [Line("a", [0.1, nan, 2.0], [0.05, nan, 1.0], [0.2, nan, 3.0], [0.3, 0.0, 0.1])]
    png = layers_figure(lines)
    assert png == layers_figure(lines)
    assert png != layers_figure(lines * 2)
    shorts, longs = ([replace(lines[0], name=f"{name} {i}") for i in range(6)] for name in ("a", "runs/" + 50 * "x"))
    tall, low = (Image.open(io.BytesIO(layers_figure(several))).height for several in (longs, shorts))
    assert tall > low + 100  # the legend takes a line for each long name, beside the panels, not over them
    photo = Image.new("RGB", (30, 20), "red")
    heats = [Heat("before", np.eye(3, dtype=np.float32), box_of("pad", photo.size))]
    one = Image.open(io.BytesIO(heat_figure(photo, heats, "why?")))
    two = Image.open(io.BytesIO(heat_figure(photo, heats * 2, "why?")))
    assert one.width < two.width
    empty = heat_figure(photo, [Heat("none", np.zeros((3, 3), np.float32), (0, 0, 30, 20))], "")
    assert Image.open(io.BytesIO(empty)).size == one.size


def test_maps_of_unequal_grids_are_compared_by_area() -> None:
    photo = Image.new("RGB", (60, 40), "gray")
    coarse, fine = (Heat("a run", np.full((n, n), 0.4 / n**2, np.float32), (0, 0, 60, 40)) for n in (3, 6))
    figures = [heat_figure(photo, pair, "why?") for pair in ([coarse, fine], [fine, coarse], [coarse, coarse])]
    assert figures[0] == figures[1]  # the same attention an area looks the same
    assert figures[0] != figures[2]  # where grids are alike the scale is that of one token


def test_chosen_reads_the_command_line() -> None:
    assert (chosen("first", "mean").token, chosen("first", "mean").layers) == (1, ())
    assert (chosen("3", "0,5").token, chosen("3", "0,5").layers) == (3, (0, 5))
