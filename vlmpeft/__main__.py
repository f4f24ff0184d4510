"""`vlmpeft <command> key=value ...`: the same as `python -m vlmpeft.<command>`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from vlmpeft.errors import ConfigError, nearest, run_command

COMMANDS = {
    "train": "train one stage or all stages of a recipe",
    "doctor": "prove a run right before it starts",
    "plan": "memory and FLOPs of a run, and how it fits a device",
    "generate": "answer a question about an image",
    "merge": "fold the adapters of a model into its weights",
    "adapters": "merge adapters, or average runs",
    "export": "write a model for transformers, peft or LLaVA",
    "compare": "compare ways to tune, over several seeds",
    "inspect": "show samples with the tokens that are trained, and count them",
    "lmar": "measure how much attention the image gets, layer by layer",
    "scenes": "draw the quickstart's data set",
    "eval.pope": "yes/no questions by POPE's official rules",
    "eval.short": "short answers by exact match, per question type",
    "eval.choice": "multiple choice on your own questions",
    "eval.mmmu": "MMMU, by subject and domain",
    "eval.scienceqa": "ScienceQA, the questions with an image",
    "eval.mmbench": "MMBench, vanilla or circular",
    "eval.iconqa": "IconQA, text choices or blanks",
    "eval.vqa": "VQAv2, TextVQA, VizWiz: answers of ten annotators",
    "eval.gqa": "GQA by exact match",
    "eval.mme": "MME, perception and cognition",
    "eval.hallusion": "HallusionBench, by answer, question and figure",
    "eval.mmvet": "MM-Vet: answers for a judge, and its grades",
    "eval.caption": "captions by BLEU, ROUGE-L and CIDEr-D",
    "eval.summary": "the scores of several benchmarks in one table",
}


def _command(argv: Sequence[str]) -> int | None:
    if not argv or argv[0] in ("--help", "-h", "help"):
        print("usage: vlmpeft <command> key=value ...   (vlmpeft <command> --help lists the keys)\n")
        print("\n".join(f"  {name:<16}{does}" for name, does in COMMANDS.items()))
        return 0
    name = argv[0]
    if name not in COMMANDS:
        raise ConfigError("C100", f"no command '{name}'{nearest(name, COMMANDS)}")
    return importlib.import_module(f"vlmpeft.{name}").main(argv[1:])


def main() -> int:
    """Entry point of the `vlmpeft` script."""
    return run_command(_command)


if __name__ == "__main__":
    sys.exit(main())
