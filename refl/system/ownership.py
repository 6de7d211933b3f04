"""Output folders: which files in them this program wrote, and which process may write there now.

An output folder has a folder `.refl` with

    written-R.sha256   SHA-256 and name of each file that process R wrote, in the format of `sha256sum`; the
                       line is appended before the file gets its name, so that a kill never makes it foreign
    lock               locked by the kernel while a process uses the folder; its text says which one
    *                  files and checkpoints that are not complete yet

A file is the program's own if its content is recorded for its name. Any other file is never replaced or
deleted: `OutputFolder.check` refuses it before the work, `write` at the latest.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import IO

from refl.system.errors import UserError
from refl.system.files import check_output_folder, sync_folder, write_synced

PRIVATE = ".refl"  # folder inside an output folder
KEPT_SIZE = 2**20  # bytes; a copy is kept of smaller files that are adopted
ENDING_LIMIT = 600  # seconds to wait for a process that is ending
REPOSITORY = Path(__file__).parents[2]
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}  # of disks without locks

Known = Mapping[str, Callable[[Path], bool]]
"""Pattern of names -> whether a file was written by a version of this program that kept no records."""


class OutputFolder:
    """A folder in which the program replaces only files of its own."""

    def __init__(self, path: str | Path, known: Known | None = None):
        """`known` recognises files in a folder without records."""
        self.path, self.known = Path(path), known or {}
        self.private = self.path / PRIVATE
        self.written = self._read_records()

    # ---- what is the program's own

    def is_own(self, name: str) -> bool:
        """Whether the file is there and the program wrote it. Raises `OSError` if it cannot be read."""
        path = self.path / name
        if not path.is_file():
            return False
        if self.written:
            with open(path, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() in self.written.get(name, ())
        return any(fnmatch(name, pattern) and is_known(path) for pattern, is_known in self.known.items())

    def foreign(self, names: Sequence[str]) -> list[str]:
        """Those of the files that exist and are not the program's own. Raises `OSError`."""
        return [name for name in names if os.path.lexists(self.path / name) and not self.is_own(name)]

    def check(self, names: Sequence[str], inputs: Collection[str | Path] = ()) -> None:
        """Raise `UserError`, naming all, unless each file can be created or is the program's own.

        `inputs`: files that are read, and so never written.
        """
        existing = check_output_folder(self.path)
        if existing != self.path.absolute():
            return
        inputs, foreign = {os.path.realpath(path) for path in inputs}, []
        for folder in {(self.path / name).parent for name in names}:
            check_output_folder(folder)
        for name in names:
            path = self.path / name
            try:
                is_foreign = bool(self.foreign([name]))
            except OSError as error:
                raise UserError(f"{path} cannot be read: {error.strerror}. It would be replaced.") from error
            if path.is_dir():
                raise UserError(f"{path} is a folder, where a file is to be written. {ADVICE}")
            if is_foreign or os.path.realpath(path) in inputs:
                foreign.append(name)
        if foreign:
            raise UserError(foreign_message(self.path, foreign))

    # ---- writing

    def write(self, name: str, content: bytes | str) -> Path:
        """Write a file atomically and return its path. Raises `OSError`, and `UserError` if a file that is
        not the program's own has that name."""
        content = content.encode() if isinstance(content, str) else content
        path, partial = self.path / name, self.private / name.replace("/", "-")
        if os.path.lexists(path) and not self.is_own(name):
            raise UserError(foreign_message(self.path, [name]))
        try:
            self.private.mkdir(parents=True, exist_ok=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_synced(partial, content)
            self.record(name, content)
            partial.replace(path)
            sync_folder(path.parent)
        except BaseException:
            with suppress(OSError):
                partial.unlink()
            raise
        return path

    def delete(self, name: str) -> None:
        """Delete a file if it is the program's own."""
        if self.is_own(name):
            (self.path / name).unlink()

    def record(self, name: str, content: bytes) -> None:
        """Record that the program writes `content` to the file `name`."""
        digest = _digest(content)
        if digest in self.written.get(name, ()):
            return
        self.private.mkdir(parents=True, exist_ok=True)
        records = self.private / f"written-{os.environ.get('RANK', '0')}.sha256"
        with open(records, "ab+") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
            is_torn = file.read(1) not in (b"", b"\n")  # the last line, by a kill or a full disk
            file.write(b"\n" * is_torn + f"{digest}  {name}\n".encode())
            file.flush()
            os.fsync(file.fileno())
        self.written.setdefault(name, set()).add(digest)

    def adopt(self) -> None:
        """Record the files of a folder that an earlier version wrote, as far as `known` recognises them.

        That is a guess, so a copy of each small file is kept in `.refl/adopted`.
        """
        if self.written:
            return
        for pattern, is_known in self.known.items():
            for path in sorted(self.path.glob(pattern)):
                if not (path.is_file() and is_known(path)):
                    continue
                content, name = path.read_bytes(), path.relative_to(self.path).as_posix()
                if path.parent == self.path and len(content) < KEPT_SIZE:
                    copy = self.private / "adopted" / name
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    copy.write_bytes(content)
                self.record(name, content)

    def _read_records(self) -> dict[str, set[str]]:
        written = {}
        for file in sorted(self.private.glob("written-*.sha256")):
            for line in file.read_text(errors="replace").splitlines():
                digest, _, name = line.partition("  ")
                if len(digest) == 64 and name:  # not the torn end of a line
                    written.setdefault(name, set()).add(digest)
        return written


ADVICE = "Move or rename it, or choose another --output_dir."


def foreign_message(folder: Path, names: list[str]) -> str:
    """The message about files that are not the program's own."""
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    them = "it" if len(names) == 1 else "them"
    return (
        f"{folder}: {shown} would be replaced, and this program did not write {them}, or not with this "
        f"content. Move or rename {them}, or choose another --output_dir."
    )


def check_place(folder: str | Path, inside: Mapping[str, str | Path | None], at: Mapping[str, str]) -> None:
    """Raise `UserError` if an output folder is the repository, lies in a folder `inside`, or is one of `at`.

    Both map an option to the folder of an input.
    """
    place = Path(os.path.realpath(folder))
    if place == REPOSITORY:
        raise UserError(f"--output_dir {folder} is the folder of this program; name another one.")
    for option, path in {**inside, **at}.items():
        if path is None or not Path(path).is_dir():
            continue
        read = Path(os.path.realpath(path))
        if place == read or (option in inside and read in place.parents):
            raise UserError(f"--output_dir {folder} is in the folder of {option}, {path}; name another one.")


# ------------------------------------------------------------------------------------------------- one writer


@dataclass
class Lock:
    """A lock that this process holds."""

    file: IO[str]
    is_new: bool  # whether the folder was created for it


_locks: dict[str, Lock] = {}  # by folder


def take(folder: str | Path, known: Known | None = None) -> OutputFolder:
    """Create an output folder, lock it until `locks_released`, and adopt the files in it.

    Raises `UserError` if it cannot be written or another process has locked it.
    """
    try:
        _lock(Path(folder))
        output = OutputFolder(folder, known)
        output.adopt()
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error}.") from error
    return output


