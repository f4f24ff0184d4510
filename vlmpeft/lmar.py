"""LMAR: how much of a model's attention an image token gets, against a text token, layer by layer.

python -m vlmpeft.lmar model=runs/mine/final data=train.json images=photos out=lmar
python -m vlmpeft.lmar model=runs/before/final,runs/after/final data=train.json images=photos text_scope=prompt

Writes lmar.json (all numbers), lmar.png (ratio and visual mass per layer) and heat.png (attention over a photo).
text_scope: instruction, prompt or all; queries: output or all_text; drop_sink: first tokens left out of the text;
mode: teacher reads the data's answers, generated the model's own; n: samples. The heat map explains the answer's
token (first or its number) of a sample (its number), over the mean of the layers or layers=0,5,11.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmpeft import fs
from vlmpeft.errors import ConfigError, EvalError, nearest, run_command
from vlmpeft.eval.runner import parse_arguments, prepare_folder, table

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from vlmpeft.build import Bundle
    from vlmpeft.lmar_samples import Shown
    from vlmpeft.records import Conversation
    from vlmpeft.steering.pictures import Heat
    from vlmpeft.steering.statistics import Summary

DEFAULTS = {
    "out": "lmar", "n": 100, "text_scope": "instruction", "queries": "output", "drop_sink": "0", "mode": "teacher",
    "max_new_tokens": 64, "batch_size": 8, "sample": 1, "token": "first", "layers": "mean", "seed": "0",
    "device": "auto",
}  # fmt: skip
CHOICES = {
    "text_scope": ("instruction", "prompt", "all"),
    "queries": ("output", "all_text"),
    "mode": ("teacher", "generated"),
}


@dataclass(frozen=True)
class Measured:
    """What was read of one model. rho: (n, l) ratio of each sample. mass: (l,)."""

    name: str
    directory: str
    rho: Tensor
    summary: Summary
    mass: Tensor
    skipped: int


@dataclass(frozen=True)
class Explained:
    """One model's heat maps, with the photo and its caption."""

    photo: Image.Image
    caption: str
    heats: Sequence[Heat]


def main(argv: Sequence[str]) -> None:
    """Measure, write and print."""
    arguments = parse_arguments(argv, DEFAULTS, ("model", "data", "images"), __doc__ or "")
    for key, known in CHOICES.items():
        if arguments[key] not in known:
            raise ConfigError("C102", f"{key}={arguments[key]}{nearest(arguments[key], known)}")
    for key in ("drop_sink", "seed"):
        if not arguments[key].isdecimal():
            raise ConfigError("C102", f"{key}={arguments[key]}: expected an integer from 0.")
    out = prepare_folder(arguments["out"])
    from vlmpeft.lmar_heat import chosen
    from vlmpeft.lmar_samples import with_images

    chosen(arguments["token"], arguments["layers"])
    conversations = with_images(arguments["data"], arguments["images"], arguments["n"])
    directories = [name for name in arguments["model"].split(",") if name]
    found = [
        _measure(directory, name, conversations, arguments)
        for directory, name in zip(directories, names(directories), strict=True)
    ]
    _write(out, arguments, [measured for measured, _ in found], [explained for _, explained in found if explained])
    print(text_table([measured for measured, _ in found]))
    print(f"\n{', '.join(str(path) for path in sorted(out.iterdir()))}")


def names(directories: Sequence[str]) -> list[str]:
    """Short names of model directories: the run's where it is RUN/final; the whole path where that says too little."""
    paths = [Path(d) for d in directories]
    short = [p.parent.name if p.name == "final" and p.parent.name else p.name for p in paths]
    return short if len(set(short)) == len(short) else list(directories)


