"""Where an artifact or a run is to be written."""

from __future__ import annotations

import tempfile
from pathlib import Path

from optc.errors import ArtifactError


def check_output(path: Path) -> None:
    """Make sure that a folder can be written there, before anything that takes time.

    Raises:
        ArtifactError: there is something already, or what is to hold it is no folder or cannot be written to.
    """
    if path.exists() or path.is_symlink():
        raise ArtifactError(f"output folder '{path}' exists", "choose another -o or remove it")
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise ArtifactError(
            f"cannot write '{path}': '{parent}': {error.strerror or error}", "choose another -o"
        ) from error
