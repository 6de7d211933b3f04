"""Read prompts from common file formats, and assign them to samples."""

import csv
import io
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from refl.system import randomness
from refl.system.errors import UserError

TEXT_KEYS = ("text", "prompt", "caption")


def read_prompts(path: str | Path) -> list[str]:
    """The prompts in a file, in order, without blank ones.

    .txt: one per line. .json: a list of strings, or of objects with one of `TEXT_KEYS`. .jsonl: one such
    value per line. .csv: the column named by one of `TEXT_KEYS`, or the only column. Raises `UserError` with
    the place of the error.
    """
    path = Path(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(
            f"{path}: prompts are read from {', '.join(READERS)} files, not from {path.suffix or 'this'}."
        )
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: the prompts file cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: not UTF-8 text. Save the file as UTF-8.") from error
    prompts = [" ".join(prompt.split()) for prompt in reader(path, content)]
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise UserError(f"{path}: no prompt in this file.")
    return prompts


def _read_txt(path: Path, content: str) -> list[str]:
    return content.split("\n")  # str.splitlines also splits at rarer characters


def _read_json(path: Path, content: str) -> list[str]:
    try:
        entries = json.loads(content)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise UserError(f"{path}, line {line}: not valid JSON ({getattr(error, 'msg', error)}).") from error
    if not isinstance(entries, list):
        raise UserError(f"{path}: expected a list of prompts, found {type(entries).__name__}.")
    return [_text(entry, f"{path}, entry {number}") for number, entry in enumerate(entries, 1)]


def _read_jsonl(path: Path, content: str) -> list[str]:
    return [_text(entry, place) for place, entry in json_lines(path, content)]


def json_lines(path: Path, content: str) -> Iterator[tuple[str, object]]:
    """Yield the place, for messages, and the JSON value of each line that is not blank; raises
    `UserError`."""
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", error)
            raise UserError(f"{path}, line {number}: not valid JSON ({reason}).") from error
        yield f"{path}, line {number}", entry


def _read_csv(path: Path, content: str) -> list[str]:
    reader = csv.reader(io.StringIO(content, newline=""))
    try:
        first = next(reader, [])
        header = [name.strip().lower() for name in first]
        columns = [header.index(key) for key in TEXT_KEYS if key in header]
        if not columns and len(header) > 1:
            raise UserError(
                f"{path}, line 1: no column is named {', '.join(TEXT_KEYS)}; found {', '.join(header)}."
            )
        column = columns[0] if columns else 0
        prompts = [] if columns else first
        for row in reader:
            if row and len(row) <= column:
                raise UserError(f"{path}, line {reader.line_num}: only {len(row)} columns.")
            prompts += [row[column]] if row else []
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not valid CSV ({error}).") from error
    return prompts


READERS = {".txt": _read_txt, ".json": _read_json, ".jsonl": _read_jsonl, ".csv": _read_csv}


def _text(entry: object, place: str) -> str:
    if isinstance(entry, dict):
        entry = next((entry[key] for key in TEXT_KEYS if key in entry), None)
        if entry is None:
            raise UserError(f"{place}: none of the keys {', '.join(TEXT_KEYS)}.")
    if not isinstance(entry, str):
        raise UserError(f"{place}: expected text, found {type(entry).__name__}.")
    return entry


def prompt_index(seed: int, position: int, num_prompts: int) -> int:
    """Index of the prompt for the sample at `position`, counted over the whole run and all processes.

    Every pass over the prompts is a new permutation of them.
    """
    epoch, offset = divmod(position, num_prompts)
    return int(_permutation(seed, epoch, num_prompts)[offset])


_permutation = lru_cache(maxsize=4)(randomness.permutation)
