"""Tokenizers that lack something, and tokens of the user's own: added, trained, saved; old rows stay as they were."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import make_language, write_data
from families import FAMILIES, write_family

import vlmpeft
from vlmpeft import checkpoint
from vlmpeft.batch import IGNORE, collate
from vlmpeft.build import Bundle, dry_run, enter_stage
from vlmpeft.config import load_recipe, to_yaml
from vlmpeft.errors import ConfigError, ModelError
from vlmpeft.language import load_language
from vlmpeft.optim import adamw, parameter_groups
from vlmpeft.template import Exchange, TurnEncoder
from vlmpeft.tokens import add_tokens
from vlmpeft.tune import tune
from vlmpeft.tuners import Full, LoRA, TokenRows

NEW = ("<cat>", "<dog>")


def tokenizer_of(directory: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture
def own_dir(tmp_path: Path, language_dir: Path) -> Path:
    """A copy of the tiny language model to take things from."""
    shutil.copytree(language_dir, tmp_path / "language")
    return tmp_path / "language"


def test_a_tokenizer_without_eos_is_refused_until_one_is_named(own_dir: Path) -> None:
    tokenizer = tokenizer_of(own_dir)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(own_dir)
    with pytest.raises(ModelError, match=r"M510.*no eos token.*set language\.eos=TOKEN.*</s>"):
        load_language(str(own_dir))
    with pytest.raises(ModelError, match=r"M510.*language\.eos='<\|im_stop\|>' is no token.*did you mean '<\|im_"):
        load_language(str(own_dir), eos="<|im_stop|>")
    found = load_language(str(own_dir), eos="<|im_end|>")[1]
    encoding = TurnEncoder(found, "vicuna_v1", 1).encode([Exchange(("q",), "a")])
    assert encoding.labels[-1] == found.convert_tokens_to_ids("<|im_end|>")


def test_neither_pad_nor_bos_nor_unk_is_needed(own_dir: Path) -> None:
    tokenizer = tokenizer_of(own_dir)
    tokenizer.pad_token = tokenizer.bos_token = tokenizer.unk_token = None
    tokenizer.save_pretrained(own_dir)
    found = load_language(str(own_dir))[1]
    assert found.pad_token is None
    encoder = TurnEncoder(found, "vicuna_v1", 1)
    assert encoder.begin == []
    assert encoder.encode([Exchange(("q",), "a")]).labels[-1] == found.eos_token_id


def test_padding_is_masked_by_length_though_pad_is_eos(tokenizer: Any) -> None:
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    encoder = TurnEncoder(tokenizer, "vicuna_v1", 1)
    rows = [encoder.encode([Exchange(("q",), answer)]) for answer in ("a", "a much longer answer than that")]
    for side in ("right", "left"):
        batch = collate(rows, side=side)
        for i, row in enumerate(rows):
            length = len(row.input_ids)
            assert int(batch.attention_mask[i].sum()) == length
            kept = batch.labels[i][batch.attention_mask[i]].tolist()
            assert kept == row.labels
            assert kept[-1] == tokenizer.eos_token_id
            assert set(batch.labels[i][~batch.attention_mask[i]].tolist()) <= {IGNORE}


def test_a_token_beyond_the_embedding_is_refused_unless_nothing_can_write_it(own_dir: Path) -> None:
    tokenizer = tokenizer_of(own_dir)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    tokenizer.save_pretrained(own_dir)
    load_language(str(own_dir))  # as Gemma 3's
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(own_dir)
    rows = len(tokenizer) - 2
    with pytest.raises(ModelError, match=f"M511.*'<extra>'.*id {rows + 1}.*embedding has {rows} rows.*tokens.add"):
        load_language(str(own_dir))


def test_an_end_token_beyond_the_embedding_is_refused(own_dir: Path) -> None:
    tokenizer = tokenizer_of(own_dir)
    tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    tokenizer.save_pretrained(own_dir)
    with pytest.raises(ModelError, match=r"M511.*'<\|end\|>'"):
        load_language(str(own_dir))


@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_new_rows_leave_old_logits_alone_in_every_family(kind: str, tmp_path: Path) -> None:
    language, tokenizer = load_language(str(write_family(kind, tmp_path)))
    ids = torch.arange(5, 15)[None]
    before = language(ids).logits
    old = {id(p): p.clone() for p in language.parameters()}
    rows = len(tokenizer)
    add_tokens(language, tokenizer, NEW)
    after = language(ids).logits
    assert torch.equal(after[..., :rows], before)
    assert after.shape[-1] == rows + 2
    assert all(torch.equal(p, old[id(p)]) for p in language.parameters() if id(p) in old)
    mean = before.mean(-1)  # a mean row gives the mean logit, but for a cap on it
    if getattr(language.config, "final_logit_softcapping", None) is None:
        torch.testing.assert_close(after[..., rows:], mean[..., None].expand(1, 10, 2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "smollm", "gemma", "phi"])
@torch.no_grad()
def test_a_row_equal_to_an_old_one_means_what_the_old_one_means(kind: str, tmp_path: Path) -> None:
    """Scale of the embedding, bias of the head, tied or not: a copied row behaves as the row it was copied from."""
    language, tokenizer = load_language(str(write_family(kind, tmp_path)))
    add_tokens(language, tokenizer, NEW)
    old, new = 17, tokenizer.convert_tokens_to_ids("<cat>")
    embedding, head = language.get_input_embeddings(), language.get_output_embeddings()
    embedding.rows[0] = embedding.weight[old]
    head.rows[0] = head.weight[old]
    if head.bias is not None:
        head.base_layer.bias.normal_()
        head.bias[0] = head.base_layer.bias[old]
    a, b = (language(torch.tensor([[5, i, 9]])).logits for i in (old, new))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    torch.testing.assert_close(a[..., old], a[..., new], rtol=0, atol=1e-5)


@torch.no_grad()
def test_rows_to_spare_in_the_matrix_are_used_before_it_grows(tmp_path: Path) -> None:
    directory = make_language(tmp_path)
    language, tokenizer = load_language(str(directory))
    language.resize_token_embeddings(len(tokenizer) + 1)
    before = language(torch.arange(9)[None]).logits
    first = len(tokenizer)
    add_tokens(language, tokenizer, ("<cat>", "<dog>", "<owl>"))
    after = language(torch.arange(9)[None]).logits
    assert after.shape[-1] == first + 3
    assert torch.equal(after[..., :first], before[..., :first])


@torch.no_grad()
def test_a_row_can_start_as_the_mean_of_its_text(language_dir: Path) -> None:
    language, tokenizer = load_language(str(language_dir))
    pieces = tokenizer("<cat>", add_special_tokens=False)["input_ids"]
    add_tokens(language, tokenizer, NEW, "text")
    embedding = language.get_input_embeddings()
    torch.testing.assert_close(embedding.rows[0], embedding.weight[pieces].mean(0))
    assert not torch.equal(embedding.rows[0], embedding.rows[1])


def test_tokens_that_are_there_already_and_ids_without_rows_are_refused(language_dir: Path) -> None:
    language, tokenizer = load_language(str(language_dir))
    with pytest.raises(ModelError, match=r"M517.*'</s>' is a token already"):
        add_tokens(language, tokenizer, ("<cat>", "</s>"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    with pytest.raises(ModelError, match=r"M511.*do not follow"):
        add_tokens(language, tokenizer, NEW)


@pytest.mark.parametrize("tied", [True, False])
def test_training_changes_the_new_rows_and_nothing_else_of_the_matrices(tied: bool, tmp_path: Path) -> None:
    language, tokenizer = load_language(str(write_family("smollm" if tied else "llama", tmp_path)))
    add_tokens(language, tokenizer, NEW)
    before = {name: tensor.clone() for name, tensor in language.state_dict().items()}
    parts: Any = vlmpeft.Parts(language, language, language, language.lm_head, list(language.model.layers), -1)
    tuned = tune(language, [TokenRows()], parts)
    assert len(tuned.trainable()) == (1 if tied else 2)
    optimizer = adamw(parameter_groups(tuned, 1e-2, weight_decay=0.1), (0.9, 0.999), 1e-8)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"]
    cat, dog = tokenizer.convert_tokens_to_ids(list(NEW))
    ids = torch.tensor([[5, cat, 9, dog, 20]])
    for _ in range(3):
        logits = language(ids).logits
        F.cross_entropy(logits[0, :-1], ids[0, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, tensor in language.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"model.embed_tokens.rows", "lm_head.rows"}


RECIPE = ("tokens.add=[<cat>,<dog>]", "tokens.init=text")


def bundle_of(recipe: Path) -> Bundle:
    return vlmpeft.build(load_recipe(str(recipe), RECIPE))


def test_every_stage_trains_the_rows_unless_it_says_how_or_trains_everything(tiny_recipe: Path) -> None:
    recipe = load_recipe(str(tiny_recipe), RECIPE)
    assert {name: stage.tuners["token_rows"] for name, stage in recipe.stages.items()} == {
        "pretrain": TokenRows(),
        "instruct": TokenRows(),
    }
    own = load_recipe(str(tiny_recipe), [*RECIPE, "stages.instruct.token_rows.lr=1e-3"])
    assert own.stages["instruct"].tuners["token_rows"] == TokenRows(lr=1e-3)
    whole = ["stages.instruct.tuners.lora=null", "stages.instruct.tuners.all.kind=full"]
    full = load_recipe(str(tiny_recipe), [*RECIPE, *whole, "stages.instruct.tuners.all.part=language"])
    assert set(full.stages["instruct"].tuners) == {"projector", "all"}
    assert isinstance(full.stages["instruct"].tuners["all"], Full)
    assert isinstance(recipe.stages["instruct"].tuners["lora"], LoRA)


def test_a_recipe_with_new_tokens_survives_being_written(tiny_recipe: Path, tmp_path: Path) -> None:
    recipe = load_recipe(str(tiny_recipe), RECIPE)
    (tmp_path / "again.yaml").write_text(to_yaml(recipe))
    assert load_recipe(str(tmp_path / "again.yaml")) == recipe


@pytest.mark.parametrize("add", ["[a]", "[' <cat>']", "[<cat>,<cat>]"])
def test_new_tokens_that_make_no_sense_are_refused(add: str, tiny_recipe: Path) -> None:
    with pytest.raises(ConfigError, match=r"C102.*tokens\.add"):
        load_recipe(str(tiny_recipe), [f"tokens.add={add}"])


def test_token_rows_without_new_tokens_are_refused(tiny_recipe: Path) -> None:
    with pytest.raises(ModelError, match=r"M550.*set tokens\.add"):
        vlmpeft.build(load_recipe(str(tiny_recipe), ["stages.instruct.token_rows.lr=1e-3"]))


def test_a_dry_run_counts_the_rows(tiny_recipe: Path) -> None:
    def trainable(overrides: tuple[str, ...]) -> int:
        rows: list[dict[str, Any]] = dry_run(load_recipe(str(tiny_recipe), overrides))["pretrain"]
        return sum(row["trainable"] for row in rows)

    assert trainable(RECIPE) == trainable(()) + 2 * 32


@torch.no_grad()
def test_a_saved_model_comes_back_with_its_tokens_and_equal_logits(tiny_recipe: Path, tmp_path: Path) -> None:
    bundle = bundle_of(tiny_recipe)
    for parameter in bundle.tuned.trainable().values():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    checkpoint.save(bundle, tmp_path / "model")
    loaded = vlmpeft.load(tmp_path / "model")
    assert loaded.tokenizer.convert_tokens_to_ids(list(NEW)) == bundle.tokenizer.convert_tokens_to_ids(list(NEW))
    kept = tokenizer_of(tmp_path / "model" / "tokenizer")
    assert kept("a<cat>b")["input_ids"] == bundle.tokenizer("a<cat>b")["input_ids"]
    encoding = loaded.turn_encoder().encode([Exchange(("What is <cat>?",), "a <dog>")])
    assert set(loaded.tokenizer.convert_tokens_to_ids(list(NEW))) <= set(encoding.input_ids)
    ids = torch.tensor([encoding.input_ids])
    bundle.model.eval()
    assert torch.equal(loaded.model(ids).logits, bundle.model(ids).logits)


def test_a_run_trains_the_rows_of_words_in_its_data_and_keeps_them(tiny_recipe: Path, tmp_path: Path) -> None:
    from vlmpeft.run import Run

    paths = write_data(tmp_path / "data", count=8)
    for name in ("pretrain", "instruct"):
        text = Path(paths[name]).read_text()
        Path(paths[name]).write_text(text.replace("square", "<cat>"))
    overrides = [f"data.{key}={value}" for key, value in paths.items()]
    overrides += [f"stages.{stage}.optim.steps=2" for stage in ("pretrain", "instruct")]
    Run(load_recipe(str(tiny_recipe), [*RECIPE, *overrides]), tmp_path / "run").run()
    loaded = vlmpeft.load(tmp_path / "run" / "final")
    start = bundle_of(tiny_recipe)
    rows = loaded.model.language.get_input_embeddings().rows
    assert not torch.equal(rows[0], start.model.language.get_input_embeddings().rows[0])
    assert torch.equal(loaded.model.language.get_input_embeddings().weight, start.model.language.lm_head.weight)
    enter_stage(loaded, loaded.recipe.stages["pretrain"])
    assert "language.model.embed_tokens.rows" in loaded.tuned.trainable()
