"""Who may import whom, and what the package never does. Read from the syntax trees, so nothing is imported for it."""

from __future__ import annotations

import ast
import importlib
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "vlmpeft.projectors": "projectors",
    "vlmpeft.steering": "steering",
    "vlmpeft.eval": "eval",
    "vlmpeft.recipes": "recipes",
}
LEVELS: dict[int, str] = {
    4: "adapters __main__ train generate inspect lmar scenes export merge compare doctor plan",
    3: "adapter_soup build checkpoint conversion resume preflight workspace loop run evaluation retention hf_llava "
    "hf_peft hf_vllm llava_original lmar_heat lmar_samples diagnose eval eval.paths eval.pope eval.rows eval.runner "
    "eval.short eval.ablate eval.benchmark eval.caption eval.cider eval.compare eval.gqa eval.hallusion "
    "eval.interval eval.mme eval.mmvet eval.summary eval.vqa eval.vqa_text eval.choices eval.choices_run "
    "eval.mmmu eval.mmmu_data eval.mmmu_parse eval.scienceqa eval.mmbench eval.iconqa eval.choice figure "
    "eval.pope_parse eval.pope_questions eval.pope_score eval.answer_log eval.arguments eval.asking eval.identity "
    "eval.method eval.session eval.team eval.wrong_page eval.choices_ask margins compare_run compare_loop "
    "compare_report hf_vlm eval.distinct eval.harness eval.model doctor_run doctor_stage round_trip memory_plan "
    "plan_fit plan_text",
    2: "adapter_files adapter_learn adapter_merge pool config sections yaml_file recipe data_config records data "
    "sample_store sample_text mixture record_encoder prepare stage features vlm quant quant_memory tune conflicts "
    "weights optim language tokens hf_chat prefix decode forward trackers align distributed sharding drift "
    "diagnose_config report report_attention report_data report_sections report_retention report_style charts "
    "scene_questions cpu_attention steps loglik eval_config compare_config compare_plan compare_picture compare_stats "
    "compare_table overlay scene_files hf_prompt likelihood tile_merge connector changes start supervision "
    "llava_source gradient_flow optim_memory activations",
    1: "vision vision_timm vision_transformers vision_open_clip vision_weights encoder template images projectors "
    "projectors.linear projectors.mlp projectors.ldp projectors.pixel_shuffle projectors.resampler "
    "projectors.qformer projectors.identity tuners tuners.dora tuners.embedding_lora tuners.full tuners.krona "
    "tuners.oft tuners.vera tuners.lora tuners.tokens tuners.bitfit tuners.bottleneck tuners.fish tuners.ia3 "
    "tuners.layers tuners.norm tuners.unfreeze tuners.prefix_tuning tuners.prompt tuners.ptuning steering "
    "steering.attention steering.layers steering.mores steering.pictures steering.positions steering.probe "
    "steering.reference steering.statistics steering.units recipes tuners.adalora tuners.unipelt squares",
    0: "batch parts quant_weight routing routed registry errors fs anyres loss schema sources safe_paths layouts "
    "layout_names layout_tokenizer llava_layout manifest sampling stopping json_stream normalise readers "
    "projectors.base projectors.layers tuners.attachment tuners.base tuners.linear tuners.targets tuners.sites "
    "tuners.substitute tuners.lora_init tuners.peft_folder tuners.virtual tuners.deep_prefix quant_anew "
    "tuners.lora_layers tuners.rank_budget tuners.bottleneck_layers tuners.gated_attention tuners.block_choice "
    "tuners.ranks steering.lowrank peak_memory findings unchanged fake_model",
}
LEVEL = {name: level for level, names in LEVELS.items() for name in names.split()}
GROUPS = {  # modules of level 1 that may import each other besides their own level-0 base
    "images": {"images", "squares"},
    "vision": {"vision", "encoder", *(f"vision_{x}" for x in ("timm", "transformers", "open_clip", "weights"))},
    **{g: {m for m in LEVEL if m == g or m.startswith(f"{g}.")} for g in ("projectors", "tuners", "steering")},
}
BASES = {  # of level 0, and the groups they are for
    "projectors.base": {"projectors"},
    "projectors.layers": {"projectors"},
    "tuners.attachment": {"tuners", "steering"},
    "tuners.base": {"tuners", "steering"},
    "tuners.linear": {"tuners", "steering"},
    "tuners.lora_init": {"tuners"},
    "tuners.lora_layers": {"tuners"},
    "tuners.peft_folder": {"tuners"},
    "tuners.rank_budget": {"tuners"},
    "tuners.ranks": {"tuners"},
    "tuners.block_choice": {"tuners"},
    "tuners.bottleneck_layers": {"tuners"},
    "tuners.gated_attention": {"tuners"},
    "tuners.targets": {"tuners", "steering"},
    "tuners.virtual": {"tuners"},
    "tuners.deep_prefix": {"tuners"},
    "steering.lowrank": {"steering"},
}
FREE = {"images", "projectors", "tuners", *GROUPS["vision"]}  # they gather their group
FREE |= {"steering", "steering.mores", "steering.probe", "steering.reference"}
WHERE = {  # an outside library and the modules that may import it; True if inside functions only
    "omegaconf": ({"config"}, False),
    "yaml": ({"yaml_file"}, False),
    "accelerate": (
        {"loop", "trackers", "distributed", "sharding", "forward", "gradient_flow", "doctor_run", "doctor_stage"},
        False,
    ),
    "transformers": (
        {
            *("language", "vision_transformers", "decode", "prefix", "hf_llava", "hf_vlm", "tuners.prompt"),
            *("llava_source", "sources"),
            *("tuners.gated_attention", "cpu_attention"),
        },
        True,
    ),
    "huggingface_hub": ({"sources"}, True),
    "timm": ({"vision_timm"}, True),
    "open_clip": ({"vision_open_clip"}, True),
    "bitsandbytes": ({"quant", "quant_weight", "quant_anew"}, True),
    "peft": (set(), True),
    "datasets": ({"readers"}, True),
    "pyarrow": ({"readers", "sample_store", "eval.mmmu_data"}, True),
    "lmms_eval": ({"eval.harness"}, False),
    "sacrebleu": ({"eval.caption"}, True),
    "rouge_score": ({"eval.caption"}, True),
    "matplotlib": ({"steering.pictures", "compare_picture"}, True),
    **dict.fromkeys(("pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"), (set(), True)),
}


