"""The only writer of files: temporary name, fsync, rename, so that a file or directory is either whole or absent."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmpeft.errors import CheckpointError, VlmpeftError

if TYPE_CHECKING:
    from torch import Tensor

TEMPORARY = ".tmp-"  # prefix of what is being written
# Names of what is not (or no longer) whole: being written, given up, and replaced by a newer one of the same name.
LEFTOVER = re.compile(r"\.(?P<kind>tmp|trash|old)-(?P<name>.+)-[0-9a-f]{8}")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)
OS_CODE = re.compile(r"(?:os error|code:) (\d+)")  # how libraries written in Rust spell errno


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


def _beside(path: Path, kind: str) -> Path:
    """A free name next to `path` that `sweep` knows."""
    return path.parent / f".{kind}-{path.name}-{secrets.token_hex(4)}"


def _readable(path: Path) -> None:
    """Give a file the mode the umask asks for: safetensors writes 0600 whatever it is (safetensors#782)."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what the system says about writing `path` into one line.

    Raises: CheckpointError K201 when the disk is full, K206 when the place is read-only.
    """
    try:
        yield
    except VlmpeftError:
        raise
    except Exception as error:  # tokenizers and safetensors put errno into the text of errors of their own
        found = OS_CODE.search(str(error))
        code = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
        if code in FULL:
            message = f"no room to write {path} ({shutil.disk_usage(existing(path)).free:,} bytes free)."
            raise CheckpointError("K201", message, "free disk space or choose another run.dir.") from error
        if code in REFUSED:
            message = f"cannot write {path}: {os.strerror(code or 0)}."
            raise CheckpointError("K206", message, "choose another run.dir.") from error
        raise


def require_room(directory: Path, needed: int) -> int:
    """Free bytes where a directory is or would be. Raises: CheckpointError K201 if they are fewer than needed."""
    there = existing(directory)
    free = shutil.disk_usage(there).free
    if free < needed:
        message = f"{there} has {free / 2**30:.2f} GiB free, this writes up to {needed / 2**30:.2f} GiB."
        raise CheckpointError("K201", message, "make room, lower run.keep, or choose another run.dir.")
    return free


def existing(path: Path) -> Path:
    """A path if it is there, else the nearest folder above it that is."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.exists())


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed and renamed, else removed.

    Raises: as `explained`.
    """
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _beside(path, "tmp")
        try:
            yield temporary
            _readable(temporary)
            fsync(temporary)
            replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


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
    """Append one line and flush it to the operating system. Raises: as `explained`."""
    with explained(path), path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory; on success all of it is flushed and takes the place of `path`, else it is removed.

    An existing `path` is moved aside first and deleted last; `sweep` brings it back after a kill in between.
    Raises: as `explained`.
    """
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary, old = _beside(path, "tmp"), _beside(path, "old")
        temporary.mkdir()
        try:
            yield temporary
            for inside in (*temporary.rglob("*"), temporary):
                fsync(inside)
            if path.exists():
                os.replace(path, old)
            replace(temporary, path)
            remove(old)
        finally:
            remove(temporary)
            if old.exists() and not path.exists():
                os.replace(old, path)


def remove(path: Path) -> None:
    """Delete a directory: renamed first, so that a kill leaves no half directory under its name."""
    if not path.exists():
        return
    if LEFTOVER.fullmatch(path.name) is None:
        trash = _beside(path, "trash")
        with explained(path):
            replace(path, trash)
        path = trash
    shutil.rmtree(path, ignore_errors=True)


def sweep(directory: Path) -> list[Path]:
    """Clear what an interrupted write left; what was only moved aside comes back. Returns: what was found."""
    left = [p for p in directory.iterdir() if LEFTOVER.fullmatch(p.name)] if directory.is_dir() else []
    for path in left:
        parts = LEFTOVER.fullmatch(path.name)
        if parts and parts["kind"] == "old" and not (directory / parts["name"]).exists():
            replace(path, directory / parts["name"])
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return left


def acquire(path: Path) -> int:
    """Lock a file for this process; the system lets go of it however the process ends. Returns: a handle for `release`.

    Raises: CheckpointError K211 naming the process that holds it; OSError if the file cannot be made.
    """
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.read(handle, 200).decode("utf-8", "replace").strip() or "another process"
            if error.errno in (errno.EACCES, errno.EAGAIN):
                os.close(handle)
                message = f"{owner} works in {path.parent}."
                raise CheckpointError("K211", message, "wait for it, or choose another directory.") from error
            # a file system without locks: the name of the owner is all there is
        if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
            break  # otherwise its last owner removed it between `open` and `lockf`
        os.close(handle)
    os.truncate(handle, 0)
    os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return handle


def release(path: Path, handle: int) -> None:
    """Remove the file and give up the lock of `acquire`."""
    path.unlink(missing_ok=True)
    os.close(handle)
