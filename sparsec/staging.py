"""Files and folders that appear whole: made under a hidden name beside the target and renamed when complete.

Whatever interrupts, what was there before stays or the new one is there; an existing artifact is exchanged in one step.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sparsec.errors import BuildError, SparsecError, UsageError
from sparsec.manifest import MANIFEST, SUFFIX


def check_output(path: Path, overwrite: bool) -> None:
    """Raise UsageError, before any work is done, if `path` may not be written."""
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise UsageError("exists already; give --overwrite to replace it", str(path))
    if path.name.endswith(SUFFIX) and not ((path / MANIFEST).is_file() or (path.is_dir() and not any(path.iterdir()))):
        raise UsageError("exists and is not an artifact; remove it yourself or choose another -o", str(path))
    if path.is_dir() != path.name.endswith(SUFFIX):
        raise UsageError("exists and is a folder; choose another -o", str(path))


def storage_error(error: OSError, path: Path) -> SparsecError:
    """`error` of the file system as one line."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return BuildError("the disk is full; free some space or choose another -o", str(path))
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return UsageError(f"cannot write: {error.strerror}; choose another -o", str(path))
    return UsageError(f"cannot write: {error.strerror or error}", str(error.filename or path))


@contextlib.contextmanager
def staged(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary directory beside `path` that becomes `path` when the block ends, or vanishes when it raises.

    An existing artifact is exchanged in one step, so one of the two is always there. Raises UsageError before the block
    runs if `path` exists and `overwrite` is false or the folder cannot be written.
    """
    path = Path(path)
    check_output(path, overwrite)
    made: list[Path] = []
    stage: Path | None = None
    try:
        for folder in reversed((path.parent, *path.parent.parents)):
            if not folder.exists():
                folder.mkdir()
                made.append(folder)
        stage = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
        yield stage
        stage.chmod(0o755)
        _commit(stage, path)
    except BaseException as error:
        full = _full(path.parent)
        if stage is not None:
            shutil.rmtree(stage, ignore_errors=True)
        for folder in reversed(made):
            with contextlib.suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError):
            raise storage_error(error, path) from error
        if isinstance(error, BuildError) and full:
            raise storage_error(OSError(errno.ENOSPC, ""), path) from error
        raise


@contextlib.contextmanager
def staged_file(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Like `staged` for one file: the block writes the yielded path, which is then renamed to `path`."""
    path = Path(path)
    check_output(path, overwrite)
    stage: Path | None = None
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        os.close(handle)
        stage = Path(name)
        yield stage
        mask = os.umask(0)
        os.umask(mask)
        stage.chmod(0o666 & ~mask)
        stage.replace(path)
    except BaseException as error:
        if stage is not None:
            stage.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise storage_error(error, path) from error
        raise


def _full(folder: Path) -> bool:
    try:
        facts = os.statvfs(folder)
    except OSError:
        return False
    return facts.f_bavail * facts.f_frsize < 1 << 16


def _commit(stage: Path, path: Path) -> None:
    if not path.exists():
        stage.rename(path)
    elif _exchange(stage, path):
        shutil.rmtree(stage, ignore_errors=True)  # the old artifact by now
    else:
        old = stage.with_suffix(".old")
        path.rename(old)
        try:
            stage.rename(path)
        except BaseException:
            old.rename(path)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two paths in one step (Linux renameat2, RENAME_EXCHANGE); false where the system cannot."""
    at_cwd, rename_exchange = -100, 2
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return renameat2(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), rename_exchange) == 0