def _lock(folder: Path) -> None:
    """Lock a folder for this process; the kernel unlocks it when the process ends."""
    place, path, is_new = os.path.realpath(folder), folder / PRIVATE / "lock", not folder.exists()
    deadline = time.monotonic() + ENDING_LIMIT
    while place not in _locks:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")  # noqa: SIM115 (stays open as long as the lock)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = _read_holder(file)
            file.close()
            if not holder.get("is_ending") or time.monotonic() > deadline:
                raise UserError(
                    f"{folder} is in use by process {holder.get('pid')} on {holder.get('host')}, since "
                    f"{holder.get('since')}. Wait for its end, stop it, or choose another --output_dir."
                ) from error
            time.sleep(0.5)
            continue
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            print(
                f"warning: the disk of {folder} has no locks ({error.strerror}): start only one run there.",
                file=sys.stderr,
            )
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            _locks[place] = Lock(file, is_new)
            _write_holder(file)
        else:  # the process that held it has just ended and deleted it
            file.close()


def mark_ending() -> None:
    """Tell processes that want this one's locks to wait for its end instead of giving up."""
    for lock in _locks.values():
        _write_holder(lock.file, is_ending=True)


def _write_holder(file: IO[str], is_ending: bool = False) -> None:
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": now, "is_ending": is_ending}
    file.truncate(0)
    file.write(json.dumps(holder) + "\n")
    file.flush()


def _read_holder(file: IO[str]) -> dict:
    try:
        file.seek(0)
        holder = json.load(file)
    except ValueError:  # not written yet
        holder = {}
    return holder if isinstance(holder, dict) else {}


def check_new_folder(folder: Path) -> Path:
    """Raise `UserError` unless `folder` can be created; return the folder in which `new_folder` fills it."""
    if os.path.lexists(folder):
        raise UserError(f"--output_dir {folder} exists; name a new folder.")
    check_output_folder(folder)
    partial = folder.with_name(f"{folder.name}.partial")
    if os.path.lexists(partial) and not (partial / PRIVATE).is_dir():
        raise UserError(f"{partial} is in the way, and this program did not write it. {ADVICE}")
    return partial


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which is renamed to `folder` at the end of the block and deleted after an error.

    Raises `UserError` if it cannot be written or another process fills it.
    """
    partial = check_new_folder(folder)
    try:
        private = take(partial).private
        for path in set(partial.iterdir()) - {private}:  # of a process that was killed
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield partial
        shutil.rmtree(private)
        partial.rename(folder)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error}.") from error
    finally:
        if lock := _locks.pop(os.path.realpath(partial), None):
            shutil.rmtree(partial, ignore_errors=True)  # after an error
            lock.file.close()


@contextmanager
def locks_released() -> Iterator[None]:
    """Release this process's locks when the block is left, and delete folders in which nothing was written.

    Decorates the `main` of a script.
    """
    try:
        yield
    finally:
        while _locks:
            folder, lock = _locks.popitem()
            private = Path(folder, PRIVATE)
            with suppress(OSError):
                if os.listdir(private) == ["lock"]:
                    shutil.rmtree(private)
                    if lock.is_new:
                        os.rmdir(folder)  # fails if it holds anything else
            lock.file.close()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
