"""A folder written whole or not at all, replaced in one operation: written under a temporary name,
synced, and exchanged by renameat2 with RENAME_EXCHANGE. Without it (NFS, macOS) two renames do it,
and `recover_folder` restores the older folder after a kill between them.
"""

import ctypes
import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from posttrain.backend.errors import CheckpointError

AT_FDCWD, RENAME_EXCHANGE = -100, 2
NOT_SUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` if the block succeeds, and is deleted if not.
    CheckpointError, with `path` unchanged, if the folder cannot be written, or holds something else."""
    path = Path(os.path.realpath(path))  # a link's target is replaced
    temporary = _temporary(path)
    try:
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "there is a file in the folder's place", str(path))
        recover_folder(path)
        temporary.mkdir(parents=True)
        yield temporary
        _check_alike(path, temporary)
        for file in [*temporary.rglob("*"), temporary]:
            if file.is_file():
                _readable_as(temporary, file)
            _fsync(file)
        _replace(path, temporary)
        _fsync(path.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"could not write {path}: {error}. Checkpoints written before it are untouched"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_alike(path: Path, temporary: Path) -> None:
    """FileExistsError if more would be deleted with `path` than an older version of the new folder: a folder that
    the new one lacks, or, where no file has the name of a new one, all of it."""
    there = [*path.iterdir()] if path.exists() else []
    new = {entry.name for entry in temporary.iterdir()}
    foreign = [entry.name for entry in there if entry.name not in new]
    if folders := [name for name in foreign if (path / name).is_dir()]:
        raise FileExistsError(errno.EEXIST, f"it holds {folders[0]}, which would be deleted; choose another name")
    if foreign and len(foreign) == len(there):
        raise FileExistsError(errno.EEXIST, f"it holds {foreign[0]}, so it is not a checkpoint; choose another name")


def recover_folder(path: Path) -> None:
    """Cleans up after a killed atomic_folder(path): restores the previous folder, deletes the rest."""
    temporary, previous = _temporary(path), _previous(path)
    if previous.exists() and not path.exists():
        previous.rename(path)
    for leftover in (temporary, previous):
        shutil.rmtree(leftover, ignore_errors=True)


def recover_folders(parent: Path) -> None:
    """`recover_folder` for each folder in `parent`. No other process may write there."""
    for leftover in [*parent.glob(".*.tmp"), *parent.glob(".*.old")]:
        recover_folder(parent / leftover.name[1:-4])


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _previous(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _replace(path: Path, temporary: Path) -> None:
    """`temporary` gets the name `path`; then the previous folder is deleted."""
    if not path.exists():
        temporary.rename(path)
    elif not _exchange(path, temporary):
        previous = _previous(path)
        path.rename(previous)
        try:
            temporary.rename(path)
        except OSError:
            previous.rename(path)
            raise
        _fsync(path.parent)
        shutil.rmtree(previous, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swaps two folders in one operation. False if the kernel or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in NOT_SUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(a))


def _readable_as(folder: Path, file: Path) -> None:
    """safetensors makes files that nobody else can read, whatever the umask, which the new folder has followed."""
    with suppress(OSError):  # a file system without permissions
        file.chmod(folder.stat().st_mode & 0o666)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
