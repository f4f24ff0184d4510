"""YAML text that may come from anybody: small, shallow, and still small once its aliases are expanded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from vlmpeft.errors import ConfigError

MAX_BYTES = 256 * 1024
MAX_DEPTH = 32
MAX_NODES = 50_000


def read_yaml_text(path: Path) -> str:
    """The text of a YAML file, checked before anything is built from it.

    Raises: ConfigError C107 if it is too large, too deep, grows too large by its aliases, or is no YAML.
    """
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ConfigError("C107", f"{path} has {size:,} bytes, a recipe at most {MAX_BYTES:,}.", "check the path.")
        text = path.read_bytes().decode("utf-8-sig")
        nodes = _expanded_nodes(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("C107", f"{path} cannot be read: {error}.", "save it as UTF-8 text.") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError("C107", f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if nodes > MAX_NODES:
        raise ConfigError("C107", f"{path} grows to {nodes:,} values by its aliases.", "write a recipe without them.")
    return text


def line_of(text: str, path: Sequence[str]) -> int | None:
    """The line, from 1, of the key that a path leads to; None if the text does not hold it."""
    node, line = yaml.compose(text, Loader=yaml.SafeLoader), None
    for part in path:
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        found = next(((key, value) for key, value in pairs if key.value == part), None)
        if found is None:
            return None
        line, node = found[0].start_mark.line + 1, found[1]
    return line


def _expanded_nodes(text: str) -> int:
    """Values in a YAML text once every alias stands for a copy. Raises: ValueError if it nests too deeply."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # PyYAML's own parser takes quadratic time on deep lists
    sizes: dict[str, int] = {}  # of finished anchors
    open_nodes: list[tuple[str | None, int]] = [(None, 0)]  # anchor and size so far, outermost first
    for event in yaml.parse(text, Loader=loader):
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, 1))
            if len(open_nodes) > MAX_DEPTH:
                raise ValueError(f"nested deeper than {MAX_DEPTH}")
            continue
        anchor, size = None, 0
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, size = open_nodes.pop()
        elif isinstance(event, yaml.ScalarEvent):
            anchor, size = event.anchor, 1
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise ValueError(f"alias *{event.anchor} stands inside or before what it names")
            size = sizes[event.anchor]
        if anchor is not None:
            sizes[anchor] = size
        outer, so_far = open_nodes[-1]
        open_nodes[-1] = (outer, so_far + size)
    return open_nodes[0][1]
