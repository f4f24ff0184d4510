"""Merging against peft and closed formulas: true updates, whatever the ranks, scales and layers of the adapters."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from vlmpeft.adapter_files import Adapter, Factors, read_adapter, write_adapter
from vlmpeft.adapter_merge import MergePlan, decompose, drop, elect, merge, trim, truncate
from vlmpeft.errors import ConfigError, ModelError

CONFIGS: dict[str, dict[str, Any]] = {
    "a": {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "b": {"r": 2, "lora_alpha": 3, "use_rslora": True, "target_modules": ["q_proj", "up_proj", "embed_tokens"]},
    "c": {
        "r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 5},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 9},
    },
    "d": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]},
}  # fmt: skip
IDS = torch.tensor([[7, 8, 9, 10, 11]])
Q, V, DOWN = (f"model.layers.0.{name}" for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"))


@pytest.fixture(scope="module")
def folders(language_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters that stock peft made and saved, with random weights."""
    found = {}
    for seed, (name, config) in enumerate(CONFIGS.items()):
        torch.manual_seed(seed)
        model: Any = get_peft_model(base(language_dir), LoraConfig(task_type="CAUSAL_LM", **config))
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(parameter, std=0.2)
        found[name] = tmp_path_factory.mktemp("adapters") / name
        model.save_pretrained(found[name], save_embedding_layers=False)
    return found


