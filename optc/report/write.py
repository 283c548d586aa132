"""A document as one HTML, Markdown or JSON file, by the file's extension."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optc.errors import OptcError
from optc.paths import encodable
from optc.report.document import Document
from optc.report.markdown import markdown
from optc.report.page import page

FORMATS = (".html", ".md", ".json")


def check_path(path: Path) -> None:
    """Make sure that a report can be written there, before anything that takes time.

    Raises:
        OptcError: the extension is none of :data:`FORMATS`, or no file can be written there.
    """
    if path.suffix.lower() not in FORMATS:
        raise OptcError(f"a report is written as {', '.join(FORMATS)}, not as '{path.name}'", "choose an extension")
    check_place(path, "the report")


def check_place(path: Path, what: str) -> None:
    """Make sure that a file can be written there.

    Args:
        what: what is to be written, such as ``"the report"``.

    Raises:
        OptcError: there is no such folder, it cannot be written to, or the name is a folder's or too long.
    """
    folder = path.absolute().parent
    try:
        if not folder.is_dir():
            raise OptcError(f"there is no folder '{path.parent}' for {what}", "make it first")
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _unwritable(path, what, error) from error


def write_whole(path: Path, content: bytes, what: str) -> None:
    """Write a file whole or not at all; what was there is replaced.

    Args:
        what: what is written, such as ``"the report"``.

    Raises:
        OptcError: the file cannot be written.
    """
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.absolute().parent, prefix=".optc-", delete=False) as file:
            temporary = Path(file.name)
            file.write(content)
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise _unwritable(path, what, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _unwritable(path: Path, what: str, error: OSError) -> OptcError:
    return OptcError(f"cannot write {what} '{path}': {error.strerror or error}", "choose another path")


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
    write_whole(path, encodable(text).encode(), "the report")