def _measure(
    directory: str, name: str, conversations: Sequence[Conversation], arguments: Mapping[str, Any]
) -> tuple[Measured, Explained | None]:
    import vlmpeft
    from vlmpeft.lmar_samples import answered_by_data, answered_by_model, batched, run
    from vlmpeft.steering import lmar

    bundle = vlmpeft.load(directory, device=arguments["device"])
    if arguments["mode"] == "generated":
        shown = answered_by_model(bundle, conversations, arguments["max_new_tokens"], arguments["batch_size"])
    else:
        shown = answered_by_data(bundle, conversations)
    scope, queries, sink = arguments["text_scope"], arguments["queries"], int(arguments["drop_sink"])
    probe = lmar(bundle.model, bundle.parts, text_scope=scope, queries=queries, drop_sink=sink)
    with probe:
        for batch in batched(shown, arguments["batch_size"]):
            run(bundle, batch)
    if not shown or not len(probe.per_sample()):
        message = f"{name}: no sample has both an image and text of scope {scope}."
        raise EvalError("V620", message, "set text_scope=all, or give other data.")
    rho, mass, left_out = probe.per_sample(), probe.mass(), len(conversations) - len(shown) + probe.skipped
    measured = Measured(name, directory, rho, probe.summary(int(arguments["seed"])), mass, left_out)
    return measured, _explained(bundle, shown, name, arguments)


def _explained(bundle: Bundle, shown: Sequence[Shown], name: str, arguments: Mapping[str, Any]) -> Explained | None:
    """Heat maps of the chosen sample; None where the model's image tokens form no grid.

    Raises: ConfigError C102 for a sample that is not there, and as `heats`.
    """
    from vlmpeft.lmar_heat import caption, chosen, heats, photo_of

    wanted, number = chosen(arguments["token"], arguments["layers"]), arguments["sample"]
    if number > len(shown):
        raise ConfigError("C102", f"sample={number}: there are {len(shown)}.", "raise n, or choose another.")
    one = shown[number - 1]
    maps = heats(bundle, one, wanted, name)
    return Explained(photo_of(bundle, one), caption(bundle, one, wanted.token), maps) if maps else None


def _write(
    out: Path, arguments: Mapping[str, Any], measured: Sequence[Measured], explained: Sequence[Explained]
) -> None:
    """lmar.json, lmar.png, and heat.png where image tokens form a grid."""
    from vlmpeft.steering.pictures import Line, heat_figure, layers_figure

    settings = {key: arguments[key] for key in ("data", "images", "n", *CHOICES, "drop_sink", "seed")}
    fs.write_json(out / "lmar.json", {"settings": settings, "models": [as_json(m) for m in measured]})
    lines = [
        Line(m.name, *(x.tolist() for x in (m.summary.mean, m.summary.low, m.summary.high, m.mass))) for m in measured
    ]
    with fs.writing(out / "lmar.png") as path:
        path.write_bytes(layers_figure(lines))
    if explained:
        heats = [heat for e in explained for heat in e.heats]
        lines_below = [line for e in explained for line in textwrap.wrap(e.caption, 36 * (1 + len(heats)))]
        png = heat_figure(explained[0].photo, heats, "\n".join(dict.fromkeys(lines_below)))
        with fs.writing(out / "heat.png") as path:
            path.write_bytes(png)


def as_json(measured: Measured) -> dict[str, Any]:
    """One model's numbers; null where a layer has none."""
    from vlmpeft.steering.statistics import numbers

    found = measured.summary
    return {
        "model": measured.directory,
        "name": measured.name,
        "samples": len(measured.rho),
        "left_out": measured.skipped,
        "lmar": {key: numbers(getattr(found, key)) for key in ("mean", "median", "low", "high")},
        "visual_mass": numbers(measured.mass),
        "rho": [numbers(row) for row in measured.rho],
    }


def text_table(measured: Sequence[Measured]) -> str:
    """A row a layer: LMAR with its interval, median and visual mass of every model."""
    blocks = []
    for m in measured:
        rows = [["layer", "LMAR", "95 % interval", "median", "visual mass"]]
        columns = (m.summary.mean, m.summary.low, m.summary.high, m.summary.median, m.mass)
        for layer, (mean, low, high, median, mass) in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
            interval = f"{low:.3g} to {high:.3g}"
            rows.append([str(layer), f"{mean:.3g}", interval, f"{median:.3g}", f"{100 * mass:.1f} %"])
        left_out = f", {m.skipped} left out" if m.skipped else ""
        blocks.append(f"{m.name}: {len(m.rho)} samples{left_out}\n{table(rows)}")
    return "\n\n".join(blocks)


if __name__ == "__main__":
    sys.exit(run_command(main))
