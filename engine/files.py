"""Crash-safe file writes, and a lock on a run's folder."""

import contextlib
import errno
import math
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import filelock

from engine.console import log
from engine.distributed import on_rank0
from engine.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room on the disk, or for this user, or in one file


def check_file(path: str | os.PathLike) -> None:
    """Raise OSError unless this is a file; reading a pipe or a device may never end."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "not a file", os.fspath(path))


def write_durably(path: Path, *parts: bytes | memoryview) -> None:
    """Replace a file atomically: after a crash at any moment it holds the old content or the new, all `parts`.

    Raises UserError if it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)  # left by a killed process
        with open(temporary, "xb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        size, advice = "", "Choose another folder"
        if error.errno in FULL:
            size = f"it takes {math.ceil(sum(map(len, parts)) / 1e6) or 1} MB, and "
            advice = "Free some space or choose another folder"
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); {size}an existing file is unchanged. {advice}, and run "
            "this again"
        ) from None
    finally:
        with contextlib.suppress(OSError):  # after a success it is gone
            temporary.unlink(missing_ok=True)
    if os.name == "posix":
        with contextlib.suppress(OSError):  # make the new name durable too, where the file system can
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def replace_files(folder: Path, files: Mapping[str, bytes], stale: Iterable[Path] = ()) -> None:
    """Replace files of a folder, by their relative path, and remove the `stale` ones: all of this or nothing.

    Every file is on the disk before the first one is replaced. Raises UserError if one cannot be written.
    """
    waiting = folder / ".new"
    try:
        shutil.rmtree(waiting, ignore_errors=True)  # left by a killed process
        for name, content in files.items():
            write_durably(waiting / name, content)
        for name in files:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(waiting / name, path)
        for path in stale:
            path.unlink(missing_ok=True)
            if path.parent != folder and not any(path.parent.iterdir()):
                path.parent.rmdir()
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be replaced ({error.strerror}); move it away") from None
    finally:
        shutil.rmtree(waiting, ignore_errors=True)


@contextlib.contextmanager
def lock(folder: Path, wait: bool = False) -> Iterator[None]:
    """Hold the lock on a folder. If another process holds it: wait for that with `wait`, else raise UserError.

    The lock is a file beside the folder, which stays there. The system releases it when a process dies.
    """
    held = filelock.FileLock(folder.with_name(f".{folder.name}.lock"))

    @on_rank0
    def acquire() -> None:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            held.acquire(timeout=0)
        except filelock.Timeout:
            if wait:
                log.info(f"{folder}: another process is writing there; waiting for it to finish")
                held.acquire()
                return
            raise UserError(
                f"{folder}: another process is writing there. Wait for it, stop it, or choose another "
                "name for this experiment (--run NAME)"
            ) from None
        except NotImplementedError:
            log.info(f"{folder}: this file system does not support locks; make sure that no other process writes there")
        except OSError as error:
            raise UserError(
                f"{folder}: cannot be written ({error.strerror}); choose another folder (--checkpoints_path, "
                "--imgs_path)"
            ) from None

    try:
        acquire()
        yield
    finally:
        held.release()
