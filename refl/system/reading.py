"""Read files of other people: one function for each kind of content.

Every reader first checks that the file is a regular one, after following links, and of a plausible size: a
FIFO would block, and a device never ends. Then it checks the structure, and by a schema the types. Whatever
is wrong ends in one `UserError` with the file, the place in it, and what to do.
"""

import errno
import json
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from refl.system.errors import UserError

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

MAX_TEXT, MAX_JSON = 2**30, 2**28  # bytes; the largest lists of prompts have half a GiB
# Types of entries of JSON objects, besides Python's own.
Count = Annotated[int, Field(ge=1, lt=2**31)]
Natural = Annotated[int, Field(ge=0, lt=2**31)]
Positive = Annotated[float, Field(gt=0)]
STRICT = ConfigDict(strict=True, allow_inf_nan=False)
KINDS = {
    stat.S_ISDIR: "folder",
    stat.S_ISFIFO: "pipe",
    stat.S_ISCHR: "device",
    stat.S_ISBLK: "device",
    stat.S_ISSOCK: "socket",
}


def exists(path: str | Path) -> bool:
    """Whether there is anything at `path`, links followed. Raises `UserError` if that cannot be told, such as
    below a folder without permission."""
    return _status(path) is not None


def is_folder(path: str | Path) -> bool:
    """Whether there is a folder at `path`, links followed. Raises `UserError` as `exists` does."""
    status = _status(path)
    return status is not None and stat.S_ISDIR(status.st_mode)


def check_file(path: str | Path, max_size: int | None = None) -> Path:
    """Return the path of a regular file of at most `max_size` bytes that may be read; raises `UserError`."""
    try:
        status = os.stat(path)
        if stat.S_ISREG(status.st_mode):
            with open(path, "rb"):
                pass
    except (OSError, ValueError) as error:  # ValueError: a null character
        raise _unreadable(path, error) from error
    if not stat.S_ISREG(status.st_mode):
        kind = next(text for is_kind, text in KINDS.items() if is_kind(status.st_mode))
        raise UserError(f"{path} cannot be read: it is a {kind}, not a file.")
    if max_size is not None and status.st_size > max_size:
        raise UserError(
            f"{path} cannot be read: it has {status.st_size / 1e6:,.0f} MB, more than {max_size / 1e6:,.0f}."
        )
    return Path(path)


def check_folder(folder: str | Path) -> None:
    """Check that every file in a folder is one that may be read, for libraries that read what they find.
    Raises `UserError`."""
    try:
        files = sorted(Path(folder).iterdir())
    except OSError as error:
        raise _unreadable(folder, error) from error
    for file in files:
        if exists(file) and not is_folder(file):
            check_file(file)


def read_bytes(path: str | Path, max_size: int | None = None) -> bytes:
    """Read a file; raises `UserError`."""
    check_file(path, max_size)
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def read_text(path: str | Path, max_size: int = MAX_TEXT) -> str:
    """Read a text file in UTF-8; raises `UserError` with the line of what is not text."""
    content = read_bytes(path, max_size)
    try:
        text = content.decode("utf-8-sig")
        wrong = text.find("\0")
        line = None if wrong < 0 else text[:wrong].count("\n") + 1
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
    if line is not None:
        raise UserError(f"{path}, line {line}: not UTF-8 text. Save the file as UTF-8.")
    return text


def parse_json(text: str, place: object, first_line: int = 1) -> Any:
    """Parse JSON; raises `UserError` with the line, counted from `first_line`.

    Halves of surrogate pairs, which JSON can spell but no encoding can write, are errors as well.
    """
    try:
        value = json.loads(text)
        if re.search(r"\\ud[89a-f]", text, re.IGNORECASE):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError as error:
        line, reason = 0, f"half of a surrogate pair, {error.object[error.start]!a}"
    except RecursionError:
        line, reason = 0, "nested too deeply"
    except ValueError as error:
        line, reason = getattr(error, "lineno", 1) - 1, getattr(error, "msg", str(error).partition(";")[0])
    raise UserError(f"{place}, line {first_line + line}: not valid JSON ({reason}).")


def read_json(path: str | Path) -> Any:
    """Read a JSON file; raises `UserError`."""
    return parse_json(read_text(path, MAX_JSON), path)


def read_object(path: str | Path, types: Mapping[str, Any]) -> dict[str, Any]:
    """Read a JSON object and check its entries; raises `UserError`."""
    return check_types(read_json(path), types, path)


def check_types(
    value: Any, types: Mapping[str, Any], place: object, advice: str = "Copy it again from its source."
) -> dict[str, Any]:
    """Check that a value is an object whose entries have these types, such as `Count`; others may have any.

    Returns the value. No type is converted, and numbers are finite. Raises `UserError` that names the entry.
    """
    if not isinstance(value, dict):
        raise UserError(f"{place} cannot be read: it is not a JSON object. {advice}")
    for name in types.keys() & value.keys():
        try:
            TypeAdapter(types[name], config=STRICT).validate_python(value[name])
        except ValidationError as error:
            reason = error.errors(include_url=False)[0]["msg"].replace("Input ", "").lower()
            raise UserError(
                f"{place} cannot be read: {name} {reason}, and is {value[name]!r:.60}. {advice}"
            ) from error
    return value


def _status(path: str | Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None) == errno.ELOOP:
            return None
        raise _unreadable(path, error) from error


def _unreadable(path: str | Path, error: Exception) -> UserError:
    """The error for a file that the system does not open."""
    reason = getattr(error, "strerror", None) or str(error)
    return UserError(f"{str(path):.300} cannot be read: {reason[:1].lower()}{reason[1:]}.")
