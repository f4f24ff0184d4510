"""Recipe files of any content: read, or refused with C107 before anything is built from them."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmpeft.config import load_recipe
from vlmpeft.errors import ConfigError
from vlmpeft.yaml_file import MAX_BYTES, read_yaml_text

SMALL = "vision: {name: v}\nlanguage: {name: l}\nlora: {r: 3}\n"
BOMB = "a0: &a0 [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)


def write(folder: Path, content: bytes | str) -> str:
    path = folder / "mine.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


@pytest.mark.parametrize(
    "content",
    [
        SMALL,
        "\ufeff" + SMALL,
        SMALL.replace("\n", "\r\n"),
        "%YAML 1.1\n---\n" + SMALL,
        "vision: {name: v}\nlanguage: {name: l}\ntuners: {a: &x {kind: lora, r: 3}, b: {<<: *x, part: vision}}\n",
    ],
)
def test_a_file_with_a_bom_windows_lines_or_an_alias_is_read(content: str, tmp_path: Path) -> None:
    if content.startswith("x:"):
        content = (
            "vision: {name: v}\nlanguage: {name: l}\ntuners: {a: &x {kind: lora, r: 3}, b: {<<: *x, part: vision}}\n"
        )
    tuners = load_recipe(write(tmp_path, content)).stages["instruct"].tuners
    assert {t.r for t in tuners.values()} == {3}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("data: {images: a}\ndata: {images: b}\n", "found duplicate key data"),
        ("optim: {lr: 1, lr: 2}\n", "found duplicate key lr"),
        ("a: [1, 2", "not valid YAML"), ("a: b: c", "not valid YAML"), ("\ta: 1", "not valid YAML"),
        ("a: !!python/object:os.system x", "not valid YAML"),
        (b"\xff\xfe\x00", "cannot be read"), (b"a: \x00", "not valid YAML"), ("- a\n- b\n", "holds no sections"),
        ("stages: [a]\n", "holds no sections"), ("a: ${nothing}\n", "not valid YAML"),
        ("a: *nowhere\n", "not valid YAML"),
        ("a: &a [*a]\n", "alias *a stands inside or before"), ("a: " + "[" * 500, "nested deeper than 32"),
        ("a: " + "[" * 50_000, "nest"),  # PyYAML has a limit of its own
        ("".join(" " * i + "a:\n" for i in range(60)), "nested deeper than 32"), (BOMB, "by its aliases"),
        (b"# " + b"x" * 10_000_000, "10,000,002 bytes"), ("base: mine.yaml\n", "is based on itself"),
        (f"a: {'1' * 5000}\n", "not valid YAML"),
    ],
)  # fmt: skip
def test_what_is_no_recipe_is_refused_in_one_line(content: str | bytes, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(write(tmp_path, content))
    assert caught.value.code == "C107"
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 500


def test_files_that_are_based_on_each_other_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("stages: {one: {base: a.yaml}}\n")
    with pytest.raises(ConfigError, match=r"C107.*a\.yaml is based on itself"):
        load_recipe(str(tmp_path / "a.yaml"))


def test_the_limits_are_no_narrower_than_they_say(tmp_path: Path) -> None:
    text = "# " + "x" * (MAX_BYTES - 2)
    assert read_yaml_text(Path(write(tmp_path, text))) == text
    deep = "a: " + "[" * 30 + "]" * 30
    assert read_yaml_text(Path(write(tmp_path, deep))) == deep
