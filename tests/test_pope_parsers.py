"""POPE's other parsers: each case by hand from the rule beside it, and what their gaps do to the metrics."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from pope_rows import rows, three_settings

from vlmpeft.errors import ConfigError, run_command
from vlmpeft.eval import pope
from vlmpeft.eval.pope_parse import PARSERS, parser_of
from vlmpeft.eval.rows import write_rows

NEITHER = None
# (text, lmms-eval, VLMEvalKit, strict, why)
CASES = [
    ("Yes", "yes", "yes", "yes", "the word alone"),
    ("no", "no", "no", "no", "in any case"),
    ("NO", "no", "no", "no", "in any case"),
    (" Yes\n", "yes", "yes", "yes", "white space around it is stripped"),
    ("Yes.", NEITHER, "yes", "yes", "lmms-eval compares the whole text, the stop included"),
    ("No!", NEITHER, "no", NEITHER, "VLMEvalKit drops punctuation, strict allows a stop alone"),
    ("Yes..", NEITHER, "yes", NEITHER, "one stop"),
    ("(No)", NEITHER, "no", NEITHER, "brackets are punctuation"),
    ("Yes, there is", NEITHER, "yes", NEITHER, "a word of a sentence"),
    ("There is no dog.", NEITHER, "no", NEITHER, "a word of a sentence"),
    ("yes and no", NEITHER, NEITHER, NEITHER, "both words"),
    ("Yes. There is no dog", NEITHER, NEITHER, NEITHER, "both words, where the official parser stops at the stop"),
    ("not", NEITHER, NEITHER, NEITHER, "not is no word that VLMEvalKit knows"),
    ("There is not", NEITHER, NEITHER, NEITHER, "nor in a sentence"),
    ("isn't", NEITHER, NEITHER, NEITHER, "nor its short form"),
    ("nope", NEITHER, NEITHER, NEITHER, "words, not beginnings"),
    ("yesterday", NEITHER, NEITHER, NEITHER, "words, not beginnings"),
    ("unknown", NEITHER, NEITHER, NEITHER, "words, not parts"),
    ("", NEITHER, NEITHER, NEITHER, "nothing"),
    ("banana", NEITHER, NEITHER, NEITHER, "junk"),
    ("no no", NEITHER, "no", NEITHER, "the same word twice"),
]


@pytest.mark.parametrize(("text", "lmms_eval", "vlmevalkit", "strict", "why"), CASES, ids=[repr(c[0]) for c in CASES])
def test_each_parser_follows_its_own_rules(
    text: str, lmms_eval: str | None, vlmevalkit: str | None, strict: str | None, why: str
) -> None:
    found = {name: parser_of(name)(text) for name in PARSERS}
    assert found == {
        **{"official": pope.parse_answer(text), "lmms-eval": lmms_eval},
        **{"vlmevalkit": vlmevalkit, "strict": strict},
    }, why


def test_an_unknown_parser_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"C102.*no parser 'offical'; did you mean 'official'\?"):
        pope.score([], [], parser="offical")


# 6 yes and 4 no questions; a yes, a no and an unreadable answer to each kind
MIXED = rows("yyyyyynnnn", ["Yes", "Yes", "No", "It is.", "", "yes", "No", "no", "Yes", "It is."])


@pytest.mark.parametrize("parser", ["vlmevalkit", "strict"])
def test_what_cannot_be_read_is_wrong_and_for_recall_a_no(parser: str) -> None:
    metrics = pope.score(*MIXED, parser=parser)
    assert {k: metrics[k] for k in ("tp", "fn", "fp", "tn", "unparsable", "by_chance")} == {
        **{"tp": 3, "fn": 1, "fp": 1, "tn": 2, "unparsable": 3, "by_chance": 0}
    }
    assert metrics["accuracy"] == 5 / 10
    assert metrics["precision"] == 3 / 4
    assert metrics["recall"] == 3 / 6
    assert metrics["f1"] == pytest.approx(2 * 0.75 * 0.5 / 1.25)
    assert metrics["yes_ratio"] == 4 / 10


def test_lmms_eval_leaves_what_it_cannot_read_out_of_recall() -> None:
    metrics = pope.score(*MIXED, parser="lmms-eval")
    assert metrics["accuracy"] == 5 / 10
    assert metrics["precision"] == 3 / 4
    assert metrics["recall"] == 3 / 4  # explicit no alone is missed
    assert metrics["f1"] == pytest.approx(0.75)
    assert metrics["yes_ratio"] == 4 / 10  # of the predictions; lmms-eval's own is of the labels, always 1/2


def test_lmms_eval_scores_zero_where_every_answer_has_a_full_stop() -> None:
    metrics = pope.score(*rows("yn", ["Yes.", "No."]), parser="lmms-eval")
    assert (metrics["accuracy"], metrics["f1"], metrics["unparsable"]) == (0.0, 0.0, 2)
    assert pope.score(*rows("yn", ["Yes.", "No."]))["accuracy"] == 1.0


def test_metrics_agree_with_the_harness_formulas_on_random_answers() -> None:
    draw = random.Random(3)
    for _ in range(200):
        labels = "".join(draw.choice("yn") for _ in range(draw.randrange(1, 20)))
        texts = [draw.choice(["Yes", "no", "Yes.", "maybe"]) for _ in labels]
        said = [text.lower() for text in texts]
        truth = [{"y": "yes", "n": "no"}[letter] for letter in labels]
        pairs = list(zip(truth, said, strict=True))
        hit, false = pairs.count(("yes", "yes")), pairs.count(("no", "yes"))
        precision = hit / (hit + false) if hit + false else 0.0
        recall = hit / (hit + pairs.count(("yes", "no"))) if hit + pairs.count(("yes", "no")) else 0.0
        metrics = pope.score(*rows(labels, texts), parser="lmms-eval")
        assert metrics["accuracy"] == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))
        assert (metrics["precision"], metrics["recall"]) == pytest.approx((precision, recall))
        both = precision + recall
        assert metrics["f1"] == pytest.approx(2 * precision * recall / both if both else 0.0)


def test_settings_have_a_mean_as_llava_gives_and_a_total_as_the_harnesses_do() -> None:
    questions, answers = three_settings()
    metrics = pope.score_settings(questions, answers)
    f1 = [1.0, 2 * 2 / (2 * 2 + 1), 2 * 2 / (2 * 2 + 2)]  # tp 2; fp 0, 1, 2
    assert [m["f1"] for m in metrics["settings"].values()] == pytest.approx(f1)
    assert metrics["mean_f1"] == pytest.approx(sum(f1) / 3)
    assert metrics["pooled_f1"] == pytest.approx(2 * 6 / (2 * 6 + 3))
    assert metrics["mean_accuracy"] == metrics["pooled_accuracy"] == pytest.approx(9 / 12)
    assert (metrics["n"], metrics["unparsable"], metrics["by_chance"]) == (12, 0, 0)


@pytest.mark.parametrize("parser", PARSERS)
def test_the_command_names_its_parser(parser: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(tmp_path / "q.jsonl", MIXED[0])
    write_rows(tmp_path / "a.jsonl", MIXED[1])
    given = [f"questions={tmp_path / 'q.jsonl'}", f"answers={tmp_path / 'a.jsonl'}", f"parser={parser}"]
    assert run_command(pope.main, given) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["parser"] == parser
    assert metrics.items() >= pope.score(*MIXED, parser=parser).items()
    assert run_command(pope.main, [*given[:2], "parser=srict"]) == 2
    assert "did you mean 'strict'?" in capsys.readouterr().err