def base(language_dir: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(language_dir).eval()


def loaded(language_dir: Path, *folders: Path) -> Any:
    """Stock peft with these adapters, called a, b, ... as their folders are."""
    model = PeftModel.from_pretrained(base(language_dir), folders[0], adapter_name=folders[0].name)
    for folder in folders[1:]:
        model.load_adapter(folder, folder.name)
    return model.eval()


def delta_of(model: Any, path: str, name: str) -> Tensor:
    """peft's own update of a layer."""
    delta: Tensor = model.base_model.model.get_submodule(path).get_delta_weight(name).detach()
    return delta


@torch.no_grad()
def logits_with(language_dir: Path, model: Any, weights: dict[str, float]) -> Tensor:
    """Logits of the plain base with the weighted sum of peft's updates added to its weights."""
    plain = base(language_dir)
    embedding = plain.get_input_embeddings()
    embedding.weight = torch.nn.Parameter(embedding.weight.clone())  # peft adapts what is looked up, not the tied head
    for path, module in plain.named_modules():
        adapted = model.base_model.model.get_submodule(path)
        for name, weight in weights.items():
            names = {*getattr(adapted, "lora_A", ()), *getattr(adapted, "lora_embedding_A", ())}
            if hasattr(adapted, "get_delta_weight") and name in names:
                module.weight += weight * adapted.get_delta_weight(name)
    logits: Tensor = plain(IDS).logits
    return logits


@pytest.mark.parametrize("method", ["linear", "cat"])
def test_linear_is_the_weighted_sum_of_updates_in_stock_peft(
    method: Any, folders: dict[str, Path], language_dir: Path, tmp_path: Path
) -> None:
    weights = {"a": 0.7, "b": -0.4, "c": 1.5}
    plan = MergePlan(tuple(weights.values()), method)
    merged = merge({name: read_adapter(folders[name]) for name in weights}, plan)
    assert merged.overall == 0
    assert write_adapter(merged.adapter, tmp_path / "out") == 4 + 2 + 3
    theirs = loaded(language_dir, *(folders[name] for name in weights))
    expected = logits_with(language_dir, theirs, weights)
    found = loaded(language_dir, tmp_path / "out")(IDS).logits
    assert (found - expected).abs().max() <= 1e-5
    assert not torch.allclose(found, base(language_dir)(IDS).logits, atol=0.1)


def combined(language_dir: Path, folders: list[Path], weights: list[float], kind: str, **options: Any) -> Any:
    model = loaded(language_dir, *folders)
    names = [folder.name for folder in folders]
    model.add_weighted_adapter(names, weights, "merged", combination_type=kind, **options)
    return model


@pytest.mark.parametrize(
    ("method", "kind", "weights", "density", "r"),
    [
        ("cat", "cat", [0.7, -0.4], 1.0, None),
        ("svd", "svd", [0.7, 0.4], 1.0, 3),
        ("ties", "ties_svd", [0.5, 0.5], 0.3, 8),
        ("ties", "ties_svd", [1.0, 1.0], 0.6, 3),
        ("dare_linear", "dare_linear_svd", [0.7, 0.4], 1.0, 5),
        ("dare_ties", "dare_ties_svd", [1.0, 1.0], 1.0, 8),
    ],
)  # fmt: skip
def test_it_agrees_with_peft_where_the_definitions_do(
    method: Any, kind: str, weights: list[float], density: float, r: int | None,
    folders: dict[str, Path], language_dir: Path,
) -> None:  # fmt: skip
    chosen = [folders["a"], folders["d"]]
    plan = MergePlan(tuple(weights), method, density, r)
    merged = merge({f.name: read_adapter(f) for f in chosen}, plan)
    options = ({"svd_rank": r} if r else {}) | ({"density": density} if "ties" in kind or "dare" in kind else {})
    theirs = combined(language_dir, chosen, weights, kind, **options)
    for path, factors in merged.adapter.layers.items():
        torch.testing.assert_close(factors.delta(), delta_of(theirs, path, "merged"), rtol=1e-4, atol=2e-5)


def test_pefts_linear_has_cross_terms_that_ours_has_not(folders: dict[str, Path], language_dir: Path) -> None:
    chosen = [folders["a"], folders["d"]]
    theirs = combined(language_dir, chosen, [0.5, 0.5], "linear")
    ours = merge({f.name: read_adapter(f) for f in chosen}, MergePlan((0.5, 0.5))).adapter.layers[Q].delta()
    true = 0.5 * delta_of(theirs, Q, "a") + 0.5 * delta_of(theirs, Q, "d")
    torch.testing.assert_close(ours, true, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(delta_of(theirs, Q, "merged"), true, atol=0.05)
    alone = merge({"a": read_adapter(folders["a"])}, MergePlan((0.5,))).adapter.layers[Q].delta()
    one = combined(language_dir, chosen[:1], [0.5], "linear")
    torch.testing.assert_close(alone, delta_of(one, Q, "merged"), rtol=1e-5, atol=1e-6)  # alone they are the same


def test_svd_is_the_best_of_its_rank_and_says_what_it_loses(folders: dict[str, Path]) -> None:
    adapters = {name: read_adapter(folders[name]) for name in ("a", "b", "c")}
    exact = merge(adapters, MergePlan((1, 1, 1)))
    merged = merge(adapters, MergePlan((1, 1, 1), "svd", r=2))
    lost, all_of_it = [], []
    for path, factors in merged.adapter.layers.items():
        whole = exact.adapter.layers[path].delta().double()
        spectrum = torch.linalg.svdvals(whole)
        difference = torch.linalg.matrix_norm(factors.delta() - whole)
        assert difference.item() == pytest.approx(spectrum[2:].norm().item(), abs=1e-5)  # Eckart and Young
        assert merged.relative(path) == pytest.approx(difference.item() / whole.norm().item(), abs=1e-5)
        assert exact.norms[path] == pytest.approx(whole.norm().item(), rel=1e-5)
        lost, all_of_it = [*lost, difference.item()], [*all_of_it, whole.norm().item()]
    assert merged.overall == pytest.approx(math.hypot(*lost) / math.hypot(*all_of_it), rel=1e-4)
    assert merge(adapters, MergePlan((1, 1, 1), "svd", r=99)).overall <= 1e-6


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties"])
def test_full_rank_keeps_a_sparse_merge_whole(method: Any, folders: dict[str, Path]) -> None:
    adapters = {name: read_adapter(folders[name]) for name in ("a", "d")}
    cut = merge(adapters, MergePlan((1, 1), method, 0.4, None))
    full = merge(adapters, MergePlan((1, 1), method, 0.4, "full"))
    assert cut.adapter.layers[Q].r == 8
    assert cut.overall > 0.05
    assert full.overall <= 1e-6
    a, d = (adapter.layers[Q].delta() for adapter in adapters.values())
    if method == "ties":
        parts = [trim(a, 0.4), trim(d, 0.4)]
    else:
        parts = [drop(a, 0.4, f"0/a/{Q}"), drop(d, 0.4, f"0/d/{Q}")]
    expected = parts[0] + parts[1] if method == "dare_linear" else elect(torch.stack(parts))
    torch.testing.assert_close(full.adapter.layers[Q].delta(), expected, rtol=1e-4, atol=1e-5)


def test_ties_trims_elects_and_averages_as_written() -> None:
    delta = torch.tensor([[3.0, -1.0, 0.5], [-4.0, 2.0, 0.0]])
    assert trim(delta, 0.5).tolist() == [[3, 0, 0], [-4, 2, 0]]
    deltas = torch.tensor([[3.0, -1.0, 0.0, 2.0], [-1.0, -3.0, 0.0, 4.0], [1.0, 2.0, 0.0, 0.0]])
    # masses 3, -2, 0, 6: of the first the mean of 3 and 1, of the second of -1 and -3, of the last of 2 and 4
    assert elect(deltas).tolist() == [2.0, -2.0, 0.0, 3.0]


def test_a_layer_that_one_adapter_lacks_keeps_the_others_update(folders: dict[str, Path]) -> None:
    adapters = {name: read_adapter(folders[name]) for name in ("a", "b")}
    merged = merge(adapters, MergePlan((1, 1), "ties", r="full"))
    torch.testing.assert_close(merged.adapter.layers[DOWN].delta(), adapters["a"].layers[DOWN].delta())


def test_dare_keeps_the_mean_and_depends_on_seed_and_name_alone() -> None:
    delta = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    kept = drop(delta, 0.25, "0/a/layer")
    torch.testing.assert_close(kept[kept != 0], (delta * 4)[kept != 0])
    assert (kept != 0).float().mean().item() == pytest.approx(0.25, abs=0.04)  # four standard errors of 2,000 draws
    assert torch.equal(kept, drop(delta, 0.25, "0/a/layer"))
    for other in ("1/a/layer", "0/b/layer", "0/a/other"):
        assert not torch.equal(kept, drop(delta, 0.25, other))
    mean = sum(drop(delta, 0.25, str(i)) for i in range(2000)) / 2000
    assert ((mean - delta).abs() <= 6 * delta.abs() * math.sqrt(3 / 2000) + 1e-6).all()
    torch.testing.assert_close(drop(delta, 1.0, "x"), delta)


def test_dare_does_not_depend_on_the_order_of_layers(folders: dict[str, Path]) -> None:
    a, d = read_adapter(folders["a"]), read_adapter(folders["d"])
    plan = MergePlan((1, 1), "dare_ties", 0.5, seed=3)
    turned = Adapter(dict(reversed(a.layers.items())), a.base, a.task)
    first, second = merge({"a": a, "d": d}, plan), merge({"a": turned, "d": d}, plan)
    for path in first.adapter.layers:
        assert torch.equal(first.adapter.layers[path].delta(), second.adapter.layers[path].delta())


def test_truncate_needs_no_dense_update() -> None:
    generator = torch.Generator().manual_seed(0)
    factors = Factors(torch.randn(6, 30, generator=generator), torch.randn(20, 6, generator=generator))
    for r in (1, 4, 6):
        (low, lost, norm), dense = truncate(factors, r), decompose(factors.delta(), r, factors.names)
        torch.testing.assert_close(low.delta(), dense[0].delta(), rtol=1e-4, atol=1e-4)
        assert (lost, norm) == pytest.approx(dense[1:], abs=1e-4)


def test_scales_are_pefts_with_patterns_and_rslora(folders: dict[str, Path], language_dir: Path) -> None:
    theirs = loaded(language_dir, folders["b"], folders["c"])
    for name in ("b", "c"):
        adapter = read_adapter(folders[name])
        assert adapter.task == "CAUSAL_LM"
        for path, factors in adapter.layers.items():
            delta = delta_of(theirs, path, name)
            ours = factors.delta().T if "embed" in path else factors.delta()
            torch.testing.assert_close(ours, delta, rtol=1e-5, atol=1e-6)


def test_folders_that_are_no_plain_lora_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    def folder(name: str, change: dict[str, Any], **tensors: Tensor | None) -> Path:
        config = json.loads((folders["a"] / "adapter_config.json").read_text())
        held = load_file(folders["a"] / "adapter_model.safetensors")
        key = next(k for k in held if "q_proj.lora_B" in k)
        held |= {key if k == "B" else k: v for k, v in tensors.items() if v is not None}
        held = {k: v for k, v in held.items() if not (k == key and "B" in tensors and tensors["B"] is None)}
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config | change))
        save_file(held, tmp_path / name / "adapter_model.safetensors")
        return tmp_path / name

    for wrong, says in (
        (folder("dora", {"use_dora": True}), "M554.*use_dora"),
        (folder("ia3", {"peft_type": "IA3"}), "M554.*IA3"),
        (folder("missing", {}, B=None), "M502.*B missing"),
        (folder("ranks", {}, B=torch.zeros(32, 3)), r"M502.*A \(4, 32\) and B \(32, 3\)"),
        (folder("nan", {}, B=torch.full((32, 4), math.nan)), "M503"),
        (folder("extra", {}, magnitude=torch.zeros(3)), "M502.*'magnitude'"),
        (folder("config", {"r": 8}), "M502.*rank 4"),
        (tmp_path / "nowhere", "M581.*no directory"),
    ):
        with pytest.raises(ModelError, match=says):
            read_adapter(wrong)


def test_plans_and_adapters_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"C102.*did you mean 'ties'"):
        MergePlan((1.0,), "tie")  # type: ignore[arg-type]
    for options in (
        {"density": 0.0}, {"density": 1.1}, {"density": math.nan}, {"density": 0.5}, {"r": 3},
        {"method": "svd", "r": 0}, {"method": "svd", "density": 0.5},
    ):  # fmt: skip
        with pytest.raises(ConfigError, match="C102"):
            MergePlan((1.0,), **options)
    with pytest.raises(ConfigError, match="C102"):
        MergePlan((math.inf,))
    one, other = (Adapter({"layer": Factors(torch.ones(1, n), torch.ones(2, 1))}) for n in (3, 4))
    with pytest.raises(ModelError, match=r"M580.*a \(2, 3\), b \(2, 4\)"):
        merge({"a": one, "b": other}, MergePlan((1, 1)))
    with pytest.raises(ConfigError, match=r"C102.*1 weights for 2 adapters"):
        merge({"a": one, "b": one}, MergePlan((1,)))
