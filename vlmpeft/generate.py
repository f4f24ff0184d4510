"""Answer a question about an image.

python -m vlmpeft.generate model=runs/quickstart/final image=photo.jpg prompt="What is shown?"
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from vlmpeft.errors import DataError, run_command
from vlmpeft.eval.model import open_model
from vlmpeft.eval.runner import parse_arguments

DEFAULTS = {"image": "", "max_new_tokens": 128, "device": "auto"}


def main(argv: Sequence[str]) -> None:
    """Print the answer. Several images: image=a.jpg,b.jpg with as many <image> in the prompt, or none."""
    arguments = parse_arguments(argv, DEFAULTS, ("model", "prompt"), __doc__ or "")
    images = [Path(name) for name in arguments["image"].split(",") if name]
    for path in images:
        if not path.is_file():
            raise DataError("D103", f"no image file {path}.", "check image=FILE.")
    bundle = open_model(arguments["model"], arguments["device"])
    print(bundle.generate(images, arguments["prompt"], max_new_tokens=arguments["max_new_tokens"]))


if __name__ == "__main__":
    sys.exit(run_command(main))
