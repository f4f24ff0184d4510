"""The scenes are what their descriptions say, and the questions cannot be answered without them."""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlmpeft import scenes
from vlmpeft.errors import run_command
from vlmpeft.scene_questions import CELLS, COLORS, NUMBERS, SHAPES, SIZES, Scene, details, instruct

ARGUMENTS = ["seed=3", "train=24", "test=8", "pretrain=8", "size=96"]
CATEGORIES = {"yesno", "count", "color", "shape", "size", "position", "where", "choice"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scenes")
    assert run_command(scenes.main, [f"out={out}", *ARGUMENTS]) == 0
    return out


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def pairs(rows: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """(image, question, answer) of every turn of LLaVA rows about an image."""
    found = []
    for row in (r for r in rows if "image" in r):
        turns = row["conversations"]
        for human, gpt in zip(turns[::2], turns[1::2], strict=True):
            found.append((row["image"], human["value"].removeprefix("<image>\n").split("\n")[0], gpt["value"]))
    return found


def truth(question: str, description: str) -> str:
    """The answer worked out from the words of the description alone."""
    things = [thing.split(" ", 3) for thing in description.split(", ")]
    if question == "How many objects are there?":
        return ["One", "Two", "Three", "Four"][len(things) - 1]
    named = [t for t in things if set(re.findall(r"\w+", question)) & {t[1]} or t[2] in question]
    if asked := re.match(r"Is there an? (.*) in the image\?", question):
        words = set(asked[1].split()) - {"object"}
        return "Yes" if any(words <= set(t) for t in things) else "No"
    colors, shapes = ([w for w in group if re.search(rf"\b{w}\b", question)] for group in (COLORS, SHAPES))
    subject = re.match(r"(?:Where is|What color is|What shape is|Is) the (\w+)(?: (\w+))?", question)
    assert subject is not None
    words = {w for w in subject.groups() if w in COLORS + SHAPES}
    words = words if question.startswith("Where") or len(colors) + len(shapes) < 3 else {subject[1]}
    words = {subject[1]} if subject[1] in SHAPES else words
    (size, color, shape, cell) = next(t for t in named if words <= set(t))
    assert sum(words <= set(t) for t in things) == 1, f"ambiguous: {question} for {description}"
    if question.startswith("Where"):
        return cell.capitalize()
    if question.startswith("What"):
        return (color if "color" in question else shape).capitalize()
    options = re.findall(r"\w+", question.split(" or ")[0])[-1], re.findall(r"\w+", question.split(" or ")[1])[-1]
    return next(o for o in options if o in {size, color, shape, *cell.split()} - words).capitalize()


def test_same_seed_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    assert run_command(scenes.main, [f"out={tmp_path}", *ARGUMENTS]) == 0
    files = [p.relative_to(folder) for p in folder.rglob("*") if p.is_file()]
    assert len(files) == 24 + 8 + 8 + 5
    assert all((folder / f).read_bytes() == (tmp_path / f).read_bytes() for f in files)
    assert scenes.sample("train", 3, 24) != scenes.sample("train", 4, 24)


@pytest.mark.parametrize("seed", [0, 1])
def test_no_test_scene_is_a_training_scene(seed: int) -> None:
    test = {s.description for s in scenes.sample("test", seed, 200)}
    seen = {s.description for split in ("train", "pretrain") for s in scenes.sample(split, 0, 1000)}
    assert len(test) > 100
    assert not test & seen


def test_images_and_rows_match(folder: Path) -> None:
    named = {
        r["image"]
        for f in ("pretrain.json", "instruct.json")
        for r in json.loads((folder / f).read_text())
        if "image" in r
    }
    named |= {r["image"] for f in ("pope_test.jsonl", "types_test.jsonl") for r in lines(folder / f)}
    assert named == {p.name for p in (folder / "images").iterdir()}
    assert all(Image.open(folder / "images" / n).size == (96, 96) for n in named)


@pytest.mark.parametrize("name", ["pretrain.json", "instruct.json"])
def test_rows_are_llava_conversations(folder: Path, name: str) -> None:
    rows = json.loads((folder / name).read_text())
    assert len({r["id"] for r in rows}) == len(rows)
    for row in rows:
        turns = row["conversations"]
        assert [t["from"] for t in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert [t["value"].count("<image>") for t in turns] == [int("image" in row)] + [0] * (len(turns) - 1)
        assert all(t["value"].strip() for t in turns)
        assert len(turns) == (2 if name == "pretrain.json" or "image" not in row else 14)


def test_labels_are_true(folder: Path) -> None:
    known = {
        f"{s}_{i:04d}.png": scene.description
        for s, n in (("train", 400), ("test", 8))
        for i, scene in enumerate(scenes.sample(s, 3, n))
    }
    asked = pairs(instruct(scenes.sample("train", 3, 400), random.Random(0)))
    for name in ("pope_test.jsonl", "types_test.jsonl"):
        asked += [(r["image"], r["text"], r["label"].capitalize()) for r in lines(folder / name)]
    wrong = [(q, a, known[i]) for i, q, a in asked if truth(q, known[i]) != a]
    assert not wrong


def test_captions_name_every_object(folder: Path) -> None:
    rows = json.loads((folder / "pretrain.json").read_text())
    for row, scene in zip(rows, scenes.sample("pretrain", 3, 8), strict=True):
        caption = row["conversations"][1]["value"]
        positions = [caption.index(f"a {t.size} {t.color} {t.shape}") for t in scene.things]
        assert positions == sorted(positions)
        assert caption.count("a ") == len(scene.things)


@pytest.mark.parametrize("scene", scenes.sample("train", 7, 12), ids=lambda s: s.description)
def test_pixels_show_the_objects(scene: Scene) -> None:
    image = scenes.draw(scene, 224)
    assert image.size == (224, 224)
    for thing in scene.things:
        assert image.getpixel((int(thing.x * 224), int(thing.y * 224))) == scenes.RGB[thing.color]
        widths = [224 * f(p[0] for p in scenes.outline(thing)) for f in (min, max)]
        assert 40 <= widths[1] - widths[0] <= 110
        assert all(0 < v < 1 for point in scenes.outline(thing) for v in point)


def test_objects_do_not_overlap_and_stay_in_their_cell() -> None:
    for scene in scenes.sample("train", 1, 200):
        for thing in scene.things:
            corners = scenes.outline(thing)
            if thing.cell == "center":
                assert len(scene.things) == 1
            else:
                assert {("left", "right")[x > 0.5] for x, _ in corners} == {thing.cell.split()[1]}
                assert {("top", "bottom")[y > 0.5] for _, y in corners} == {thing.cell.split()[0]}
        assert len({t.cell for t in scene.things}) == len(scene.things)


def test_colors_stand_out_from_each_other_and_from_the_backgrounds() -> None:
    tones = list(scenes.RGB.values())
    distances = [math.dist(a, b) for i, a in enumerate(tones) for b in tones[i + 1 :] + list(scenes.GROUNDS)]
    assert min(distances) > 90


def test_every_phrase_is_asked_as_often_with_yes_as_with_no() -> None:
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for _, question, answer in pairs(instruct(scenes.sample("train", 0, 400), random.Random(0))):
        if question.startswith("Is there"):
            counts[question][answer] += 1
    assert len(counts) == len(SHAPES) * len(COLORS) + len(SHAPES) + len(COLORS)
    assert all(c["Yes"] == c["No"] for c in counts.values())


def test_pope_alternates_and_is_even(folder: Path) -> None:
    rows = lines(folder / "pope_test.jsonl")
    assert [r["question_id"] for r in rows] == list(range(1, len(rows) + 1))
    assert [r["label"] for r in rows] == ["yes", "no"] * (3 * 8)
    assert len({(r["image"], r["text"]) for r in rows}) == len(rows)


def test_every_type_is_tested(folder: Path) -> None:
    rows = lines(folder / "types_test.jsonl")
    assert {r["category"] for r in rows} == CATEGORIES
    assert Counter(r["label"] for r in rows if r["category"] == "yesno") == {"Yes": 4, "No": 4}


def test_answers_of_every_type_are_even() -> None:
    answers: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for _, question, answer in pairs(instruct(scenes.sample("train", 0, 400), random.Random(0))):
        answers[" ".join(question.split()[:2])][answer] += 1
    for start, values in (("How many", NUMBERS), ("What color", COLORS), ("What shape", SHAPES), ("Where is", CELLS)):
        assert set(answers[start]) == {v.capitalize() for v in values}
        assert max(answers[start].values()) < 1.3 * answers[start].total() / len(values)
    assert abs(answers["Is the"]["Large"] - answers["Is the"]["Small"]) <= 2
    assert abs(answers["Is the"]["Left"] - answers["Is the"]["Right"]) <= 2


def test_either_or_is_the_first_as_often_as_the_second() -> None:
    first = total = 0
    for _, question, answer in pairs(instruct(scenes.sample("train", 0, 400), random.Random(0))):
        if " or " in question:
            total += 1
            first += question.split(" or ")[0].endswith(answer.lower())
    assert total > 200
    assert abs(first / total - 0.5) < 0.02


def naive_bayes(train: list[tuple[str, str]], question: str) -> str:
    """Multinomial naive Bayes over words, add-one smoothing."""
    scores = {}
    for label in ("Yes", "No"):
        words = Counter(w for q, a in train if a == label for w in q.split())
        total = words.total() + len(words) + 1
        scores[label] = sum(math.log((words[w] + 1) / total) for w in question.split())
    return max(scores, key=lambda k: scores[k])


@pytest.mark.parametrize("seed", [0, 1])
def test_the_question_alone_does_not_tell_yes_from_no(seed: int) -> None:
    rows = pairs(instruct(scenes.sample("train", seed, 400), random.Random(seed)))
    train = [(q, a) for _, q, a in rows if q.startswith("Is there")]
    test = [
        (r["text"], r["label"].capitalize()) for r in scenes.pope(scenes.sample("test", seed, 100), random.Random(seed))
    ]
    exact: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for question, answer in train:
        exact[question][answer] += 1
    majority = sum((exact[q].most_common(1) or [("Yes", 0)])[0][0] == a for q, a in test)
    guesses = {q: naive_bayes(train, q) for q in {q for q, _ in test}}
    assert majority / len(test) <= 0.55
    assert sum(guesses[q] == a for q, a in test) / len(test) <= 0.55


def test_details_ask_only_what_is_unambiguous() -> None:
    for scene in scenes.sample("train", 0, 40):
        assert all(truth(q.text, scene.description) == q.answer for q in details(scene))
        assert {t.size for t in scene.things} <= set(SIZES)


def test_help_prints_the_keys_with_their_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(scenes.main, ["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("out=DIR", "seed=0", "train=700", "test=100", "pretrain=700", "size=224"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["out=x", "trian=3"], "did you mean 'train'?"),
        (["out=x", "train=many"], "train=many"),
        (["out=x", "size=4"], "from 32"),
        (["out"], "expected key=value"),
        ([], "out is not given"),
    ],
)
def test_a_wrong_argument_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(scenes.main, arguments) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1


def test_an_unwritable_folder_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert run_command(scenes.main, [f"out={tmp_path / 'file'}", "train=0", "test=0", "pretrain=0"]) == 5
    assert "K130" in capsys.readouterr().err


def test_existence_turns_are_the_tests_questions_about_training_scenes(folder: Path) -> None:
    rows = json.loads((folder / "existence.json").read_text())
    drawn = {f"train_{i:04d}.png": scene.description for i, scene in enumerate(scenes.sample("train", 3, 24))}
    assert [row["image"] for row in rows] == list(drawn)
    asked = pairs(rows)
    assert len(asked) == 6 * 24
    assert all(answer == truth(question, drawn[image]) for image, question, answer in asked)
    assert Counter(answer for _, _, answer in asked) == {"Yes": 72, "No": 72}
    firsts = Counter(row["conversations"][1]["value"] for row in rows)
    assert min(firsts["Yes"], firsts["No"]) > 4  # the order gives nothing away
