"""Files of other people: every reader refuses what is not a file, and says what is wrong and where."""

import math
import os
import socket

from refl.model.lora import lora_file
from refl.report.card import _read_events
from refl.system import checkpoints
from refl.system.errors import UserError
from refl.system.images import read_image
from refl.system.options import MAX_FLOAT, MAX_INT, check_number
from refl.system.prompts import read_prompts
from refl.system.reading import (
    Count,
    Natural,
    Positive,
    check_folder,
    check_types,
    exists,
    parse_json,
    read_bytes,
    read_json,
    read_text,
)
from refl.system.text import printable
from refl.system.weights import open_safetensors, read_weights
from refl.train.captioned import read_captioned

import pytest


def open_header(path):
    with open_safetensors(path):
        pass


READERS = {
    "anything": read_bytes,
    "a.txt": read_text,
    "a.json": read_json,
    "prompts.txt": read_prompts,
    "prompts.json": read_prompts,
    "prompts.jsonl": read_prompts,
    "prompts.csv": read_prompts,
    "prompts.tsv": read_prompts,
    "prompts.parquet": read_prompts,
    "lora.safetensors": lora_file,
    "model.safetensors": open_header,
    "reward.safetensors": read_weights,
    "reward.pt": read_weights,
    "picture.png": read_image,
    "metadata.jsonl": lambda path: read_captioned(path.parent),
    "1.png": lambda path: read_captioned(path.parent),
    "checksums.json": lambda path: checkpoints.read(path.parent),
    "config.json": lambda path: check_folder(path.parent),
}


IN_FOLDERS = ("checksums.json", "config.json", "1.png", "metadata.jsonl")  # found there by a reader itself


def bind(path):
    with socket.socket(socket.AF_UNIX) as new:
        new.bind(path.name)  # in the current folder: the whole path may be too long


KINDS = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "socket": bind,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", READERS)
def test_what_is_not_a_file(tmp_path, monkeypatch, name, kind):
    """A pipe would block for ever, and a device never ends."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / "1.txt").write_text("the caption of 1.png")
    KINDS[kind](tmp_path / name)
    with pytest.raises(UserError, match=f"{name} cannot be read: it is a {kind}, not a file"):
        READERS[name](tmp_path / name)


@pytest.mark.parametrize("name", [name for name in READERS if name not in IN_FOLDERS])
def test_places_that_are_no_path(tmp_path, name):
    for folder in ("a" * 300, ("a" * 200 + "/") * 30, "\0"):
        with pytest.raises(UserError, match="cannot be read: (file name too long|embedded null)"):
            READERS[name](tmp_path / folder / name)
    (tmp_path / name).symlink_to(name)
    with pytest.raises(UserError, match="cannot be read|no LoRA"):
        READERS[name](tmp_path / name)


@pytest.fixture
def forbidden(tmp_path):
    """A folder without permission; root, who may read everything, becomes nobody."""
    tmp_path.chmod(0)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    yield tmp_path
    if is_root:
        os.seteuid(0)
    tmp_path.chmod(0o700)


@pytest.mark.parametrize("name", READERS)
def test_files_without_permission(forbidden, name):
    with pytest.raises(UserError, match="cannot be read: permission denied"):
        READERS[name](forbidden / name)
    with pytest.raises(UserError, match="cannot be read: permission denied"):
        exists(forbidden / name)


def test_whether_there_is_anything(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "gone").symlink_to(tmp_path / "nothing")
    assert all(exists(tmp_path / name) for name in (".", "file"))
    assert not any(exists(tmp_path / name) for name in ("file/below", "loop", "gone", "nothing"))


def test_files_that_are_too_large(tmp_path):
    with open(tmp_path / "prompts.txt", "wb") as file:
        file.truncate(2**40)  # takes no room on the disk
    with pytest.raises(UserError, match="prompts.txt cannot be read: it has 1,099,512 MB, more than 1,074"):
        read_prompts(tmp_path / "prompts.txt")


def test_a_log_that_is_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "events.out.tfevents.1")
    assert _read_events(tmp_path) == ({}, [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1,\n2", "FILE, line 2: not valid JSON"),
        ("[" * 100_000, "FILE, line 1: not valid JSON (nested too deeply)"),
        ('{"a": ' * 100_000, "FILE, line 1: not valid JSON (nested too deeply)"),
        ("9" * 5000, "FILE, line 1: not valid JSON (Exceeds the limit"),
        (
            r'["\ud83d\ude00", "a\ud83d"]',
            r"FILE, line 1: not valid JSON (half of a surrogate pair, '\ud83d')",
        ),
        (r'{"\uDE00": 1}', "half of a surrogate pair"),
    ],
)
def test_json_that_is_not_valid(text, message):
    with pytest.raises(UserError) as error:
        parse_json(text, "FILE")
    assert message in str(error.value)


def test_valid_json():
    text = r'["\ud83d\ude00", "\\ud83d", 1e400]'
    assert parse_json(text, "FILE") == ["😀", r"\ud83d", math.inf]


TYPES = {
    "count": Count,
    "natural": Natural,
    "rate": Positive,
    "name": str,
    "flag": bool,
    "sizes": list[Count] | None,
}


@pytest.mark.parametrize(
    "entry",
    [
        {"count": 0}, {"count": True}, {"count": "3"}, {"count": 3.0}, {"count": None}, {"count": 10**30},
        {"natural": -1}, {"rate": 0}, {"rate": "1"}, {"rate": math.nan}, {"rate": math.inf}, {"rate": True},
        {"name": 1}, {"name": None}, {"flag": 1}, {"flag": "yes"}, {"sizes": 4}, {"sizes": [4, "4"]},
    ],
)  # fmt: skip
def test_types_of_entries(entry):
    [name] = entry
    with pytest.raises(
        UserError, match=f"FILE cannot be read: {name} .*should be .*, and is .*Copy it again"
    ):
        check_types(entry, TYPES, "FILE")


def test_right_types():
    right = {
        "count": 1,
        "natural": 0,
        "rate": 1,
        "name": "",
        "flag": False,
        "sizes": [1, 2],
        "other": {"a": None},
    }
    assert check_types(right, TYPES, "FILE") is right
    assert check_types({"sizes": None}, TYPES, "FILE") == {"sizes": None}
    for value in ([1], "a", None, 3):
        with pytest.raises(UserError, match="FILE cannot be read: it is not a JSON object"):
            check_types(value, TYPES, "FILE")


def test_numbers_of_options():
    for name, value in (
        ("guidance_scale", math.nan), ("guidance_scale", -math.inf), ("lora_scale", 1e300),
        ("lora_alpha", 1e308), ("seed", 2**64), ("resolution", 64_000_000), ("rank", 10**12),
        ("train_batch_size", 10**8), ("max_grad_norm", math.nan),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"--{name} .*: must be a finite number, at most "):
            check_number(name, value)
    for name, value in (
        ("seed", 2**64 - 1), ("max_grad_norm", math.inf), ("guidance_scale", -MAX_FLOAT),
        ("lora_alpha", None), ("steps", MAX_INT), ("prompt", ("nan",)), ("reward", "1e400"),
        ("early_stop", True),
    ):  # fmt: skip
        check_number(name, value)


def test_terminals_are_not_controlled():
    hostile = "a\x1b]0;title\x07\x1b[2K\r\x9b1m\u202eb\ud800\u2028"
    shown = r"a\x1b]0;title\x07\x1b[2K\r\x9b1m\u202eb\ud800\u2028"
    assert printable(hostile) == shown and printable(shown) == shown
    assert printable("café 猫 😀\n\tb") == "café 猫 😀\n\tb"
