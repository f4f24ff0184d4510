"""Wrong options of tuners, in a recipe and against a model, and the one line that answers: what, where, how to mend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import changed, hf_inputs, hf_llava, logits, randomise, state_of

from vlmpeft import tune
from vlmpeft.config import load_recipe
from vlmpeft.errors import VlmpeftError
from vlmpeft.pool import AdapterPool
from vlmpeft.steering import MoReS
from vlmpeft.tuners import IA3, OFT, BitFit, DoRA, Full, GradualUnfreezing, LayerTuning, LoRA, NormTuning, VeRA


def refusal(recipe: str, override: str) -> str:
    with pytest.raises(VlmpeftError) as caught:
        load_recipe(recipe, [override])
    assert "\n" not in caught.value.line()
    return caught.value.line()


ONE_STAGE = {  # of a recipe of one stage: the beginning of the answer, and its end
    "stages.instruct.lora.r=8": ("[C105] stages.instruct.lora.r: this recipe is one stage", "Fix: write lora.r."),
    "lora.rank=8": ("[C101] tuners.lora: no key 'rank'; did you mean 'r'?", ""),
    "lora.lora_alpha=8": ("[C101] tuners.lora: no key 'lora_alpha'; did you mean 'alpha'?", ""),
    "lora.target=[q_proj]": ("[C101] tuners.lora: no key 'target'; did you mean 'targets'?", ""),
    "lora.target_modules=[q_proj]": ("[C101] tuners.lora: no key 'target_modules'; did you mean 'targets'?", ""),
    "lora.use_dora=true": ("[C101] tuners.lora: a tuner of kind lora has no key 'use_dora'.", "of kind dora."),
    "lora.targets=[]": ("[C102] lora.targets=() is out of range.", "or a list of layer names."),
    "lora.targets=re:(": ("[C102] lora.targets='re:(' is out of range.", "at position 0)."),
    "lora.r=0": ("[C102] lora.r=0 is out of range.", "Fix: use an integer of at least 1."),
    "lora.r=1.5": ("[C102] tuners.lora.r=1.5 is not an integer.", "Fix: write tuners.lora.r= with an integer."),
    "lora.ranks=4": ("[C102] tuners.lora.ranks=4 is not a section.", ""),
    "lora.ranks={q_proj: 0}": ("[C102] lora.ranks={'q_proj': 0} is out of range.", "integers of at least 1 by name."),
    "lora.where=image": ("[C102] tuners.lora.where='image' is not one of", "all, visual, text, answer."),
    "lora.part=vison": ("[C102] lora.part='vison' is no part; did you mean 'vision'?", ""),
    "lora.layers=last": ("[C102] lora.layers='last' is out of range.", "or a list of block numbers."),
    "tuners.lora.kind=lorra": ("[C103] tuners.lora: no tuner 'lorra'; did you mean 'lora'?", ""),
    "tuners.a.r=3": ("[C106] tuners.a.kind is not set. Fix: write tuners.a.kind=lora", ""),
    "adalora.ranks={q_proj: 4}": ("[C101] tuners.adalora: a tuner of kind adalora has no key 'ranks'.", "parts it."),
    "oft.r=4": ("[C101] tuners.oft: no key 'r'; did you mean 'block_size'?", ""),
    "ia3.r=4": ("[C101] tuners.ia3: no key 'r' (known: feedforward, layers,", ""),
    "fish.keep=0.1": ("[C101] tuners.fish: no key 'keep'; did you mean 'share'?", ""),
    "layers.layers=last:2": ("[C101] tuners.layers: no key 'layers'; did you mean 'which'?", ""),
    "mores.r=2": ("[C101] tuners.mores: no key 'r'; did you mean 'rank'?", ""),
    "mores.positions=ratio:2": ("[C102] tuners.mores: positions='ratio:2': 2 is no share.", "above 0, at most 1."),
    "tuners.all={kind: full, part: vison}": ("[C102] tuners.all: full.part='vison' is no part; did you mean", ""),
}
TWO_STAGES = {
    "instruct.batch.size=2": ("[C101] 'instruct' is a stage of this recipe", "write stages.instruct.batch.size."),
    "instrct.batch.size=2": ("[C101] no section 'instrct'; did you mean 'stages.instruct'?", ""),
    "lora.r=2": ("[C105] lora.r is set per stage in this recipe.", "Fix: write stages.instruct.lora.r."),
    "stages.instruct.lora.r=0": ("[C102] stages.instruct.tuners.lora: lora.r=0 is out of range.", "at least 1."),
    "stages.instruct.loar.r=4": ("[C101] stages.instruct: no key 'loar'; did you mean 'lora'?", ""),
    "stages.instruct.lora.rank=4": ("[C101] stages.instruct.tuners.lora: no key 'rank'; did you mean 'r'?", ""),
}
EVERY = [("llava_lora", *row) for row in ONE_STAGE.items()] + [("llava_two_stage", *row) for row in TWO_STAGES.items()]


@pytest.mark.parametrize(("recipe", "override", "answer"), EVERY, ids=[row[1] for row in EVERY])
def test_a_wrong_option_in_a_recipe_is_answered_with_the_right_one(
    recipe: str, override: str, answer: tuple[str, str]
) -> None:
    message = refusal(recipe, override)
    assert message.startswith(answer[0]), message
    assert message.endswith(answer[1]), message


AGAINST_A_MODEL: dict[str, tuple[list[Any], str]] = {
    "no such layer": ([LoRA(2, targets=("q_prj",))], r"M550.*tuner 'lora': no linear layer 'q_prj'.*mean 'q_proj'"),
    "a name for a pattern": ([LoRA(2, targets="attn")], r"M550.*no linear layer 'attn' in language.*all-linear"),
    "a pattern of nothing": ([LoRA(2, targets="re:attn")], r"M550.*matches no linear layer.*match paths like 0\."),
    "blocks it lacks": ([LoRA(2, layers="last:100")], r"C102.*tuner 'lora': layers='last:100'.*blocks 0 to 1"),
    "tuned blocks it lacks": ([LayerTuning("last:100")], r"C102.*layers.which='last:100'.*blocks 0 to 1"),
    "steered blocks it lacks": ([MoReS(layers=(7,))], r"C102.*tuner 'mores'.*the model has 2 blocks.*use 0 to 1"),
    "unfrozen blocks it lacks": (
        [GradualUnfreezing((9,), (0,))],
        r"C102.*tuner 'unfreeze'.*\(9,\).*use 2 blocks in all",
    ),
    "ranks of no target": ([DoRA(2, targets="minimal", ranks={"o_proj": 4})], r"M550.*dora\.ranks.*'o_proj'"),
    "a rank above the width": ([LoRA(64, init="pissa")], r"M551.*r=64.*at most 32"),
    "a width no block divides": ([OFT(5)], r"M551.*tuner 'oft'.*5.*32"),
    "no biases": ([BitFit()], r"M55\d.*tuner 'bitfit'.*bias.*norm"),
    "no norms": ([NormTuning(part="projector")], r"M55\d.*tuner 'norm'.*projector"),
    "one twice": ([LoRA(2), LoRA(3)], r"M552.*'lora_language'.*meets another 'lora' there.*use one of them"),
    "a part twice": ([Full("language"), LayerTuning("last:1")], r"M552.*another tuner stands for it.*one of the two"),
    "dora on lora": ([LoRA(2), DoRA(2)], r"M552.*q_proj: DoRALinear reads the weight, which LoRALinear below it"),
    "dora on ia3": ([IA3(), DoRA(2)], r"M552.*DoRALinear reads the weight.*name the first before the other"),
    "dora on trained blocks": ([DoRA(2), LayerTuning("last:1")], r"M552.*DoRALinear reads the weight.*Retrained"),
}


@pytest.mark.parametrize("name", AGAINST_A_MODEL)
def test_what_a_model_lacks_is_refused_by_name_and_leaves_the_model_as_it_was(name: str) -> None:
    tuners, message = AGAINST_A_MODEL[name]
    model = hf_llava()
    before = state_of(model)
    with pytest.raises(VlmpeftError, match=message) as caught:
        tune(model, tuners)
    assert "\n" not in caught.value.line()
    assert not changed(before, model)


@pytest.mark.parametrize("others", [[IA3()], [LoRA(2)], [OFT(4), VeRA(4)]])
def test_dora_below_other_adapters_merges_as_it_acts(others: list[Any]) -> None:
    model, given = hf_llava(), hf_inputs()
    tuned = tune(model, [DoRA(2), *others])
    randomise(tuned.trainable())
    adapted = logits(model, given)
    tuned.merge()
    torch.testing.assert_close(logits(model, given), adapted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_in_a_pool_dora_may_come_last_and_its_rows_see_no_other_adapter() -> None:
    model, given = hf_llava(), {k: v for k, v in hf_inputs().items() if k != "labels"}
    pool = AdapterPool(tune(model, [Full("projector")]))
    for name, tuner in (("lora", LoRA(2)), ("dora", DoRA(2))):
        pool.add(name, tuner)
        randomise(pool.parameters(name))
    with pool.rows(["dora"]):
        found = logits(model, given)
    alone = hf_llava()
    ours = tune(alone, [DoRA(2)]).trainable()
    for mine, other in zip(ours.values(), pool.parameters("dora").values(), strict=True):
        mine.copy_(other)
    torch.testing.assert_close(found, logits(alone, given), rtol=1e-5, atol=1e-5)
