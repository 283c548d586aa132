"""What the user is told of a failure: one line, unless it is a bug in optc."""

from __future__ import annotations

import errno
from pathlib import Path

from optc.errors import OptcError

_NO_MEMORY = "not enough memory — give a smaller --batch, or use a machine with more"
_TORCH_HAS_NO_MEMORY = ("can't allocate memory", "out of memory")
"""What PyTorch says, on the CPU and on GPUs."""


def in_one_line(error: BaseException) -> str | None:
    """What went wrong and how to mend it; ``None`` for what can only be a bug."""
    match error:
        case OptcError():
            return str(error)
        case SystemExit():
            return f"code of the model or of a plugin called sys.exit({error.code!r}) — run with -v to see where"
        case OSError():
            return _of_the_system(error)
        case MemoryError():
            return _NO_MEMORY
        case RuntimeError() if any(each in str(error) for each in _TORCH_HAS_NO_MEMORY):
            return _NO_MEMORY
    return None


def _of_the_system(error: OSError) -> str | None:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" while writing {error.filename}" if error.filename else ""
        done = f"no space left on the disk{where}; nothing was left half-written"
        return f"{done} — free some, choose another -o, or another TMPDIR"
    if not error.filename and "temporary directory" in str(error.strerror):
        return f"{error.strerror} — free some space, or set TMPDIR to a folder that can be written"
    if not error.filename and isinstance(error, FileNotFoundError) and not _has_current_folder():
        return "the current folder is gone — change to another"
    if not error.filename:
        return None
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"'{error.filename}' is not accessible: {error.strerror} — choose another or its permissions"
    return f"'{error.filename}': {error.strerror} — check the name, or choose another"


def _has_current_folder() -> bool:
    try:
        return Path.cwd().is_dir()
    except OSError:
        return False
