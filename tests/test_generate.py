"""The generate command: images, prompt, and what it refuses before a model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import vlmpeft
from vlmpeft import generate
from vlmpeft.errors import run_command


class Stub:
    """Stands for a loaded bundle; keeps what it is asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def load(self, directory: str, device: str = "auto") -> Stub:
        self.asked += [directory, device]
        return self

    def generate(self, images: list[Path], prompt: str, max_new_tokens: int) -> str:
        self.asked += [images, prompt, max_new_tokens]
        return "a red square"


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    made = Stub()
    monkeypatch.setattr(vlmpeft, "load", made.load)
    return made


def test_the_answer_goes_to_stdout_alone(stub: Stub, data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = data_dir / "images" / "000.png"
    assert run_command(generate.main, ["model=m", f"image={image}", "prompt=What = shown?", "max_new_tokens=7"]) == 0
    assert capsys.readouterr() == ("a red square\n", "")
    assert stub.asked == ["m", "auto", [image], "What = shown?", 7]


def test_several_images_and_none(stub: Stub, data_dir: Path) -> None:
    first, second = (data_dir / "images" / f"00{i}.png" for i in (0, 1))
    run_command(generate.main, ["model=m", f"image={first},{second}", "prompt=x", "device=cpu"])
    run_command(generate.main, ["model=m", "prompt=x"])
    assert stub.asked[1:3] == ["cpu", [first, second]]
    assert stub.asked[7] == []


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "error[C102] model is not given"),
        (["model=m"], 2, "error[C102] prompt is not given"),
        (["model=m", "prompt=x", "image=none.jpg"], 3, "error[D103] no image file none.jpg"),
        (["model=m", "prompt=x", "max_new_tokens=-1"], 2, "error[C102] max_new_tokens=-1"),
        (["model=m", "prompt=x", "imag=a.jpg"], 2, "did you mean 'image'?"),
    ],
)
def test_what_is_refused_before_loading(
    stub: Stub, capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, message: str
) -> None:
    assert run_command(generate.main, arguments) == status
    out, err = capsys.readouterr()
    assert message in err
    assert err.count("\n") == 1
    assert out == ""
    assert stub.asked == []


def test_a_directory_that_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(generate.main, [f"model={tmp_path}", "prompt=x"]) == 5
    assert "error[K202]" in capsys.readouterr().err


def test_help_prints_the_keys_with_their_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        generate.main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for key in ("model=...  required", "prompt=...  required", "image=", "max_new_tokens=128", "device=auto"):
        assert f"  {key}\n" in out
