"""Parameter-efficient fine-tuning of LLaVA-style vision-language models.

Public names load on first use, so `import vlmpeft` and the scorers need no torch.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmpeft.build import Bundle, build
    from vlmpeft.checkpoint import load
    from vlmpeft.config import load_recipe
    from vlmpeft.parts import Parts, parts_of
    from vlmpeft.recipe import Recipe
    from vlmpeft.steps import Steps
    from vlmpeft.tune import Tuned, tune

__version__ = "0.1.0"

_HOME = {
    "Bundle": "build",
    "Parts": "parts",
    "Recipe": "recipe",
    "Steps": "steps",
    "Tuned": "tune",
    "build": "build",
    "load": "checkpoint",
    "load_recipe": "config",
    "parts_of": "parts",
    "tune": "tune",
}
__all__ = ["Bundle", "Parts", "Recipe", "Steps", "Tuned", "build", "load", "load_recipe", "parts_of", "tune"]


def __getattr__(name: str) -> Any:
    """Import a public name's module when the name is first asked for (PEP 562)."""
    if name in _HOME:
        value = getattr(importlib.import_module(f"vlmpeft.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    if name in ("tuners", "projectors", "steering", "eval"):
        return importlib.import_module(f"vlmpeft.{name}")
    raise AttributeError(f"module 'vlmpeft' has no attribute '{name}'")


class _Package(types.ModuleType):
    """Keeps `vlmpeft.build` and `vlmpeft.tune` functions: the import of a submodule of that name would replace them."""

    def __setattr__(self, name: str, value: Any) -> None:
        hides = isinstance(value, types.ModuleType) and _HOME.get(name) == name
        super().__setattr__(name, getattr(value, name) if hides else value)


sys.modules[__name__].__class__ = _Package
