"""POPE: the official parser and metrics, and a join that refuses instead of mis-scoring."""

from __future__ import annotations

import itertools
import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from vlmpeft.errors import ConfigError, EvalError, VlmpeftError, run_command
from vlmpeft.eval import pope

Rows = list[dict[str, Any]]

# (text, expected, rule of POPE evaluate.py that decides it)
PARSED = [
    # "keep the part before the first full stop"
    ("Yes. There is no dog.", "yes", "what follows the first stop is not read"),
    ("No. Yes.", "no", "what precedes it is"),
    ("1. No", "yes", "a list number ends the text"),
    ("A. No", "yes", "so does an option letter"),
    ("Mr. No", "yes", "so does an abbreviation"),
    ("Yes, I do. No, wait.", "yes", "the correction comes too late"),
    (".no", "yes", "an empty head has no token No, no or not"),
    ("no.", "no", "the stop itself is dropped"),
    ("No.5 is here", "no", "no space is needed after the stop"),
    ("The dog is 3.5 m away, no", "yes", "a decimal point is a stop too"),
    ("...no", "yes", "the head of an ellipsis is empty"),
    # "delete every comma", without putting a space there
    ("No,there is", "yes", "becomes 'Nothere is'"),
    ("No, there is", "no", "becomes 'No there is'"),
    ("no,", "no", "becomes 'no'"),
    (",no", "no", "becomes 'no'"),
    ("n,o", "no", "becomes 'no'"),
    ("yes,no", "yes", "becomes 'yesno'"),
    ("yes, no", "no", "becomes 'yes no'"),
    ("Well,no dog", "yes", "becomes 'Wellno dog'"),
    # "split on single spaces only"
    ("No\tdog", "yes", "a tab does not split"),
    ("No\n", "yes", "a line feed does not split"),
    ("No\nthere is none", "yes", "nor in the middle"),
    ("No\u00a0dog", "yes", "nor does a no-break space"),
    ("  no  ", "no", "surrounding spaces make empty tokens, no harm"),
    ("there is  no  dog", "no", "two spaces make an empty token between"),
    # "no if any token is exactly No, no or not"
    ("No", "no", "No"),
    ("no", "no", "no"),
    ("not", "no", "not"),
    ("There is not a dog", "no", "not anywhere in the text"),
    ("I see no dog", "no", "no anywhere in the text"),
    ("yes and no", "no", "one no is enough"),
    ("yes or not", "no", "one not is enough"),
    ("Not sure, but no", "no", "the second no decides, Not does not"),
    ("No dog but yes a cat", "no", "the order does not matter"),
    ("NO", "yes", "upper case is no token of the three"),
    ("Not", "yes", "a capital Not neither"),
    ("NOT", "yes", "nor NOT"),
    ("nO", "yes", "nor nO"),
    ("None", "yes", "exact tokens, not prefixes"),
    ("nope", "yes", "exact tokens, not prefixes"),
    ("Nothing", "yes", "exact tokens, not prefixes"),
    ("cannot", "yes", "exact tokens, not suffixes"),
    ("unknown", "yes", "exact tokens, not substrings"),
    ("snow", "yes", "exact tokens, not substrings"),
    ("No!", "yes", "only stops and commas are removed"),
    ("No;", "yes", "a semicolon sticks to the token"),
    ("No: none", "yes", "a colon sticks to the token"),
    ("no-one", "yes", "a hyphen does not split"),
    ("(No)", "yes", "brackets stick to the token"),
    ("**No**", "yes", "markdown sticks to the token"),
    ('"No"', "yes", "quotes stick to the token"),
    ("isn't", "yes", "a contraction is no token of the three"),
    ("I don't see any", "yes", "neither is this"),
    # "otherwise yes": there is no class for junk
    ("", "yes", "empty text"),
    (" ", "yes", "white space"),
    ("banana", "yes", "junk"),
    ("\u5426", "yes", "another language"),
    ("Yes", "yes", "Yes"),
    ("yes.", "yes", "a full stop is not held against it, as lmms-eval would"),
    ("YES", "yes", "yes is never looked for"),
]


