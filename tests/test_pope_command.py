"""`python -m vlmpeft.eval.pope` on given answers: what it prints, refuses and imports."""

from __future__ import annotations

import cProfile
import json
import subprocess
import sys
from pathlib import Path

import pytest
from pope_rows import TEN, Rows, rows, three_settings

from vlmpeft.errors import ConfigError, VlmpeftError, run_command
from vlmpeft.eval import pope


def save(path: Path, content: Rows, end: str = "\n") -> Path:
    path.write_bytes("".join(json.dumps(row) + end for row in content).encode())
    return path


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "vlmpeft.eval.pope", *arguments], capture_output=True, text=True)


def calls_to_score(folder: Path, answers: int) -> int:
    """How many functions the command calls to score so many answers, all of them right."""
    questions, given = rows("yn" * (answers // 2), ["Yes", "No"] * (answers // 2))
    q, a = save(folder / f"q{answers}.json", questions), save(folder / f"a{answers}.jsonl", given[::-1])
    profile = cProfile.Profile()
    assert profile.runcall(run_command, pope.main, [f"questions={q}", f"answers={a}"]) == 0
    return sum(entry.callcount for entry in profile.getstats())


def test_the_work_of_scoring_grows_with_the_answers_and_no_faster(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few, many = calls_to_score(tmp_path, 900), calls_to_score(tmp_path, 9000)
    assert many < 10.5 * few
    assert capsys.readouterr().out.count('"accuracy": 1.0') == 2
    assert many < 150 * 9000


def test_scoring_imports_no_torch(tmp_path: Path) -> None:
    q, a = save(tmp_path / "q.json", TEN[0]), save(tmp_path / "a.jsonl", TEN[1])
    code = (
        "import sys; from vlmpeft.eval import pope; "
        f"pope.main(['questions={q}', 'answers={a}']); "
        "heavy = {'torch', 'transformers', 'PIL', 'numpy', 'tqdm'} & set(sys.modules); sys.exit(' '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["f1"] == pytest.approx(2 / 3)


def test_command_scores_three_files_with_one_answer_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions, answers = three_settings()
    files = []
    for setting in ("random", "popular", "adversarial"):
        own = [{k: v for k, v in q.items() if k != "setting"} for q in questions if q["setting"] == setting]
        files.append(save(tmp_path / f"{setting}.json", own, end="\r\n"))
    a = save(tmp_path / "answers.jsonl", answers)
    assert run_command(pope.main, [f"questions={','.join(map(str, files))}", f"answers={a}"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == {"benchmark": "pope", "parser": "official", **pope.score_settings(questions, answers)}


@pytest.mark.parametrize(
    ("name", "n", "revision"),
    [
        ("coco_pope_random.json", 2910, "2910-row"),
        ("coco_pope_random.json", 3000, "3000-row"),
        ("coco_pope_random.json", 2908, ""),
        ("popular.json", 2910, ""),
    ],
)
def test_both_revisions_of_random_are_recognised_by_their_rows(
    name: str, n: int, revision: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions, answers = rows("yn" * (n // 2), ["Yes", "No"] * (n // 2))
    q, a = save(tmp_path / name, questions, end="\r\n"), save(tmp_path / "a.jsonl", answers)
    assert run_command(pope.main, [f"questions={q}", f"answers={a}"]) == 0
    assert json.loads(capsys.readouterr().out).get("revision", "")[:8] == revision


@pytest.mark.parametrize(
    ("asked", "files", "keyed"),
    [(2910, 1, "question_id"), (3000, 1, "image and question"), (3000, 3, "question_id")],
)
def test_answers_to_the_other_revision_of_random_are_refused_by_its_name(
    asked: int, files: int, keyed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = 2910 + 3000 - asked
    names = ["coco_pope_random", "coco_pope_popular", "coco_pope_adversarial"][:files]
    paths, said = [], []
    for name in names:
        lengths = (asked, given) if "random" in name else (3000, 3000)
        questions, answered = (rows("yn" * (n // 2), ["Yes", "No"] * (n // 2))[0] for n in lengths)
        paths.append(str(save(tmp_path / f"{name}.json", questions)))
        names_of = {"setting": name} if files > 1 else {}
        for q in answered:
            key = {"question_id": q["question_id"]} if keyed == "question_id" else {}
            said.append({**names_of, **(key or {"image": q["image"], "question": q["text"]}), "answer": q["label"]})
    a = save(tmp_path / "a.jsonl", said)
    assert run_command(pope.main, [f"questions={','.join(paths)}", f"answers={a}"]) == 8
    error = capsys.readouterr().err
    assert f"the answers are to the {given}-row revision of random, the questions of the {asked}-row one." in error
    assert f"90 {'extra' if given > asked else 'missing'} answers: " in error
    assert f"Fix: score them against the file of {given} rows" in error


def test_other_numbers_of_answers_are_no_revision(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions, answers = rows("yn" * 1500, ["Yes", "No"] * 1500)
    q, a = save(tmp_path / "random.json", questions), save(tmp_path / "a.jsonl", answers[:2000])
    assert run_command(pope.main, [f"questions={q}", f"answers={a}"]) == 8
    assert "revision" not in capsys.readouterr().err


def test_two_question_files_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    q, same = save(tmp_path / "q.json", TEN[0]), save(tmp_path / "b" / "q.json", TEN[0])
    with pytest.raises(ConfigError, match="two files share a name"):
        pope.read_questions(f"{q},{same}")


def test_command_exits_with_8_for_answers_that_do_not_match(tmp_path: Path) -> None:
    q, a = save(tmp_path / "q.json", TEN[0]), save(tmp_path / "a.jsonl", TEN[1][1:])
    done = command(f"questions={q}", f"answers={a}")
    assert (done.returncode, done.stdout) == (8, "")
    assert done.stderr.startswith("vlmpeft: error[V601] 10 questions and 9 answers do not match: 1 missing answers: 1.")
    assert done.stderr.count("\n") == 1


def test_command_exits_with_3_for_a_missing_image_before_a_model_is_looked_for(tmp_path: Path) -> None:
    q = save(tmp_path / "q.json", TEN[0])
    done = command("model=nowhere", f"questions={q}", f"images={tmp_path}", f"out={tmp_path / 'out'}")
    assert done.returncode == 3
    assert done.stderr.startswith("vlmpeft: error[D103] no image '1.jpg'")
    assert not (tmp_path / "out").exists()


def test_command_exits_with_2_for_a_misspelled_key() -> None:
    done = command("model=m", "question=q.json")
    assert done.returncode == 2
    assert "[C101] no key 'question'; did you mean 'questions'?" in done.stderr


def test_label_is_checked_while_the_file_is_read(tmp_path: Path) -> None:
    q = save(tmp_path / "q.json", [{**TEN[0][0], "label": "Yes"}])
    with pytest.raises(VlmpeftError, match="V602"):
        pope.read_questions(str(q))
