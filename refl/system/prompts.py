"""Read prompts from common file formats, and assign them to samples."""

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path

from refl.system import randomness
from refl.system.errors import UserError
from refl.system.reading import check_file, parse_json, read_text

TEXT_KEYS = ("text", "prompt", "caption", "prompts")  # in small or capital letters
MAX_LENGTH = 10_000  # characters of a prompt, of which a text encoder reads a few hundred
MAX_TABLE = 2**32  # bytes of a parquet file, of which one column is read


def read_prompts(path: str | Path) -> list[str]:
    """The prompts in a file, in order, without blank ones.

    .txt: one per line. .json: a list of strings, or of objects with one of `TEXT_KEYS`. .jsonl: one such
    value per line. .csv, .tsv, .parquet: the column named by one of `TEXT_KEYS`, or the only column. Raises
    `UserError` with the place of the error.
    """
    path = Path(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(
            f"{path}: prompts are read from {', '.join(READERS)} files, not from {path.suffix or 'this'}."
        )
    prompts = [" ".join(prompt.split()) for prompt in reader(path)]
    prompts = [check_prompt(prompt, f"{path}: {prompt[:30]}...") for prompt in prompts if prompt]
    if not prompts:
        raise UserError(f"{path}: no prompt in this file.")
    return prompts


def check_prompt(prompt: str, place: str) -> str:
    """Return a prompt that can be encoded; raises `UserError`."""
    if len(prompt) > MAX_LENGTH:
        raise UserError(
            f"{place}: this prompt has {len(prompt):,} characters, and at most {MAX_LENGTH:,} are expected."
        )
    if not prompt.isascii() and any("\ud800" <= character <= "\udfff" for character in prompt):
        raise UserError(f"{place}: this prompt is not text in UTF-8.")
    return prompt


def _read_txt(path: Path) -> list[str]:
    return read_text(path).split("\n")  # str.splitlines also splits at rarer characters


def _read_json(path: Path) -> list[str]:
    entries = parse_json(read_text(path), path)
    if not isinstance(entries, list):
        raise UserError(f"{path}: expected a list of prompts, found {type(entries).__name__}.")
    return [_text(entry, f"{path}, entry {number}") for number, entry in enumerate(entries, 1)]


def _read_jsonl(path: Path) -> list[str]:
    return [_text(entry, place) for place, entry in json_lines(path)]


def json_lines(path: Path) -> Iterator[tuple[str, object]]:
    """Yield the place, for messages, and the JSON value of each line that is not blank; raises
    `UserError`."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield f"{path}, line {number}", parse_json(line, path, first_line=number)


def _read_csv(path: Path, delimiters: str = ",;\t") -> list[str]:
    """The column of prompts; the delimiter is the one that shows the column's name in the first line."""
    content = read_text(path)
    headers = {delimiter: _header(content, delimiter) for delimiter in delimiters}
    named = [delimiter for delimiter, header in headers.items() if _column(header) is not None]
    widest = max(headers, key=lambda delimiter: len(headers[delimiter]))
    if not named and len(headers[widest]) > 1:
        raise UserError(
            f"{path}, line 1: no column is named {', '.join(TEXT_KEYS)}; found "
            f"{', '.join(headers[widest])}. Name the column, or save the prompts alone as .txt."
        )
    delimiter = max(named or delimiters[0], key=lambda delimiter: len(headers[delimiter]))
    rows = _rows(path, content, delimiter)
    column, width = _column(headers[delimiter]) or 0, len(headers[delimiter])
    for line, row in rows:
        if len(row) <= column:
            raise UserError(f"{path}, line {line}: only {len(row)} columns.")
        if len(row) > width:
            raise UserError(
                f"{path}, line {line}: {len(row)} columns instead of {width}. Quote values that contain "
                f"{delimiter!r}."
            )
    return [row[column] for _, row in (rows[1:] if named else rows)]


def _header(content: str, delimiter: str) -> list[str]:
    """The first row; [] if it cannot be read with this delimiter."""
    try:
        return next(csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True), [])
    except csv.Error:
        return []


def _rows(path: Path, content: str, delimiter: str) -> list[tuple[int, list[str]]]:
    """The rows that are not empty, each with the number of its last line. Raises `UserError`.

    Quotes enclose values, unless the values are separated by tabs and the quotes do not pair: some of these
    files, such as PartiPrompts.tsv, enclose nothing.
    """
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_NONE) if delimiter == "\t" else (csv.QUOTE_MINIMAL,):
        lines = io.StringIO(content, newline="")
        reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)
        try:
            return [(reader.line_num, row) for row in reader if row]
        except csv.Error as error:
            problem = UserError(
                f"{path}, line {reader.line_num}: not valid CSV ({error}). A quoted value ends in a quote; "
                "quotes in it are doubled."
            )
    raise problem


def _column(names: Sequence[str]) -> int | None:
    """Index of the column of prompts by its name."""
    names = [name.strip().lower() for name in names]
    return next((names.index(key) for key in TEXT_KEYS if key in names), None)


def _read_parquet(path: Path) -> list[str]:
    check_file(path, MAX_TABLE)
    if not find_spec("pyarrow"):
        raise UserError(f"{path}: parquet files need the package pyarrow. Run: pip install pyarrow")
    from pyarrow import ArrowException, parquet  # only here: it is not in requirements.txt

    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            column = _column(names)
            if column is None and len(names) > 1:
                raise UserError(
                    f"{path}: no column is named {', '.join(TEXT_KEYS)}; found {', '.join(names)}."
                )
            values = file.read(columns=[names[column or 0]]).column(0).to_pylist()
    except (ArrowException, OSError, LookupError) as error:
        raise UserError(f"{path} is damaged or is not a parquet file ({error}).") from error
    return [_text(value, f"{path}, row {number}") for number, value in enumerate(values, 1)]


READERS: dict[str, Callable[[Path], list[str]]] = {
    ".txt": _read_txt,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": partial(_read_csv, delimiters="\t"),
    ".parquet": _read_parquet,
}


def _text(entry: object, place: str) -> str:
    if isinstance(entry, dict):
        names = {name.lower(): name for name in reversed(entry)}
        entry = next((entry[names[key]] for key in TEXT_KEYS if key in names), None)
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