@pytest.mark.parametrize(("text", "expected", "rule"), PARSED, ids=[repr(case[0]) for case in PARSED])
def test_parser_follows_the_official_rules(text: str, expected: str, rule: str) -> None:
    assert pope.parse_answer(text) == expected, rule


def by_regular_expression(text: str) -> str:
    """The same rules as one pattern over the head of the text: No, no or not with a space or an end on both sides."""
    head = "".join(itertools.takewhile(lambda c: c != ".", text))
    return "no" if re.search(r"(?<![^ ])(?:[Nn]o|not)(?![^ ])", "".join(c for c in head if c != ",")) else "yes"


def test_parser_agrees_with_one_regular_expression_on_random_texts() -> None:
    pieces = [
        "No",
        "no",
        "not",
        "Not",
        "yes",
        "Yes",
        " ",
        " ",
        " ",
        ".",
        ",",
        "\n",
        "\t",
        "\u00a0",
        "n",
        "o",
        "t",
        "!",
        "",
    ]
    draw = random.Random(0)
    texts = ["".join(draw.choices(pieces, k=draw.randrange(9))) for _ in range(20000)]
    assert {pope.parse_answer(text) for text in texts} == {"yes", "no"}
    assert [t for t in texts if pope.parse_answer(t) != by_regular_expression(t)] == []


@pytest.mark.parametrize("text", ["", " ", "banana", "None", "nope", "isn't", "I don't see any", "yesterday", "snow"])
def test_answer_without_a_yes_or_no_word_is_unparsable(text: str) -> None:
    assert pope.is_unparsable(text)


@pytest.mark.parametrize("text", ["Yes", "NO", "**No**", "1. No", "Not.", "No\n", "yes!", "(no)"])
def test_answer_with_a_yes_or_no_word_is_not_unparsable_even_where_the_parser_misses_it(text: str) -> None:
    assert not pope.is_unparsable(text)


def rows(labels: str, texts: list[str], first: int = 1) -> tuple[Rows, Rows]:
    """Questions with labels given as letters y and n, and their answers."""
    questions: Rows = []
    answers: Rows = []
    for number, (label, text) in enumerate(zip(labels, texts, strict=True), start=first):
        asked = f"Is there a thing {number} in the image?"
        truth = {"y": "yes", "n": "no"}[label]
        questions.append({"question_id": number, "image": f"{number}.jpg", "text": asked, "label": truth})
        answers.append({"question_id": number, "text": text})
    return questions, answers


# labels yyyyynnnnn; 3 of 5 yes found (fn 2), 4 of 5 no found (fp 1)
TEN = rows("yyyyynnnnn", ["Yes", "yes, it is", "", "No", "not there", "no", "No", "No.", "no,", "isn't"])


def test_metrics_of_ten_questions_equal_those_worked_out_by_hand() -> None:
    metrics = pope.score(*TEN)
    assert {k: metrics[k] for k in ("tp", "fp", "tn", "fn", "n")} == {"tp": 3, "fp": 1, "tn": 4, "fn": 2, "n": 10}
    assert metrics["accuracy"] == pytest.approx(7 / 10)
    assert metrics["precision"] == pytest.approx(3 / 4)
    assert metrics["recall"] == pytest.approx(3 / 5)
    assert metrics["f1"] == pytest.approx(2 / 3)  # 2 * 0.75 * 0.6 / 1.35
    assert metrics["yes_ratio"] == pytest.approx(4 / 10)  # of the predictions; 0.5 would be of the labels
    assert (metrics["unparsable"], metrics["empty"]) == (2, 1)  # "" and "isn't", both counted as yes
    assert "auc" not in metrics


def test_metrics_agree_with_closed_forms_on_random_confusions() -> None:
    draw = random.Random(1)
    for _ in range(200):
        n = draw.randrange(1, 30)
        truth = [draw.random() < 0.5 for _ in range(n)]
        said = [draw.random() < 0.5 for _ in range(n)]
        metrics = pope.score(*rows("".join("ny"[t] for t in truth), [["No", "Yes"][s] for s in said]))
        both, either = sum(t and s for t, s in zip(truth, said, strict=True)), sum(truth) + sum(said)
        assert metrics["accuracy"] == pytest.approx(1 - sum(t ^ s for t, s in zip(truth, said, strict=True)) / n)
        assert metrics["f1"] == pytest.approx(2 * both / either if either else 0.0)  # Dice coefficient
        assert metrics["precision"] * sum(said) == pytest.approx(both)
        assert metrics["recall"] * sum(truth) == pytest.approx(both)
        assert metrics["yes_ratio"] * n == pytest.approx(sum(said))


