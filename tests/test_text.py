"""Text of other people in tables, plots and the card: it is shown, and nothing executes or formats it."""

import csv
import io
import json
import re

from refl.model.lora import METADATA_KEY
from refl.report import card
from refl.report.labels import label
from refl.report.page import plot
from refl.report.results import cell

import pytest
import torch
from safetensors.torch import save_file


@pytest.mark.parametrize("text", ['=HYPERLINK("http://a")', "+1", "-1", "@SUM(1)", "\t=1", " =1", "\r\n=1"])
def test_cells_that_spreadsheets_would_execute(text):
    assert cell(text) == f"'{text}"


def test_other_cells_stay():
    for value in ("a cat", "a = b", "", -0.5, 3, None):
        assert cell(value) == value
    content = io.StringIO()
    csv.writer(content).writerow(map(cell, ["=1", -1.5]))
    assert content.getvalue() == "'=1,-1.5\r\n"


@pytest.mark.parametrize(
    "name", [r"$\frac{$", "$a$", "_hidden", "a\x1b[2J\nb", "<script>", "l" * 500, r"\1 \g<0>"]
)
def test_labels_are_no_mathematics(name):
    def draw(axis):
        axis.plot([0, 1], [0, 1], label=label(name))
        axis.legend()

    svg = plot(draw, name)
    assert "<script>" not in svg and "\x1b" not in svg
    assert str(label(name)).strip().replace("<", "&lt;").replace(">", "&gt;")[:20] in svg


@pytest.mark.parametrize(
    "state",
    [
        {"progress": {"step": "<script>", "guard": {"best": {"step": "<script>"}, "reason": "<script>"}}},
        {
            "versions": {"<script>": "<script>"},
            "fingerprint": {"global_batch_size": "<script>", "prompts": "`"},
        },
        {"versions": ["<script>"], "fingerprint": "<script>", "progress": "<script>"},
        {"versions": {"a": ["|\n# x"]}, "progress": {"guard": "<script>"}},
    ],
)
def test_a_state_in_a_card(tmp_path, monkeypatch, state):
    """Of a folder that is not a training's: whatever it holds is text."""
    monkeypatch.setattr(card, "_read_events", lambda folder: ({"loss": []}, []))
    about = {METADATA_KEY: json.dumps({"reward": "<script>|`", "base_model": "<script>", "<script>": 1})}
    save_file({"a": torch.zeros(2, 2)}, tmp_path / "pytorch_lora_weights.safetensors", about)
    (tmp_path / "options.json").write_text(json.dumps({"prompts": "<script>", "<script>": ["<script>"]}))
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "state.json").write_text(json.dumps(state))
    (tmp_path / "checkpoint-1" / "checksums.json").write_text("{}")
    card.write(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "<script>" in text and "<script>" not in re.sub(r"`[^`\n]*`", "", text)
    assert "\n# x" not in text
