"""The verdict of tests/parity: it passes what agrees and fails what does not."""

import json

import numpy as np
import pytest
from parity import parity


@pytest.fixture
def results(tmp_path):
    """Answers and costs of two sides that agree; a function that writes them, `ours` changed."""
    random = np.random.default_rng(0)
    num = len(parity.reference_images())
    answers = {f"pixels/{kind}": random.random((3, 4, 4)) for kind in parity.ALL_IMAGES}
    for label in parity.PROMPTS:
        answers[f"score/{label}"] = answers[f"rank_score/{label}"] = random.normal(size=num)
        answers[f"rank/{label}"] = random.permutation(num) + 1
    for kind in parity.reference_images():
        answers[f"training_score/{kind}"] = random.normal(size=len(parity.PROMPTS))
        answers[f"gradient/{kind}"] = random.normal(size=(len(parity.PROMPTS), 3, 4, 4))
    for precision in ("full", "half"):
        answers[f"{precision}/score"], answers[f"{precision}/gradient"] = np.ones(2), np.ones((2, 3, 4, 4))
    costs = {"device": "CPU", **dict.fromkeys(parity.COSTS, 1)}
    (tmp_path / "costs.jsonl").write_text(
        "".join(json.dumps(costs | {"side": side}) + "\n" for side in parity.SIDES)
    )

    def write(key=None, change=None):
        np.savez(tmp_path / "original.npz", **answers)
        np.savez(tmp_path / "ours.npz", **answers | ({key: change(answers[key].copy())} if key else {}))
        return tmp_path

    return write


def test_what_agrees_passes(results, capsys):
    assert parity.compare(results()) == 0
    assert parity.compare(results("score/short", lambda scores: scores + 9e-6)) == 0
    assert "parity: passed" in capsys.readouterr().out


@pytest.mark.parametrize(
    "key, change",
    [
        ("score/empty", lambda x: x + 2e-5 * (np.arange(len(x)) == 3)),
        ("score/short", lambda x: x * np.nan),
        ("rank_score/long", lambda x: x - 2e-5),
        ("training_score/RGBA", lambda x: x + 2e-5),
        ("rank/punctuation", lambda x: x[::-1]),
        ("gradient/wide", lambda x: x * (1 + 2e-4)),
        ("gradient/thin lines", lambda x: x * 0),
        ("pixels/CMYK", lambda x: x + 1e-6),
    ],
)
def test_what_differs_fails(results, capsys, key, change):
    assert parity.compare(results(key, change)) == 1
    out = capsys.readouterr().out
    assert out.count("DIFFERS") == 1 and "parity: FAILED" in out
