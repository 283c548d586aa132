"""A document as one HTML, Markdown or JSON file, by the file's extension."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optc.errors import OptcError
from optc.report.document import Document
from optc.report.markdown import markdown
from optc.report.page import page

FORMATS = (".html", ".md", ".json")


def check_path(path: Path) -> None:
    """Make sure that a report can be written there, before anything that takes time.

    Raises:
        OptcError: the extension is none of :data:`FORMATS`, or there is no such folder.
    """
    if path.suffix.lower() not in FORMATS:
        raise OptcError(f"a report is written as {', '.join(FORMATS)}, not as '{path.name}'", "choose an extension")
    if not path.absolute().parent.is_dir():
        raise OptcError(f"there is no folder '{path.parent}' for the report", "make it first")


def write_report(path: Path, document: Document, data: Mapping[str, Any]) -> None:
    """Write the report whole or not at all; what was there is replaced.

    Args:
        path: ends in ``.html`` or ``.md``, for ``document``, or in ``.json``, for ``data`` (JSON-ready).

    Raises:
        OptcError: another extension, or the file cannot be written.
    """
    check_path(path)
    match path.suffix.lower():
        case ".html":
            text = page(document)
        case ".md":
            text = markdown(document)
        case _:
            text = json.dumps(data, indent=1, allow_nan=False) + "\n"
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.absolute().parent, prefix=f".{path.name}-", delete=False
        ) as file:
            temporary = Path(file.name)
            file.write(text)
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise OptcError(
            f"cannot write the report '{path}': {error.strerror or error}", "choose another path"
        ) from error
