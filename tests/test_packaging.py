"""What a user installs: source archive -> wheel -> installed package, with the four root folders inside."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from lmms_tasks import rows, write_tasks
from native import native_directory

import vlmpeft

ROOT = Path(__file__).parents[1]
HOOK = "import sys, setuptools.build_meta as m; print(getattr(m, sys.argv[1])(sys.argv[2]))"


def run(arguments: list[str], where: Path, **environment: str) -> str:
    """Run Python in a folder. Returns: what it printed."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1", **environment}
    found = subprocess.run(
        [sys.executable, *arguments], cwd=where, env=env, capture_output=True, text=True, timeout=180
    )
    assert found.returncode == 0, found.stderr[-3000:]
    return found.stdout.strip()


def build(kind: str, source: Path, out: Path) -> Path:
    """Call the build backend as pip does. Returns: the archive."""
    return out / run(["-c", HOOK, kind, str(out)], source).splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that comes out of the source archive, not of the checkout."""
    folder = tmp_path_factory.mktemp("package")
    ignored = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "tests", "__pycache__")
    shutil.copytree(ROOT, folder / "checkout", symlinks=True, ignore=ignored)
    archive = build("build_sdist", folder / "checkout", folder)
    with tarfile.open(archive) as opened:
        opened.extractall(folder / "unpacked", filter="data")
    return build("build_wheel", next((folder / "unpacked").iterdir()), folder)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    options = [
        "--no-deps",
        "--no-index",
        "--no-compile",
        "--quiet",
        "--disable-pip-version-check",
        "--target",
        str(target),
    ]
    run(["-m", "pip", "install", *options, str(wheel)], target)
    return target


def test_the_wheel_holds_every_module_and_recipe_once(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    expected = {p.relative_to(ROOT).as_posix() for p in (ROOT / "vlmpeft").rglob("*.py")} | {"vlmpeft/py.typed"}
    for folder in ("projectors", "steering", "eval", "recipes"):
        files = [file for kind in ("py", "yaml", "jsonl") for file in (ROOT / folder).rglob(f"*.{kind}")]
        expected |= {f"vlmpeft/{p.relative_to(ROOT).as_posix()}" for p in files}
    assert sorted(n for n in names if ".dist-info/" not in n) == sorted(expected)
    assert len(names) == len(set(names))


def test_the_installed_package_works_without_the_checkout(installed: Path, tmp_path: Path) -> None:
    code = (
        "import vlmpeft, vlmpeft.projectors, vlmpeft.steering, vlmpeft.eval.pope, vlmpeft.tuners;"
        "from vlmpeft.config import recipe_names;"
        "names = [*recipe_names(), *recipe_names(comparisons=True)];"
        "print(vlmpeft.__file__, vlmpeft.projectors.__file__, *names, sep='\\n');"
        "print(vlmpeft.load_recipe('llava_two_stage').projector.name);"
        "print(vlmpeft.projectors.PROJECTORS.build('ldp', 8, 16).num_tokens(16))"
    )
    package, projectors, *recipes, name, tokens = run(["-c", code], tmp_path, PYTHONPATH=str(installed)).splitlines()
    assert Path(package).parent == installed / "vlmpeft"
    assert Path(projectors).parent == installed / "vlmpeft" / "projectors"
    assert sorted(recipes) == sorted(p.stem for p in (ROOT / "recipes").glob("*.yaml"))
    assert (name, tokens) == ("mlp2x_gelu", "4")


def test_the_installed_script_runs(installed: Path, tmp_path: Path) -> None:
    out = run([str(installed / "bin" / "vlmpeft"), "--help"], tmp_path, PYTHONPATH=str(installed))
    assert out.startswith("usage: vlmpeft <command>")


def test_top_level_names_are_ours_alone(wheel: Path) -> None:
    top = {n.split("/")[0] for n in zipfile.ZipFile(wheel).namelist()}
    assert {t for t in top if not t.endswith(".dist-info")} == {"vlmpeft"}


def test_lmms_eval_runs_the_installed_package_by_its_name(installed: Path, tmp_path: Path) -> None:
    """What a user types after `pip install vlmpeft lmms-eval`."""
    tasks = write_tasks(tmp_path)
    model = native_directory(tmp_path / "m")
    options = ["--model", "vlmpeft", "--model_args", f"pretrained={model},device=cpu", "--batch_size", "4"]
    options += ["--tasks", "one,choice", "--include_path", str(tasks), "--output_path", "out", "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "NO_COLOR": "1"}
    shown = run(["-m", "lmms_eval", *options], tmp_path, PYTHONPATH=str(installed), **offline)
    assert "|choice|" in shown.replace(" ", "")
    [samples] = (tmp_path / "out").rglob("*_samples_one.jsonl")
    said = [json.loads(line)["filtered_resps"] for line in samples.read_text(encoding="utf-8").splitlines()]
    bundle = vlmpeft.load(model, device="cpu")
    assert said == [bundle.generate(row["image"], row["question"], max_new_tokens=6) for row in rows()]
