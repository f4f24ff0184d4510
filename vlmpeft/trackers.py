"""Experiment trackers: those accelerate knows, refused by name before anything runs if they cannot work."""

from __future__ import annotations

from collections.abc import Sequence

from vlmpeft.errors import ConfigError, EnvironmentFault, nearest


def check_trackers(names: Sequence[str]) -> None:
    """accelerate passes over a tracker whose package is missing without a word; here it is an error.

    Raises: ConfigError C102 for an unknown name; EnvironmentFault E413 for a package that is not installed.
    """
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import LoggerType

    available = {tracker.value for tracker in get_available_trackers()}
    known = [name for name in LoggerType.list() if name != "all"]
    for name in names:
        if name not in known:
            raise ConfigError("C102", f"run.trackers: no tracker '{name}'{nearest(name, known)}")
        if name not in available:
            message = f"run.trackers: '{name}' needs a package that is not installed."
            raise EnvironmentFault("E413", message, f"pip install {name}, or take it out of run.trackers.")