def sources() -> dict[str, Path]:
    """Every module by its dotted name below vlmpeft."""
    found = {}
    for file in sorted(p for p in (ROOT / "vlmpeft").rglob("*.py")):
        found[".".join(file.relative_to(ROOT / "vlmpeft").with_suffix("").parts)] = file
    for package, folder in FOLDERS.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = (package.removeprefix("vlmpeft."), *file.relative_to(ROOT / folder).with_suffix("").parts)
            found[".".join(parts)] = file
    return {name.removesuffix(".__init__"): file for name, file in found.items()}


MODULES = sources()
TREES = {name: ast.parse(file.read_text()) for name, file in MODULES.items()}
ROOT_MODULE = "__init__"


def imports(tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """Modules a tree imports and whether inside a function; what only type checkers read does not count."""
    unread = {
        id(n)
        for x in ast.walk(tree)
        if isinstance(x, ast.If) and "TYPE_CHECKING" in ast.unparse(x.test)
        for n in ast.walk(x)
    }
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    inside = {id(n) for x in ast.walk(tree) if isinstance(x, kinds) for n in ast.walk(x)}
    for node in ast.walk(tree):
        if id(node) in unread:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in inside
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import: {ast.unparse(node)}"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full.removeprefix("vlmpeft.") in MODULES else str(node.module), id(node) in inside


def ours(name: str) -> set[str]:
    """Our own modules that a module imports, anywhere in it."""
    found = {m.removeprefix("vlmpeft.") for m, _ in imports(TREES[name]) if m.startswith("vlmpeft.")}
    return {m for m in found if m != name}


def test_every_module_has_a_level() -> None:
    unknown = sorted(MODULES.keys() - LEVEL.keys() - {ROOT_MODULE})
    assert not unknown, f"give {unknown} the lowest level its imports allow, in LEVELS"
    assert sorted(LEVEL.keys() - MODULES.keys()) == []


@pytest.mark.parametrize("name", sorted(MODULES.keys() & LEVEL.keys()))
def test_modules_import_from_below_only(name: str) -> None:
    level = LEVEL[name]
    for other in sorted(ours(name)):
        assert other in LEVEL, f"{name} imports {other}, which has no level"
        assert LEVEL[other] <= level, f"{name} (level {level}) imports {other} (level {LEVEL[other]})"
        assert LEVEL[other] != 4, f"{name} imports the command {other}"
        if level == 1:
            assert allowed_in_group(name, other), f"{name} imports {other}: level 1 has no imports across groups"


def allowed_in_group(name: str, other: str) -> bool:
    group = next((g for g, members in GROUPS.items() if name in members), name)
    if LEVEL[other] == 0:
        return group in BASES.get(other, {group})
    members = GROUPS.get(group, set())
    return other in members and (name in FREE or other == "encoder")


def test_no_import_runs_in_a_circle() -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in sorted(ours(name)):
                visit(other, (*path, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


def test_level_0_needs_torch_and_the_standard_library_alone() -> None:
    for name in LEVELS[0].split():
        outside = {m.split(".")[0] for m, inside in imports(TREES[name]) if not inside} - {"vlmpeft", "torch"}
        assert outside <= sys.stdlib_module_names, f"{name} imports {sorted(outside - sys.stdlib_module_names)}"


@pytest.mark.parametrize("library", WHERE)
def test_outside_libraries_are_imported_where_they_are_used(library: str) -> None:
    allowed, lazily = WHERE[library]
    for name, tree in TREES.items():
        for module, inside in imports(tree):
            if module.split(".")[0] == library:
                assert name in allowed, f"{name} imports {library}"
                assert inside or not lazily, f"{name} imports {library} outside a function"


def dangers(tree: ast.AST) -> Iterator[str]:
    """What the package never does: run data as code, trust remote code, swallow everything, assume a device."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield f"{node.lineno}: bare except"
        if isinstance(node, ast.Assert):
            yield f"{node.lineno}: assert, which -O removes"
        if not isinstance(node, ast.Call):
            continue
        keywords = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
        called = ast.unparse(node.func)
        if called in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"):
            yield f"{node.lineno}: {called}()"
        if called.endswith("torch.load") and keywords.get("weights_only") is not True:
            yield f"{node.lineno}: torch.load without weights_only=True"
        if called.startswith("yaml.") and called.removeprefix("yaml.") in (
            "load",
            "load_all",
            "unsafe_load",
            "full_load",
        ):
            yield f"{node.lineno}: {called}"
        if keywords.get("trust_remote_code") is True or keywords.get("shell") is True:
            yield f"{node.lineno}: runs what it is given"
        if called.endswith("from_pretrained") and "Auto" in called and not trusts_nobody(node):
            yield f"{node.lineno}: {called} without trust_remote_code=False"
        if isinstance(node.func, ast.Attribute) and node.func.attr == "cuda" and called != "torch.cuda":
            yield f"{node.lineno}: {called}()"


def trusts_nobody(call: ast.Call) -> bool:
    """Whether a call says trust_remote_code=False, or passes on options that a test of the module checks."""
    return any(k.arg == "trust_remote_code" or k.arg is None for k in call.keywords)


@pytest.mark.parametrize("name", MODULES)
def test_nothing_dangerous_is_called(name: str) -> None:
    assert list(dangers(TREES[name])) == []


@pytest.mark.parametrize(
    "code",
    [
        "torch.load(p)", "torch.load(p, weights_only=False)", "eval(x)", "exec(x)", "yaml.load(x)", "model.cuda()",
        "f(trust_remote_code=True)", "try:\n  f()\nexcept:\n  pass", "assert x", "AutoModel.from_pretrained(n)",
        "subprocess.run(x, shell=True)",
    ],
)  # fmt: skip
def test_the_rule_sees_what_it_forbids(code: str) -> None:
    assert len(list(dangers(ast.parse(code)))) == 1


def test_no_module_outgrows_its_page() -> None:
    long = {name: count for name, file in MODULES.items() if (count := len(file.read_text().splitlines())) > 250}
    assert not long, f"split {long}: at most 250 lines a file"


def test_every_package_folder_is_in_pyproject() -> None:
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    skipped = {"tests", "build", "dist"}
    inits = [p.parent.relative_to(ROOT).parts for p in ROOT.rglob("__init__.py")]
    folders = {
        parts
        for parts in inits
        if parts[0] not in skipped and not parts[0].startswith(".") and "site-packages" not in parts
    }
    named = {
        "/".join(parts) for parts in folders if parts[:2] != ("vlmpeft", parts[-1]) or parts[-1] not in FOLDERS.values()
    }
    expected = {tools["package-dir"].get(p, p.replace(".", "/")) for p in tools["packages"]}
    assert named == expected
    assert {k: v for k, v in tools["package-dir"].items() if k != "vlmpeft"} == FOLDERS


@pytest.mark.parametrize("folder", FOLDERS.values())
def test_root_folders_are_reached_through_a_symlink_and_refuse_their_bare_name(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = ROOT / "vlmpeft" / folder
    assert link.is_symlink()
    assert link.readlink() == Path("..") / folder
    monkeypatch.syspath_prepend(ROOT)
    with pytest.raises(ImportError, match=f"import vlmpeft.{folder} instead"):
        importlib.import_module(folder)
    assert folder not in sys.modules
