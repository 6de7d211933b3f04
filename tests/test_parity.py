"""The verdict of tests/parity: it passes what agrees and fails what does not."""

import json

import numpy as np
import pytest
from parity import clips, parity


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


@pytest.fixture
def clip_results(tmp_path):
    """Answers of HPSv2 on two sides that agree; a function that writes them, `ours` changed."""
    random = np.random.default_rng(0)
    answers = {f"pixels/{kind}": random.random((1, 3, 4, 4)) for kind in clips.all_pictures()}
    answers["score/hpsv2"] = random.normal(size=(len(clips.pictures()), len(clips.PROMPTS)))
    answers["ids"] = np.tile([5, 3, 9, 0, 0], (len(clips.PROMPTS), 1))
    answers["by_package"] = np.ones(1)
    for kind in clips.IMAGES_WITH_GRADIENT:
        answers[f"gradient/hpsv2/{kind}"] = random.normal(size=(1, 3, 4, 4))

    def write(key=None, change=None):
        np.savez(tmp_path / "original.npz", **answers)
        np.savez(tmp_path / "ours.npz", **answers | ({key: change(answers[key].copy())} if key else {}))
        return tmp_path, "hpsv2"

    return write


def test_clips_that_agree_pass(clip_results, capsys):
    assert clips.compare(*clip_results()) == 0
    assert clips.compare(*clip_results("ids", lambda ids: np.where(ids == 0, 9, ids))) == 0  # the padding
    assert "ok" in capsys.readouterr().out


@pytest.mark.parametrize(
    "key, change",
    [
        ("score/hpsv2", lambda x: x + 1e-4 * (np.arange(x.size).reshape(x.shape) == 3)),
        ("score/hpsv2", lambda x: x * np.nan),
        ("score/hpsv2", lambda x: x[::-1]),
        ("gradient/hpsv2/wide", lambda x: x * (1 + 2e-4)),
        ("pixels/tall", lambda x: x + 1e-4),
        ("ids", lambda ids: np.where(ids == 3, 4, ids)),
        ("by_package", lambda x: x * 1.0001),
    ],
)
def test_clips_that_differ_fail(clip_results, capsys, key, change):
    assert clips.compare(*clip_results(key, change)) == 1
    assert "DIFFERS" in capsys.readouterr().out
