"""The only writer of files: temporary name, fsync, rename, so that a file or directory is either whole or absent."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmpeft.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

TEMPORARY = ".tmp-"  # prefix of what is being written; swept at the next start
TRASH = ".trash-"


def cache_dir() -> Path:
    """Where converted weights are kept: $VLMPEFT_CACHE, else $XDG_CACHE_HOME/vlmpeft, else ~/.cache/vlmpeft."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "vlmpeft"
    return Path(os.environ.get("VLMPEFT_CACHE", default)).expanduser()


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Flush a file or directory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace(source: Path, target: Path) -> None:
    """Rename within one file system and flush the parent, so that the new name survives a power loss."""
    os.replace(source, target)
    fsync(target.parent)


def _readable(path: Path) -> None:
    """Give a file the mode the umask asks for: safetensors writes 0600 whatever it is (safetensors#782)."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed and renamed, else removed.

    Raises: CheckpointError K201 when the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{TEMPORARY}{path.name}-{secrets.token_hex(4)}"
    try:
        yield temporary
        _readable(temporary)
        fsync(temporary)
        replace(temporary, path)
    except OSError as error:
        raise _disk_error(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)


def _disk_error(error: OSError, path: Path) -> Exception:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return error
    free = shutil.disk_usage(path.parent).free
    return CheckpointError("K201", f"no room to write {path} ({free:,} bytes free).", "free disk space or choose another run.dir.")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON with sorted keys and a final newline."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file; tensors are copied to the CPU and made contiguous."""
    from safetensors.torch import save_file

    plain = {k: v.detach().to("cpu").contiguous() for k, v in tensors.items()}
    with writing(path) as temporary:
        save_file(plain, temporary, metadata={"format": "pt", **(metadata or {})})


def append_line(path: Path, line: str) -> None:
    """Append one line and flush it to the operating system."""
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory; on success it takes the place of `path`, else it is removed.

    An existing `path` is moved aside first and deleted last, so that one of the two is always whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{TEMPORARY}{path.name}-{secrets.token_hex(4)}"
    temporary.mkdir()
    try:
        yield temporary
        fsync(temporary)
        trash = path.parent / f"{TRASH}{path.name}-{secrets.token_hex(4)}"
        if path.exists():
            os.replace(path, trash)
        replace(temporary, path)
        remove(trash)
    except OSError as error:
        raise _disk_error(error, path) from error
    finally:
        remove(temporary)


def remove(path: Path) -> None:
    """Delete a directory that no longer counts: renamed first, so that a kill leaves no half directory under its name."""
    if not path.exists():
        return
    if not path.name.startswith((TRASH, TEMPORARY)):
        trash = path.parent / f"{TRASH}{path.name}-{secrets.token_hex(4)}"
        replace(path, trash)
        path = trash
    shutil.rmtree(path, ignore_errors=True)


def sweep(directory: Path) -> list[Path]:
    """Remove what an interrupted write left in `directory`. Returns: the paths removed."""
    left = [p for p in directory.glob(".*") if p.name.startswith((TEMPORARY, TRASH))] if directory.is_dir() else []
    for path in left:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return left
