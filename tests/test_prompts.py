"""Prompt files of every kind, and who gets which prompt."""

import json

from refl.system.errors import UserError
from refl.system.prompts import prompt_index, read_prompts

import pytest

WANTED = ["a red cat", "café, 猫", "three, or four"]
FILES = {
    "plain.txt": "a red cat\n\n  café, 猫  \r\nthree, or four",
    "bom.txt": "\ufeffa red cat\ncafé, 猫\nthree, or four\n",
    "strings.json": json.dumps(WANTED),
    "published.json": json.dumps(
        [{"text": text, "classification": "Arts", "image": ["x"]} for text in WANTED]
    ),
    "keys.json": json.dumps([{"text": WANTED[0]}, {"prompt": WANTED[1]}, {"caption": WANTED[2]}]),
    "lines.jsonl": "\n".join(json.dumps({"caption": text}) for text in WANTED) + "\n\n",
    "named.csv": 'id,Prompt\n1,a red cat\n2,"café, 猫"\n3,"three, or four"\n',
    "breaks.csv": 'text\n"a red\ncat"\n"café, 猫"\n"three, or four"\n',
    "single.csv": 'a red cat\n"café, 猫"\n"three, or four"\n',
    "capital.json": json.dumps([{"ID": 1, "Prompt": text} for text in WANTED]),
    "drawbench.csv": 'Prompts,Category\na red cat,Colors\n"café, 猫",Text\n"three, or four",Counting\n',
    "semicolons.csv": "n;text\n1;a red cat\n2;café, 猫\n3;three, or four\n",
    "tabs.csv": "n\ttext\n1\ta red cat\n2\tcafé, 猫\n3\tthree, or four\n",
    "parti.tsv": 'Prompt\tNote\na red cat\t\ncafé, 猫\t"A" b\nthree, or four\t\n',
    "quoted.tsv": 'text\tn\n"a red\tcat"\t1\n"café, 猫"\t2\n"three, or four"\t3\n',
}
MISTAKES = {
    "blank.txt": (b"\n  \n\n", "no prompt"),
    "latin.txt": ("a\ncaf\u00e9\n".encode("latin-1"), "line 2: not UTF-8"),
    "utf16.txt": ("a red fox".encode("utf-16"), "not UTF-8"),
    "image.png": (b"\x89PNG", "prompts are read from .txt"),
    "prompts": (b"a\n", "prompts are read from .txt"),
    "cut.json": (b'["a red fox", "a bl', "cut.json, line 1: not valid JSON"),
    "bad.json": (b'["a",\n"b"\n"c"]', "line 3: not valid JSON"),
    "huge_number.json": (b"[" + b"9" * 5000 + b"]", "huge_number.json, line 1: not valid JSON"),
    "deep.json": (b"[" * 100_000, "line 1|not valid JSON"),
    "object.json": (b'{"text": "a"}', "object.json: expected a list"),
    "surrogate.json": (rb'["a\ud800"]', r"line 1: not valid JSON \(half of a surrogate pair"),
    "surrogate.jsonl": (b'"a"\n' + rb'{"text": "\udfff"}', "line 2: not valid JSON"),
    "deep.jsonl": (b'"a"\n' + b"[" * 100_000, "line 2: not valid JSON .nested too deeply"),
    "nul.txt": (b"a red cat\nb\x00", "line 2: not UTF-8"),
    "utf16_without_bom.txt": ("a red fox".encode("utf-16-le"), "line 1: not UTF-8"),
    "long.txt": (b"a red cat\n" + b"b " * 6_000, "11,999 characters, and at most 10,000"),
    "keys.json": (b'["a", {"title": "b"}]', "entry 2: none of the keys"),
    "number.json": (b'["a", 3]', "entry 2: expected text, found int"),
    "null.jsonl": (b'"a"\n{"text": null}\n', "line 2: none|line 2: expected text"),
    "bad.jsonl": (b'"a"\n{"text": "b"\n', "line 2: not valid JSON"),
    "columns.csv": (b"id,name\n1,a\n", "line 1: no column is named"),
    "short.csv": (b"id,text\n1,a\n2\n", "line 3: only 1 columns"),
    "quote.csv": (b'text\n"never closed', "line 2: not valid CSV"),
    "quotes.csv": (b'text\n"a" cat\nb\n', "line 2: not valid CSV"),
    "comma.csv": (b"text\na cat, sitting\n", "line 2: 2 columns instead of 1. Quote"),
    "semicolon.csv": (b"a red cat;1\na dog;2\n", "line 1: no column is named .* found a red cat, 1"),
    "columns.tsv": (b"text\tn\na\t1\t2\n", "line 2: 3 columns instead of 2"),
    "nul.csv": (b"text\na\x00b\n\x00", "line 2: not UTF-8"),
    "page.parquet": (b"<html>", "not a parquet file|pip install pyarrow"),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file(tmp_path, name):
    (tmp_path / name).write_text(FILES[name], encoding="utf-8", newline="")
    assert read_prompts(tmp_path / name) == WANTED


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named_with_their_place(tmp_path, name):
    content, message = MISTAKES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_prompts(tmp_path / name)
    assert name in str(error.value)


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for columns, message in (
        ({"id": [1, 2, 3], "Prompt": WANTED}, None),
        ({"anything": WANTED}, None),
        ({"id": [1], "name": ["a"]}, "no column is named .* found id, name"),
        ({"text": [1, 2]}, "row 1: expected text, found int"),
        ({"text": ["a", None]}, "row 2: expected text, found NoneType"),
    ):
        parquet.write_table(pyarrow.table(columns), tmp_path / "prompts.parquet")
        if message is None:
            assert read_prompts(tmp_path / "prompts.parquet") == WANTED
            continue
        with pytest.raises(UserError, match=message):
            read_prompts(tmp_path / "prompts.parquet")


def test_files_that_cannot_be_read(tmp_path):
    for path in (tmp_path / "none.txt", tmp_path / "folder.txt"):
        if path.name == "folder.txt":
            path.mkdir()
        with pytest.raises(UserError, match="cannot be read"):
            read_prompts(path)


def test_every_pass_is_a_new_permutation_of_all_prompts():
    passes = [[prompt_index(3, 10 * epoch + offset, 10) for offset in range(10)] for epoch in range(4)]
    assert all(sorted(order) == list(range(10)) for order in passes)
    assert len({tuple(order) for order in passes}) == 4
    assert passes[0] != [prompt_index(4, offset, 10) for offset in range(10)]


def test_our_own_prompts_are_apart():
    train, held_out = read_prompts("data/train_prompts.txt"), read_prompts("data/held_out_prompts.txt")
    assert len(set(train)) == len(train) >= 500 and len(set(held_out)) == len(held_out) >= 100
    assert not {prompt.lower() for prompt in train} & {prompt.lower() for prompt in held_out}
