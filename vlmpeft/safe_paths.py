"""Names of image files, as data gives them, to paths inside one folder; nothing outside it is ever opened."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from vlmpeft.errors import DataError

HINTS = 20  # missing files for which a nearest name is searched: a wrong folder makes every file missing
SEARCHED = 5000  # names of a folder that are compared letter by letter


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
            raise DataError("D103", f"no image '{name:.200}' in {self.folder}{self.hint(path)}.", fix)
        return path

    def hint(self, path: Path) -> str:
        """What to say of a file that is not there: the nearest name beside it, or how many files there are."""
        inside = str(path) != self.root and path.parent.is_dir()
        names = self._listing(path.parent if inside else Path(self.root))
        close = [n for n in names if n.lower() == path.name.lower()]
        if not close and self._hints < HINTS:
            self._hints += 1
            close = difflib.get_close_matches(path.name, names[:SEARCHED], n=1)
        return f"; did you mean '{close[0]}'?" if close else f" ({len(names)} files there)"

    def _listing(self, folder: Path) -> list[str]:
        if folder not in self._names:
            self._names[folder] = sorted(os.listdir(folder))
        return self._names[folder]