def test_always_yes_on_a_balanced_file_scores_two_thirds_f1() -> None:
    metrics = pope.score(*rows("yn" * 1500, ["Yes"] * 3000))
    assert (metrics["accuracy"], metrics["recall"], metrics["yes_ratio"]) == (0.5, 1.0, 1.0)
    assert metrics["f1"] == pytest.approx(0.6667, abs=1e-4)


@pytest.mark.parametrize(("labels", "text"), [("yn", "No"), ("nn", "Yes"), ("nn", "No"), ("yy", "No")])
def test_division_by_zero_gives_zero_where_the_official_script_crashes(labels: str, text: str) -> None:
    metrics = pope.score(*rows(labels, [text, text]))
    assert metrics["f1"] == 0.0
    assert metrics["precision"] == 0.0


def test_no_questions_at_all_give_zeros() -> None:
    metrics = pope.score([], [])
    assert metrics["n"] == 0
    assert metrics["accuracy"] == metrics["f1"] == metrics["yes_ratio"] == 0.0


def test_junk_counts_as_yes_in_precision_and_recall_too() -> None:
    metrics = pope.score(*rows("yn", ["banana", "banana"]))
    assert (metrics["tp"], metrics["fp"], metrics["unparsable"]) == (1, 1, 2)


def test_order_of_answers_and_of_questions_does_not_change_the_score() -> None:
    questions, answers = TEN
    expected = pope.score(questions, answers)
    for seed in range(20):
        draw = random.Random(seed)
        assert pope.score(draw.sample(questions, 10), draw.sample(answers, 10)) == expected


def test_official_field_name_answer_and_text_ids_are_accepted() -> None:
    questions, answers = TEN
    renamed = [{"question_id": str(a["question_id"]), "answer": a["text"]} for a in answers]
    assert pope.score(questions, renamed) == pope.score(questions, answers)


def refused(questions: Rows, answers: Rows, code: str = "V601") -> str:
    with pytest.raises(EvalError) as caught:
        pope.score(questions, answers)
    assert caught.value.code == code
    return caught.value.line()


def test_missing_extra_and_repeated_answers_are_refused_and_listed() -> None:
    questions, answers = TEN
    other = {"question_id": 77, "text": "No"}
    line = refused(questions, [*answers[:1], *answers[3:], answers[4], other])
    assert "2 missing answers: 2, 3" in line
    assert "1 extra answers: 77" in line
    assert "1 repeated answers: 5" in line


@pytest.mark.parametrize("index", range(10))
def test_any_one_answer_dropped_or_doubled_is_refused(index: int) -> None:
    questions, answers = TEN
    assert "missing" in refused(questions, answers[:index] + answers[index + 1 :])
    assert "repeated" in refused(questions, [*answers, answers[index]])


def test_repeated_question_ids_are_refused() -> None:
    questions, answers = TEN
    assert "1 repeated questions: 1" in refused([*questions, questions[0]], answers)


def test_long_lists_of_ids_are_cut_with_their_number() -> None:
    questions, _ = rows("yn" * 1500, ["Yes"] * 3000)
    line = refused(questions, [])
    assert "3000 missing answers: 1, 2, 3" in line
    assert "and 2980 more" in line


def test_answers_to_the_3000_row_file_are_refused_on_the_2910_row_file() -> None:
    questions, answers = rows("yn" * 1500, ["Yes"] * 3000)
    assert "90 extra answers" in refused(questions[:2910], answers)


def test_answers_to_another_setting_with_the_same_ids_are_refused() -> None:
    questions, answers = TEN
    prompted = [{**a, "prompt": q["text"] + pope.SUFFIX} for q, a in zip(questions, answers, strict=True)]
    assert pope.score(questions, prompted) == pope.score(questions, answers)
    other = [{**q, "text": f"Is there a cat in the image, {q['question_id']}?"} for q in questions]
    assert "10 of 10 answers were given to another question" in refused(other, prompted)


