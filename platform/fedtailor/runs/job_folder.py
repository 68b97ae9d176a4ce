"""The working directory of a Ray job is a copy that Ray deletes, so no result may be kept in it."""

from __future__ import annotations

import os

from fedtailor.core.errors import ConfigError
from fedtailor.runs.storage import Storage

_COPIES, _COPY = "working_dir_files", "_ray_pkg_"
"""Where Ray unpacks the working directories of jobs, ``runtime_resources/working_dir_files/_ray_pkg_HASH``."""


def refuse_job_folder(key: str, url: str | os.PathLike[str]) -> None:
    """Refuses to keep results in a job's copy of the code.

    Args:
        key: what named the place, for the message.
        url: local folder, relative ones are meant from here, or any other URL.

    Raises:
        ConfigError: names the key, the place and what to give instead.
    """
    storage = Storage(url)
    if not storage.is_local:
        return
    place = storage.local_path().resolve()
    if any(folder.name.startswith(_COPY) and folder.parent.name == _COPIES for folder in (place, *place.parents)):
        raise ConfigError(
            f"'{key}': {os.fspath(url)} lies in this Ray job's copy of the working directory ({place}), which Ray "
            "deletes; give a folder that all nodes see, e.g. /shared/runs"
        )
