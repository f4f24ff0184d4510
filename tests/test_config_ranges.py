"""The edges of every range: the last value that is taken and the first that is not."""

from __future__ import annotations

import pytest

from vlmpeft.config import load_recipe
from vlmpeft.errors import ConfigError

# key: values taken, values refused
RANGES = {
    "optim.lr": ("1e-9 1", "0 -1e-3 1.0001 .nan .inf"),
    "optim.weight_decay": ("0 0.999", "-0.1 1 .nan"),
    "optim.betas": ("[0,0] [0.999,0.9]", "[1,0.9] [0.9,1] [-0.1,0.9] [0.9] [0.9,.nan]"),
    "optim.eps": ("1e-20", "0 -1 .nan .inf"),
    "optim.clip": ("null 1e-9 5", "0 -1 .nan"),
    "optim.schedule": ("cosine linear constant", "cosin null 1"),
    "optim.warmup": ("0 0.999", "-0.01 1 .nan"),
    "optim.epochs": ("0.01 3", "0 -1 .nan .inf"),
    "optim.steps": ("null 1", "0 -1 1.5 .inf"),
    "batch.size": ("16 17", "15 0 -1 1.5"),  # batch.micro is 16 here
    "batch.micro": ("1 128", "0 129 -1"),
    "batch.group": ("none length modality", "lenght true"),
    "data.max_length": ("16 4096", "15 0 -1 null"),
    "data.held_out": ("0 0.5", "-0.1 0.51 .nan"),
    "data.max_bad_fraction": ("0 1", "-0.1 1.1 .nan"),
    "data.workers": ("0 8", "-1 1.5"),
    "data.truncate": ("right skip error", "left"),
    "data.image_mode": ("pad square anyres", "crop"),
    "data.tiles": ("[[1,1]] [[1,2],[16,1]]", "[] [[0,1]] [[1,17]] [[1,2,3]] [1,2] null"),
    "data.max_image_pixels": ("1 178956970", "0 -1 178956971 1.5"),
    "data.verify_images": ("header full none", "never"),
    "data.on_bad_sample": ("error skip", "warn"),
    "data.cache_features": ("true false no", "1 maybe null"),
    "align.epochs": ("0 8", "-1 1.5"),
    "align.lr": ("1e-9 1", "0 1.0001 .nan"),
    "align.weight_decay": ("0 0.999", "-0.1 1"),
    "align.batch": ("1", "0 -1"),
    "align.scale": ("0.1", "0 -1 .inf"),
    "align.max_share": ("0.01 1", "0 1.01 .nan"),
    "eval.max_new_tokens": ("1", "0 -1"),
    "eval.batch_size": ("1", "0 -1"),
    "run.seed": ("0 9223372036854775807", "-1 9223372036854775808 1.5"),
    "run.keep": ("2", "1 0 -1"),
    "run.log_every": ("1", "0 -1"),
    "run.save_every": ("0 5", "-1"),
    "run.eval_every": ("0 5", "-1"),
    "run.patience": ("0 5", "-1"),
    "run.precision": ("auto bf16 fp32", "fp16 8"),
    "run.dry_run": ("true false", "1 maybe"),
    "vision.layer": ("-1 3", "1.5 null"),
    "vision.image_size": ("null 1 336", "0 -1"),
    "vision.std": ("null [1,1,1]", "[1,1] [0,1,1] [-1,1,1] [.nan,1,1]"),
    "vision.mean": ("null [0,0,0]", "[1,1] [.nan,1,1] 0.5"),
    "vision.weights_by": ("name order", "size"),
    "lora.r": ("1 512", "0 -1 1.5 null"),
    "lora.alpha": ("null 0.5", "0 -1 .nan .inf"),
    "lora.dropout": ("0 0.99", "-0.01 1 .nan"),
    "lora.lr": ("null 1", "0 1.1 .nan"),
    "lora.part": ("language vision projector lm_head", "langauge"),
    "lora.rslora": ("true false", "1"),
    "tuners.projector.lr": ("null 1", "0 1.1 .nan"),
    "tuners.projector.part": ("projector vision", "projectors"),
    "turns": ("chat independent", "both"),
    "gradient_checkpointing": ("true false", "1"),
}


@pytest.mark.parametrize("key", RANGES)
def test_values_inside_are_taken_and_those_outside_refused_by_name(key: str) -> None:
    taken, refused = (values.split() for values in RANGES[key])
    for value in taken:
        load_recipe("llava_lora", [f"{key}={value}"])
    for value in refused:
        with pytest.raises(ConfigError) as caught:
            load_recipe("llava_lora", [f"{key}={value}"])
        assert caught.value.code in ("C102", "C106"), value
        assert key.rpartition(".")[2] in str(caught.value)
        assert caught.value.fix
