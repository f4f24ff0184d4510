"""Names of image files, as data gives them, to paths inside one folder; nothing outside it is ever opened."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from vlmpeft.errors import DataError

HINTS = 20  # missing files for which a nearest name is searched: a wrong folder makes every file missing
SEARCHED = 5000  # names of a folder that are compared letter by letter
LONGEST = 255  # characters of a name on the file systems in use


class ImageFolder:
    """A folder of images and what is in it.

    Args: folder: must exist; relative names in the data are relative to it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder, self.root = folder, os.path.realpath(folder)
        self._names: dict[Path, list[str]] = {}
        self._hints = 0

    def path(self, name: str) -> Path:
        """The real path of `name`, without opening anything. Raises: DataError D120 if it is not inside the folder."""
        try:
            targets = [
                os.path.realpath(os.path.join(self.root, n)) for n in dict.fromkeys((name, name.replace("\\", "/")))
            ]
        except ValueError:  # a NUL or a lone surrogate: no file can have that name
            return Path(self.root, re.sub(r"[\\/]", "_", name))
        absolute = re.match(r"/|\\|[A-Za-z]:\\|[A-Za-z][A-Za-z0-9+.-]*:/", name)
        if absolute or any(os.path.commonpath([self.root, t]) != self.root for t in targets):
            raise DataError(
                "D120", f"image '{name:.200}' leads outside the images folder.", "use a name inside that folder."
            )
        return Path(targets[0])

    def find(self, name: str) -> Path:
        """The file called `name`. Raises: DataError D120 as `path`; D103 if there is no such file."""
        path = self.path(name)
        if not name or not os.path.isfile(path):
            fix = "check data.images and the name in the record."
            said = f"no image '{name:.200}' in {self.folder}{self.hint(path)}"
            raise DataError("D103", said if said.endswith("?") else f"{said}.", fix)
        return path

    def hint(self, path: Path) -> str:
        """What to say of a file that is not there: why, or the nearest name, or how many files there are."""
        if os.path.isdir(path) and str(path) != self.root:
            return ": it is a folder"
        if len(path.name) > LONGEST:
            return f": a name of {len(path.name):,} characters is too long for a file"
        near = self._nearest(path)
        if near is None and path.parent != Path(self.root):  # perhaps it is here without its folder
            near = self._like(path.name, Path(self.root))
        if near is not None and str(near) != self.root:
            return f"; did you mean '{near.relative_to(self.root)}'?"
        return f" ({len(self._listing(Path(self.root)))} files there)"

    def _nearest(self, path: Path) -> Path | None:
        """What is there and most like `path`, part by part; None if a part is like nothing."""
        if str(path) == self.root or os.path.lexists(path):
            return path
        folder = self._nearest(path.parent)
        return self._like(path.name, folder) if folder is not None and folder.is_dir() else None

    def _like(self, name: str, folder: Path) -> Path | None:
        """The entry of a folder that is called almost `name`: in another case, or else a few letters apart."""
        names = self._listing(folder)
        close = [n for n in names if n.lower() == name.lower()]
        if not close and self._hints < HINTS:
            self._hints += 1
            close = difflib.get_close_matches(name, names[:SEARCHED], n=1)
        return folder / close[0] if close else None

    def _listing(self, folder: Path) -> list[str]:
        if folder not in self._names:
            self._names[folder] = sorted(os.listdir(folder))
        return self._names[folder]