def test_suffix_in_the_question_file_and_not_in_the_answers_is_no_other_question() -> None:
    questions, answers = TEN
    asked = [{**a, "question": q["text"]} for q, a in zip(questions, answers, strict=True)]
    assert pope.score([{**q, "text": q["text"] + pope.SUFFIX} for q in questions], asked) == pope.score(*TEN)


def test_answers_about_another_image_are_refused() -> None:
    questions, answers = TEN
    assert "1 of 10" in refused(questions, [{**answers[0], "image": "9.jpg"}, *answers[1:]])


def test_official_answers_without_ids_are_never_joined_by_position() -> None:
    questions, answers = TEN
    official = [{"question": q["text"], "answer": a["text"]} for q, a in zip(questions, answers, strict=True)]
    assert "nothing is joined by position" in refused(questions, official)


def test_answers_with_image_and_question_join_by_both() -> None:
    questions, answers = TEN
    named = [
        {"image": q["image"], "question": q["text"], "answer": a["text"]}
        for q, a in zip(questions, answers, strict=True)
    ]
    assert pope.score(questions, named[::-1]) == pope.score(questions, answers)
    assert "1 missing answers: 3.jpg/Is there a thing 3" in refused(questions, named[:2] + named[3:])
    moved = [{**named[0], "question": named[0]["question"].replace("image", "imange")}, *named[1:]]
    assert "1 extra answers" in refused(questions, moved)  # the old revision's spelling is another question


def test_answers_partly_without_ids_are_refused() -> None:
    questions, answers = TEN
    assert "without question_id: rows 10;" in refused(questions, [*answers[:9], {"text": "No"}])


@pytest.mark.parametrize("label", ["Yes", "", None, 1, "maybe"])
def test_label_other_than_yes_or_no_is_refused(label: object) -> None:
    questions, answers = rows("yn", ["Yes", "No"])
    assert "label must be 'yes' or 'no'" in refused([{**questions[0], "label": label}, questions[1]], answers, "V602")


@pytest.mark.parametrize("change", [{"text": None}, {"text": 1}, {"text": ["No"]}])
def test_answer_whose_text_is_not_text_is_refused(change: dict[str, object]) -> None:
    questions, answers = rows("yn", ["Yes", "No"])
    assert "the answer 1 has no text" in refused(questions, [{**answers[0], **change}, answers[1]], "V602")


@pytest.mark.parametrize("number", [None, 1.0, True, [1]])
def test_id_that_is_neither_integer_nor_text_is_refused(number: object) -> None:
    questions, answers = rows("yn", ["Yes", "No"])
    assert "question_id" in refused(questions, [{**answers[0], "question_id": number}, answers[1]], "V602")


def every_pair(margins: list[float], labels: list[bool]) -> float:
    """The definition: the share of (yes, no) pairs in which the yes has the larger margin, ties half."""
    yes = [m for m, label in zip(margins, labels, strict=True) if label]
    no = [m for m, label in zip(margins, labels, strict=True) if not label]
    return sum((a > b) + 0.5 * (a == b) for a in yes for b in no) / (len(yes) * len(no)) if yes and no else 0.0


def test_auc_equals_the_count_over_all_pairs_with_and_without_ties() -> None:
    draw = random.Random(2)
    for _ in range(300):
        n = draw.randrange(1, 40)
        margins = [draw.choice([draw.gauss(0, 1), float(draw.randrange(-2, 3))]) for _ in range(n)]
        labels = [draw.random() < 0.4 for _ in range(n)]
        assert pope.auc(margins, labels) == pytest.approx(every_pair(margins, labels))


def test_auc_is_one_for_a_perfect_half_for_a_constant_and_zero_for_an_inverted_ranking() -> None:
    labels = [True, True, False, False, False]
    assert pope.auc([2.0, 1.0, 0.0, -1.0, -2.0], labels) == 1.0
    assert pope.auc([0.0] * 5, labels) == 0.5
    assert pope.auc([-2.0, -1.0, 0.0, 1.0, 2.0], labels) == 0.0
    assert pope.auc([1.0, 2.0], [True, True]) == 0.0  # nothing to compare with


