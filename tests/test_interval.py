"""Intervals against drawn resamples, McNemar against all coin throws, and the ablated pictures."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from vlmpeft.errors import ConfigError, EvalError
from vlmpeft.eval import pope, short
from vlmpeft.eval.ablate import ablated
from vlmpeft.eval.compare import compared, mcnemar, texts_of
from vlmpeft.eval.interval import interval
from vlmpeft.eval.rows import write_rows


def drawn(scores: Sequence[float], resamples: int = 2000) -> tuple[float, float]:
    """The percentile bootstrap by its definition."""
    draw = random.Random(7)
    means = sorted(sum(draw.choices(scores, k=len(scores))) / len(scores) for _ in range(resamples))
    return means[round(0.025 * resamples)], means[round(0.975 * resamples)]


@pytest.mark.parametrize("right", [1, 20, 60, 95, 99])
def test_interval_of_right_and_wrong_answers_is_that_of_drawn_resamples(right: int) -> None:
    scores = [1.0] * right + [0.0] * (100 - right)
    assert interval(scores) == pytest.approx(drawn(scores), abs=0.011)  # one answer of 100


def test_interval_equals_the_quantiles_over_every_resample_of_four() -> None:
    means = sorted(sum(resample) / 4 for resample in itertools.product([1, 1, 1, 0], repeat=4))  # all 256
    assert interval([1, 1, 1, 0]) == [means[6], means[249]]  # 6.4 and 249.6 of them lie outside


@pytest.mark.parametrize("scores", [[0.0, 0.3, 0.6, 0.9, 1.0] * 40, [1.0] * 180 + [0.3] * 20, [0.3] * 190 + [1.0] * 10])
def test_interval_of_graded_answers_is_that_of_drawn_resamples(scores: list[float]) -> None:
    assert interval(scores) == pytest.approx(drawn(scores), abs=0.003)


def test_interval_lies_around_the_mean_and_ignores_the_order() -> None:
    draw = random.Random(0)
    for _ in range(100):
        scores = [draw.choice([0.0, 0.3, 1.0][: draw.choice([2, 3])]) for _ in range(draw.randrange(1, 60))]
        low, high = interval(scores)
        assert 0 <= low <= sum(scores) / len(scores) + 1e-12
        assert sum(scores) / len(scores) - 1e-12 <= high <= 1
        assert interval(scores[::-1]) == pytest.approx([low, high])


def test_intervals_without_doubt_have_no_width_and_none_of_no_answers() -> None:
    assert interval([1, 1, 1]) == [1, 1]
    assert interval([0, 0]) == [0, 0]
    assert interval([0.3, 0.3]) == pytest.approx([0.3, 0.3])
    assert interval([]) == [0, 0]


def test_pope_and_short_report_the_interval_of_their_accuracy() -> None:
    questions = [
        {"question_id": i, "image": "a", "text": "?", "label": "no", "category": "c"} for i in range(100)
    ]  # fmt: skip
    answers = [{"question_id": i, "text": "no" if i < 80 else "yes"} for i in range(100)]
    expected = pytest.approx([0.72, 0.87], abs=0.011)  # Binomial(100, 0.8)
    assert pope.score(questions, answers)["accuracy_ci95"] == expected
    metrics = short.score(questions, answers)
    assert metrics["accuracy_ci95"] == metrics["categories"]["c"]["accuracy_ci95"] == expected


@pytest.mark.parametrize(("wins", "losses"), list(itertools.product(range(6), range(6))))
def test_p_value_is_the_share_of_coin_throws_at_least_as_uneven(wins: int, losses: int) -> None:
    n, most = wins + losses, max(wins, losses)
    throws = [sum(throw) for throw in itertools.product([0, 1], repeat=n)]
    uneven = sum(heads >= most for heads in throws) + sum(n - heads >= most for heads in throws)
    assert mcnemar(wins, losses) == pytest.approx(min(1.0, uneven / len(throws)))


def test_p_value_of_a_textbook_table_and_of_thousands() -> None:
    assert mcnemar(2, 8) == pytest.approx(0.109375)  # 2 (1 + 10 + 45) / 1024
    assert mcnemar(4400, 4600) == pytest.approx(0.0358, abs=3e-4)  # normal: |z| = 199 / sqrt(9000)
    assert mcnemar(0, 4000) == pytest.approx(0.0, abs=1e-300)


QUESTIONS = [{"question_id": i, "image": f"{i}.png", "text": f"Is {i}?", "label": "yes"} for i in range(6)]


def test_runs_are_compared_question_by_question() -> None:
    ours, theirs = ["yes", "yes", "yes", "no", "no", "yes"], ["no", "no", "yes", "no", "yes", "no"]
    assert compared(QUESTIONS, ours, theirs, pope.is_correct) == {
        **{"accuracy": pytest.approx(2 / 6), "difference": pytest.approx(2 / 6)},
        **{"better": 3, "worse": 1, "equal": 2, "p_value": pytest.approx(2 * 5 / 16)},
    }


def test_other_run_is_joined_by_id_and_refused_if_it_answers_other_questions(tmp_path: Path) -> None:
    rows = [{"question_id": i, "text": str(i)} for i in range(6)]
    write_rows(tmp_path / "answers.jsonl", rows[::-1])
    assert texts_of(tmp_path, QUESTIONS) == ["0", "1", "2", "3", "4", "5"]
    with pytest.raises(EvalError, match=r"V601.*1 extra answers: 5"):
        texts_of(tmp_path, QUESTIONS[:5])
    with pytest.raises(ConfigError, match=r"C102.*answers\.jsonl"):
        texts_of(tmp_path / "absent", QUESTIONS)


class Blanks:
    """Grey pictures of the size in the name."""

    def blank_image(self, image: Path | Image.Image) -> Image.Image:
        assert isinstance(image, Path)
        width, height = map(int, image.stem.split("-")[0].split("x"))
        return Image.new("RGB", (width, height), "grey")


PATHS = [Path(name) for name in ("4x3-a.png", "2x5-b.png", "4x3-a.png", "4x3-c.png")]


def test_no_ablation_shows_the_images() -> None:
    assert ablated(Blanks(), PATHS, "none") == PATHS


def test_shuffled_images_are_all_others_and_the_same_wherever_one_stood() -> None:
    for count in range(2, 20):
        paths = [Path(f"{i}.png") for i in range(count)]
        shown = ablated(Blanks(), paths + paths, "shuffle")
        assert sorted(map(str, shown[:count])) == sorted(map(str, paths))
        assert all(new != old for new, old in zip(shown, paths + paths, strict=True))
        assert shown[:count] == shown[count:] == ablated(Blanks(), paths[::-1], "shuffle")[::-1]
    with pytest.raises(ConfigError, match=r"C102.*two images"):
        ablated(Blanks(), [PATHS[0]] * 3, "shuffle")


def test_noise_has_the_size_of_the_image_and_is_the_same_every_time() -> None:
    shown = [p for p in ablated(Blanks(), PATHS * 2, "noise") if isinstance(p, Image.Image)]
    assert [p.size for p in shown[:4]] == [(4, 3), (2, 5), (4, 3), (4, 3)]
    assert [p.tobytes() for p in shown[:4]] == [p.tobytes() for p in shown[4:]]
    large = ablated(Blanks(), [Path("100x100-a.png")], "noise")[0]
    assert isinstance(large, Image.Image)
    assert set(large.tobytes()) == set(range(256))
    assert sum(large.tobytes()) / 30000 == pytest.approx(127.5, abs=2)


def test_unknown_ablation_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="no ablation 'blnk'; did you mean 'blank'"):
        ablated(Blanks(), PATHS, "blnk")


def test_command_compares_given_answers_with_another_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{**q, "category": "c"} for q in QUESTIONS]
    write_rows(tmp_path / "q.jsonl", rows)
    write_rows(tmp_path / "a.jsonl", [{"question_id": i, "text": "yes"} for i in range(6)])
    write_rows(tmp_path / "answers.jsonl", [{"question_id": i, "text": "no"} for i in range(6)])
    for main in (pope.main, short.main):
        main([f"questions={tmp_path / 'q.jsonl'}", f"answers={tmp_path / 'a.jsonl'}", f"compare={tmp_path}"])
        found = json.loads(capsys.readouterr().out)["compare"]
        assert found == {
            **{"with": str(tmp_path), "accuracy": 0.0, "difference": 1.0},
            **{"better": 6, "worse": 0, "equal": 0, "p_value": pytest.approx(1 / 32)},
        }
