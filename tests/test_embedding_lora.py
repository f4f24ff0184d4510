"""LoRA on the embedding against peft: outputs and gradients, files, tied heads, and its life."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft_twins import logits, share, tensors_of
from tiny_models import hf_inputs, hf_llava, our_vlm, randomise
from torch import nn

from vlmpeft import tune
from vlmpeft.errors import ModelError
from vlmpeft.tuners import EmbeddingLoRA, LoRA
from vlmpeft.tuners.embedding_lora import LoRAEmbedding

R, V, D = 4, 50, 24


def embedding(padding: int | None = None) -> nn.Embedding:
    torch.manual_seed(0)
    return nn.Embedding(V, D, padding_idx=padding).requires_grad_(False)


@pytest.mark.parametrize("padding", [None, 3])
def test_matches_peft_outputs_and_gradients(padding: int | None) -> None:
    ours = LoRAEmbedding(embedding(padding), R, 3.0, tied=False)
    config = LoraConfig(r=R, lora_alpha=3 * R, target_modules=["0"])
    theirs = inject_adapter_in_model(config, nn.Sequential(embedding(padding)))[0]  # type: ignore[index]
    share(ours, theirs)
    ids = torch.tensor([[3, 7, 7], [1, 3, 49]])
    found = []
    for layer in (ours, theirs):
        out = layer(ids)
        trained = {k: p for k, p in tensors_of(layer).items() if p.requires_grad}
        weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
        gradients = torch.autograd.grad((out * weights).sum(), list(trained.values()))
        found.append({"output": out, **dict(zip(trained, gradients, strict=True))})
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[1].items():
        torch.testing.assert_close(found[0][name], tensor, rtol=1e-5, atol=1e-5)


def test_it_merges_where_the_head_has_weights_of_its_own_and_refuses_where_it_has_not(language_dir: Path) -> None:
    model = hf_llava()
    before = model.state_dict()["model.language_model.embed_tokens.weight"].clone()
    tuned = tune(model, [EmbeddingLoRA(R)])
    randomise(tuned.trainable())
    adapted = logits(model, hf_inputs())
    tuned.merge()
    torch.testing.assert_close(logits(model, hf_inputs()), adapted, rtol=0, atol=1e-5)
    tuned.unmerge()
    tuned.remove()
    assert model.state_dict()["model.language_model.embed_tokens.weight"].equal(before)
    with pytest.raises(ModelError, match=r"M556.*head shares"):
        tune(our_vlm(language_dir), [EmbeddingLoRA(R)]).merge()


def test_it_stands_beside_lora_and_has_r_numbers_for_every_token_and_width() -> None:
    model = hf_llava()
    tuned = tune(model, [EmbeddingLoRA(R), LoRA(R, targets="minimal")])
    own = [p.numel() for name, p in tuned.trainable().items() if "lora_embedding" in name]
    assert sorted(own) == [R * 32, R * 100]
    with pytest.raises(ModelError, match="M552"):
        tune(model, [EmbeddingLoRA(R)])