def test_auc_is_reported_when_every_answer_has_a_margin() -> None:
    questions, answers = rows("ynyn", ["Yes", "No", "No", "Yes"])
    margins = [{**a, "margin": m} for a, m in zip(answers, [2.0, -1, 0.5, 0.5], strict=True)]
    assert pope.score(questions, margins)["auc"] == pytest.approx(3.5 / 4)
    assert pope.score(questions, margins[::-1])["auc"] == pytest.approx(3.5 / 4)
    assert "auc" not in pope.score(questions, [*margins[:3], {**margins[3], "margin": None}])
    assert "margin must be a number" in refused(
        questions, [{**margins[0], "margin": float("nan")}, *margins[1:]], "V602"
    )


def three_settings() -> tuple[Rows, Rows]:
    """Ids 1..4 in each setting; 4, 3 and 2 right answers."""
    questions: Rows = []
    answers: Rows = []
    said = {"random": "ynyn", "popular": "ynyy", "adversarial": "yyyy"}
    for setting, letters in said.items():
        q, a = rows("ynyn", [{"y": "Yes", "n": "No"}[letter] for letter in letters])
        questions += [{**row, "setting": setting} for row in q]
        answers += [{**row, "setting": setting} for row in a]
    return questions, answers


def test_settings_are_scored_apart_and_averaged() -> None:
    metrics = pope.score_settings(*three_settings())
    assert list(metrics["settings"]) == ["random", "popular", "adversarial"]
    assert [m["accuracy"] for m in metrics["settings"].values()] == [1.0, 0.75, 0.5]
    assert metrics["mean_accuracy"] == pytest.approx(0.75)
    assert metrics["mean_f1"] == pytest.approx((1 + 0.8 + 2 / 3) / 3)  # not the F1 of the pooled rows, 12 / 15
    assert metrics["n"] == 12


def test_ids_repeated_across_settings_need_the_setting_in_the_answers() -> None:
    questions, answers = three_settings()
    draw = random.Random(3)
    assert pope.score_settings(questions, draw.sample(answers, 12)) == pope.score_settings(questions, answers)
    assert "repeated" in refused(questions, [{k: v for k, v in a.items() if k != "setting"} for a in answers])
    swapped = [{**a, "setting": "popular" if a["setting"] == "random" else a["setting"]} for a in answers]
    assert "missing answers: random/1" in refused(questions, swapped)


def test_globally_unique_ids_need_no_setting_in_the_answers() -> None:
    questions, answers = three_settings()
    unique = [{**q, "question_id": i} for i, q in enumerate(questions)]
    bare = [{"question_id": i, "text": a["text"]} for i, a in enumerate(answers)]
    assert pope.score_settings(unique, bare) == pope.score_settings(questions, answers)


def save(path: Path, content: Rows, end: str = "\n") -> Path:
    path.write_bytes("".join(json.dumps(row) + end for row in content).encode())
    return path


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "vlmpeft.eval.pope", *arguments], capture_output=True, text=True)


def test_command_scores_9000_answers_in_under_a_second_of_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions, answers = rows("yn" * 4500, ["Yes", "No"] * 4500)
    q, a = save(tmp_path / "q.json", questions), save(tmp_path / "a.jsonl", answers[::-1])
    began = time.process_time()
    assert run_command(pope.main, [f"questions={q}", f"answers={a}"]) == 0
    assert time.process_time() - began < 1
    assert json.loads(capsys.readouterr().out)["accuracy"] == 1.0


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
    ("name", "n", "noted"),
    [("coco_pope_random.json", 2910, True), ("coco_pope_random.json", 3000, False), ("popular.json", 2910, False)],
)
def test_the_2910_row_revision_of_random_is_recognised(
    name: str, n: int, noted: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions, answers = rows("yn" * (n // 2), ["Yes", "No"] * (n // 2))
    q, a = save(tmp_path / name, questions, end="\r\n"), save(tmp_path / "a.jsonl", answers)
    assert run_command(pope.main, [f"questions={q}", f"answers={a}"]) == 0
    assert ("2910" in json.loads(capsys.readouterr().out).get("revision", "")) is noted


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
