"""Our models inside the released lmms-eval, on local tasks: answers, likelihoods, settings, and what it is refused."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lmms_tasks import rows, write_tasks
from native import native_directory
from tiny_processors import make_hf

import vlmpeft
from vlmpeft.build import Bundle
from vlmpeft.decode import Request
from vlmpeft.errors import ConfigError, EvalError
from vlmpeft.hf_vlm import load_hf
from vlmpeft.likelihood import Likelihood

CUT = "{max_new_tokens: 9, do_sample: true, temperature: 0.0, until: ['s', '\\x0f']}"


@pytest.fixture(scope="module")
def harness() -> Any:
    """`vlmpeft.eval.harness`, registered as an installed package's entry point registers it."""
    try:
        registry: Any = importlib.import_module("lmms_eval.models")
    except ModuleNotFoundError as error:
        pytest.fail(f"{error}: make install-dev installs lmms-eval, which these tests are about")
    module: Any = importlib.import_module("vlmpeft.eval.harness")
    registry.MODEL_REGISTRY_V2.register_manifest(module.manifest(), overwrite=True)
    return module


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return native_directory(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def bundle(directory: Path) -> Bundle:
    return vlmpeft.load(directory, device="cpu")


def evaluate(folder: Path, model: Any, arguments: str, tasks: list[str], batch_size: int) -> Any:
    """lmms-eval's own loop, offline and without its built-in tasks."""
    evaluator: Any = importlib.import_module("lmms_eval.evaluator")
    manager = importlib.import_module("lmms_eval.tasks").TaskManager(
        include_path=str(folder), include_defaults=False, verbosity="ERROR"
    )
    return evaluator.simple_evaluate(
        model, arguments, tasks=tasks, batch_size=batch_size, device="cpu", task_manager=manager, bootstrap_iters=0,
        process_docs_parallel=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"), two=CUT)


@pytest.fixture(scope="module")
def found(harness: Any, tasks: Path, directory: Path) -> Any:
    return evaluate(tasks, "vlmpeft", f"pretrained={directory}", ["one", "two", "choice"], 4)


def responses(found: Any, task: str) -> list[Any]:
    """What the model said, a list a document."""
    return [[resp[0] for resp in sample["resps"]] for sample in found["samples"][task]]


def test_answers_are_those_of_the_model_asked_one_by_one(found: Any, bundle: Bundle) -> None:
    expected = [bundle.generate(row["image"], row["question"], max_new_tokens=6) for row in rows()]
    assert responses(found, "one") == [[text] for text in expected]
    assert len(set(expected)) > 2


def test_several_images_stand_where_the_text_marks_them_and_until_ends_an_answer(found: Any, bundle: Bundle) -> None:
    pairs = [((row["image"], row["second"]), f"<image> or <image>: {row['question']}") for row in rows()]
    whole = [bundle.generate(list(images), prompt, max_new_tokens=9) for images, prompt in pairs]
    expected = [text.split("s")[0].split("\x0f")[0].strip() for text in whole]
    assert responses(found, "two") == [[text] for text in expected]
    assert len(set(whole)) > 2
    assert any(len(cut) < len(text) for cut, text in zip(expected, whole, strict=True))


def test_multiple_choice_takes_the_smallest_mean_loss(found: Any, bundle: Bundle) -> None:
    options = ["red", "green", "a blue image"]
    right = 0
    for row, answers in zip(rows(), responses(found, "choice"), strict=True):
        request = Request((row["image"],), row["question"], tuple(options))
        losses = [-f.log_probability / f.tokens for f in bundle.likelihoods([request])[0]]
        assert [loss for loss, _ in answers] == pytest.approx(losses, abs=1e-4)
        right += losses.index(min(losses)) == row["gold"]
    assert found["results"]["choice"]["acc,none"] == pytest.approx(right / 6)


def test_one_by_one_gives_the_same_and_the_object_can_be_used_again(
    harness: Any, tasks: Path, directory: Path, found: Any
) -> None:
    model = harness.Vlmpeft(str(directory), device="cpu", batch_size=1, likelihood="sum")
    for _ in range(2):  # lmms-eval deletes the modules of a model it is done with
        again = evaluate(tasks, model, "", ["one", "choice"], 1)
        assert responses(again, "one") == responses(found, "one")
    means = [loss for answers in responses(found, "choice") for loss, _ in answers]
    sums = [loss for answers in responses(again, "choice") for loss, _ in answers]
    encoder = model.answerer.turn_encoder()
    counts = [len(harness_tokens(encoder, option)) for option in ("red", "green", "a blue image")] * 6
    assert sums == pytest.approx([mean * n for mean, n in zip(means, counts, strict=True)], abs=1e-3)


def harness_tokens(encoder: Any, text: str) -> list[int]:
    """The tokens of an answer, counted by the tokenizer alone."""
    ids: list[int] = encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def request_of(arguments: tuple[Any, ...]) -> Any:
    return SimpleNamespace(args=arguments)


def told(harness: Any, monkeypatch: pytest.MonkeyPatch, documents: list[Any]) -> tuple[Any, list[Any]]:
    """A harness model around one that keeps what it is asked."""
    kept: list[Any] = []

    def answer(requests: list[Request], **options: Any) -> list[Any]:
        kept.append((requests, options))
        return [SimpleNamespace(text=f"{r.prompt}!") for r in requests]

    def likelihoods(requests: list[Request], **_: Any) -> list[Any]:
        kept.append(requests)
        return [[Likelihood(-4.0 - len(t), 2, True) for t in request.candidates] for request in requests]

    made = SimpleNamespace(answer=answer, likelihoods=likelihoods)
    monkeypatch.setattr(harness, "open_model", lambda name, device: made)
    model = harness.Vlmpeft("x", batch_size=2)
    model.task_dict = {"t": {"test": documents}}
    return model, kept


def test_requests_come_back_in_their_order_whatever_their_lengths(
    harness: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, kept = told(harness, monkeypatch, [None] * 70)
    settings = [{"max_new_tokens": 3 + i % 2, "until": ["7"]} for i in range(70)]
    asked = [request_of((f"q{i}", s, None, i, "t", "test")) for i, s in enumerate(settings)]
    assert model.generate_until(asked) == [f"q{i}!".split("7")[0] for i in range(70)]
    assert {options["max_new_tokens"] for _, options in kept} == {3, 4}
    assert max(len(requests) for requests, _ in kept) == 32  # sixteen batches of pictures at once
    assert settings[0] == {"max_new_tokens": 3, "until": ["7"]}


def test_equal_pictures_are_one_object_so_that_their_questions_share_features(
    harness: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, kept = told(harness, monkeypatch, rows())
    asked = [request_of(("?", {}, lambda doc: [doc["image"].copy()], i, "t", "test")) for i in range(6)]
    model.generate_until(asked)
    pictures = [request.images[0] for request in kept[0][0]]
    assert [pictures[i] is pictures[i + 1] for i in range(5)] == [True, False] * 2 + [True]


def test_likelihoods_of_callables_and_without_a_document(harness: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, kept = told(harness, monkeypatch, rows())
    show = lambda doc: [doc["image"]]  # noqa: E731
    asked = [("?", lambda doc: doc["answer"], show, 1, "t", "test"), ("", " red"), ("?", " yes", show, 1, "t", "test")]
    found = model.loglikelihood([request_of(arguments) for arguments in asked])
    assert [r.text for r in found] == [(3.0, True), (3.5, True), (3.5, True)]
    asked_of_model = [(request.prompt, len(request.images), request.candidates) for request in kept[0]]
    assert asked_of_model == [("?", 1, ("no", "yes")), ("", 0, ("red",))]  # one question, its answers together


def test_a_video_is_refused_with_task_and_document(harness: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = told(harness, monkeypatch, rows())
    with pytest.raises(EvalError, match=r"V602.*task t, document 3: shows a str, not an image"):
        model.generate_until([request_of(("?", {}, lambda doc: ["film.mp4"], 3, "t", "test"))])
    with pytest.raises(NotImplementedError, match="one round"):
        model.generate_until_multi_round([])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (16, ())),
        ({"max_new_tokens": 128, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False}, (128, ())),
        ({"max_new_tokens": 5, "temperature": 0.0, "do_sample": True, "top_k": 1}, (5, ())),
        ({"temperature": 0.7, "do_sample": False, "until": "\n"}, (16, ("\n",))),
        ({"until": ["a", "", "b"], "image_aspect_ratio": "pad", "repetition_penalty": 1.0}, (16, ("a", "b"))),
        ({"until": None, "max_new_tokens": None}, (16, ())),
    ],
)
def test_settings_that_greedy_decoding_honours(harness: Any, settings: dict[str, Any], expected: Any) -> None:
    assert harness.generation(settings) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_sample": True}, "samples .do_sample=True."),
        ({"temperature": 0.2}, "samples .temperature=0.2."),
        ({"do_sample": True, "temperature": 1.0}, "do_sample=True, temperature=1.0.*--gen_kwargs do_sample=false"),
        ({"num_beams": 3}, "num_beams=3.*--gen_kwargs num_beams=1"),
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2"),
        ({"max_tokens": 3}, "'max_tokens' is not known; did you mean 'max_new_tokens'"),
        ({"stop_sequences": ["x"]}, "'stop_sequences' is not known"),
    ],
)
def test_settings_that_it_is_not_are_refused_by_name(harness: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"C102.*{message}"):
        harness.generation(settings)


@pytest.mark.parametrize(
    ("ends", "text", "expected"),
    [
        ((), " Yes\n\nNo ", "Yes\n\nNo"),
        (("\n\n",), "Yes\n\nNo", "Yes"),
        (("b", "a"), "xyab", "xy"),
        (("Q:",), "Q: again", ""),
        (("z",), "Yes. ", "Yes."),
    ],
)
def test_the_first_of_the_ends_ends_an_answer(harness: Any, ends: Any, text: str, expected: str) -> None:
    assert harness.before(ends, text) == expected


def test_marks_that_are_no_pictures_are_text(harness: Any) -> None:
    assert harness.prompt("<image> a <image>", 2) == "<image> a <image>"
    assert harness.prompt("<image> a <image>", 1) == r"\<image> a \<image>"
    assert harness.prompt("<image>", 0) == r"\<image>"


def test_options_are_checked(harness: Any, directory: Path) -> None:
    with pytest.raises(ConfigError, match=r"C102.*likelihood=max"):
        harness.Vlmpeft(str(directory), likelihood="max")
    with pytest.raises(TypeError, match="pretraind"):
        harness.Vlmpeft.create_from_arg_string("pretraind=x", {"batch_size": 1})


def test_a_hugging_face_model_inside_lmms_eval(harness: Any, tasks: Path, tmp_path: Path) -> None:
    folder = make_hf(tmp_path / "m", "llava")
    found = evaluate(tasks, "vlmpeft", f"pretrained=hf:{folder}", ["one", "choice"], 3)
    model = load_hf(str(folder), "cpu")
    expected = [model.generate(row["image"], row["question"], max_new_tokens=6) for row in rows()]
    assert responses(found, "one") == [[text] for text in expected]
    assert len(responses(found, "choice")[0]) == 3
