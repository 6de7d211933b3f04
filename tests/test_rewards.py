"""Rewards of one's own, and sums: named, proved at the first step, logged each by itself."""

import json
import re
import sys

import inference_lora
import refl_lora
from refl.model.lora import add_lora
from refl.reward import rewards
from refl.reward.contract import RewardSpec
from refl.system.errors import UserError

import pytest
import torch
from conftest import ROOT, save_lora, visible, weight_options
from PIL import Image
from test_scripts import events, run_in_process

CPU = torch.device("cpu")
IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))

OWN = """
import torch

def red(images, prompts): return images[:, 0].mean((1, 2))
def column(images, prompts): return red(images, prompts)[:, None]
def mean(images, prompts): return red(images, prompts).mean()
def number(images, prompts): return 0.5
def nan(images, prompts): return red(images, prompts) * float("nan")
def detached(images, prompts): return red(images.detach(), prompts)
def blind(images, prompts): return torch.ones(len(prompts), requires_grad=True) * 2
def steep(images, prompts): return (images - images).sum((1, 2, 3)).sqrt()
def flat(images, prompts): return images.round().mean((1, 2, 3))
def words(images, prompts): return red(images, prompts) * torch.tensor([float(len(p)) for p in prompts])
value = 3

def inplace(images, prompts): return red(images.sub_(0.5), prompts)

def double(images, prompts): return images.double().mean((1, 2, 3))
def whole(images, prompts): return images.mean((1, 2, 3)).mul(9).int()
def unreal(images, prompts): return torch.complex(red(images, prompts), red(images, prompts))
def raises(images, prompts): raise KeyError("here")
def exits(images, prompts): raise SystemExit(0)
def one(images): return red(images, None)

class Bright:
    def __call__(self, images, prompts): return images.mean((1, 2, 3))

class NeedsMore(Bright):
    def __init__(self, size): pass

class NoCall:
    pass

class OneArgument(torch.nn.Module):
    def forward(self, images): return red(images, None)

class Breaks(Bright):
    def __init__(self): raise RuntimeError("no weights")

class Features(Bright):
    def features(self, images): return images.flatten(1)

class Flat(Bright):
    def features(self, images): return images.mean()

class Layers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.features = torch.nn.Identity()
    def forward(self, images, prompts): return red(images, prompts)

class Table(Bright):
    def score(self, prompt, images, batch_size): return [[1.0]]

class Scorer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 1, 1)
        self.dropout = torch.nn.Dropout(0.5)
    def forward(self, images, prompts): return self.dropout(self.layer(images)).mean((1, 2, 3))
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module `own_rewards` in the current folder."""
    (tmp_path / "own_rewards.py").write_text(OWN)
    (tmp_path / "needs_more.py").write_text("import no_such_library\n")
    (tmp_path / "own_syntax.py").write_text("def red(images, prompts) return images\n")
    (tmp_path / "own_exit.py").write_text("import sys\nsys.exit(0)\n")
    (tmp_path / "own_error.py").write_text("def red(images, prompts): pass\n1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    for module in ("own_rewards", "needs_more", "own_error"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    yield tmp_path
    sys.modules.pop("own_rewards", None)


@pytest.fixture
def trained_lora(parts, tmp_path):
    """A LoRA's file."""
    add_lora(parts.unet, 2, 2, 0)
    return save_lora(parts.unet, tmp_path, {"reward": "imagereward"})


def load(specification, folder="nowhere"):
    return rewards.load(specification, folder, CPU, torch.float32)


def test_weighted_sums(own, reward, tiny):
    both = load("imagereward:0.5, own_rewards:red:-2e0", tiny)
    assert both.weights == {"imagereward": 0.5, "own_rewards.red": -2.0}
    prompts = ["a red cat", "a blue dog"]
    scores = both(IMAGES, prompts)
    assert scores.shape == (2, 2) and scores.dtype == torch.float32
    assert torch.equal(scores[0], reward(IMAGES, prompts)) and torch.equal(
        scores[1], IMAGES[:, 0].mean((1, 2))
    )
    torch.testing.assert_close(both.total(scores), 0.5 * scores[0] - 2 * scores[1])
    assert both.means(scores) == {
        name: pytest.approx(own.mean().item()) for name, own in zip(both.rewards, scores, strict=True)
    }
    assert load("own_rewards:red").weights == {"own_rewards.red": 1.0}


def test_classes_and_modules(own):
    assert torch.equal(load("own_rewards:Bright")(IMAGES, ["a", "b"])[0], IMAGES.mean((1, 2, 3)))
    scorer = load("own_rewards:Scorer")
    module = scorer.rewards["own_rewards.Scorer"]
    assert not module.training and not any(p.requires_grad for p in module.parameters())
    assert torch.equal(scorer(IMAGES, ["a", "b"]), scorer(IMAGES, ["a", "b"]))


@pytest.mark.parametrize(
    "specification, message",
    [
        ("", "nothing is not a reward; name imagereward, pickscore, .* or a function, as module:function"),
        ("imagereward,", "nothing is not a reward"),
        ("hpsv3", "hpsv3 is not a reward"),
        ("hpsv3:0.5", "hpsv3:0.5 is not a reward"),
        ("imagereward:much", "the weight of imagereward is 'much'"),
        ("own_rewards:red:blue", "the weight of own_rewards:red is 'blue'"),
        (":red", ":red is not a reward"),
        ("own_rewards:", "own_rewards: is not a reward"),
        ("imagereward:0", "the weight of imagereward must be a number other than 0"),
        ("imagereward:nan", "the weight of imagereward must be"),
        ("own_rewards:red:inf", "the weight of own_rewards:red must be"),
        ("imagereward,imagereward:2", "imagereward is named twice"),
        (
            "nowhere_to_be_found:red",
            "there is no module nowhere_to_be_found .looked for in .* and among what",
        ),
        ("needs_more:red", "there is no module no_such_library .needs_more imports it"),
        ("own_rewards:green", r"there is no green in .*own_rewards\.py"),
        ("own_rewards:NeedsMore", "the class must take no arguments .missing a required argument: 'size'"),
        ("own_rewards:NoCall", r"the class has no __call__\(images, prompts\)"),
        ("./own_rewards.py:red", r"\./own_rewards.py:red is not a reward; name"),
        ("own_rewards.py:red", "there is no module own_rewards.py"),
        ("..:red", "..:red is not a reward"),
        ("own_rewards:value", "a int is not a function of"),
        (
            "own_rewards:one",
            r"--reward own_rewards:one: it must take \(images, prompts\): too many positional",
        ),
        ("own_rewards:OneArgument", r"it must take \(images, prompts\): too many positional"),
        (
            "own_syntax:red",
            r"(?s)--reward own_syntax:red has an error:\n\n  File .*own_syntax.py.*SyntaxError",
        ),
        ("own_exit:red", r"(?s)own_exit:red calls sys.exit\(0\):\n\nTraceback.*own_exit.py., line 2"),
        (
            "own_error:red",
            r"(?s)own_error:red has an error:\n\nTraceback.*line 2, in <module>\n.*ZeroDivision",
        ),
    ],
)
def test_names_that_are_no_rewards(own, specification, message):
    with pytest.raises(UserError, match=message):
        rewards.parse(specification)


FAULTS = {
    "column": r"returned a tensor \(2, 1\) for 2 images; it must return a tensor \(2,\)",
    "mean": r"returned a tensor \(\) for 2 images",
    "number": "returned a float for 2 images",
    "inplace": "changes the images in place",
    "nan": r"returned \[nan, nan\]; scores must be finite",
    "detached": r"gives no gradient: .* without detach\(\)",
    "blind": "gives no gradient",
    "steep": "has a gradient that is not finite",
    "whole": "gives no gradient",
    "unreal": "returned torch.complex64; scores must be real numbers",
    "raises": r"has an error:\n\nTraceback[^\n]*\n  File [^\n]*own_rewards.py., [^\n]*in raises.*KeyError",
    "exits": r"calls sys.exit\(0\):\n\nTraceback.*, in exits",
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_a_reward_are_named(own, name):
    with pytest.raises(UserError, match=f"(?s)the reward own_rewards.{name} of --reward {FAULTS[name]}"):
        load(f"own_rewards:{name}")(IMAGES.clone().requires_grad_() * 1, ["a", "b"])


def test_other_faults_of_ones_own_code_are_named(own):
    with pytest.raises(UserError, match=r"(?s)--reward own_rewards:Breaks has an error:.*no weights"):
        load("own_rewards:Breaks")
    for name, message in (
        ("Features", r"vectors of length \["),
        ("Flat", r"features\(\) returned torch.Size\(\[\]\)"),
    ):
        with pytest.raises(UserError, match=f"the reward own_rewards.{name} of --reward: .*{message}"):
            load(f"own_rewards:{name}").features(IMAGES)
    assert load("own_rewards:Layers").features(IMAGES) is None
    with pytest.raises(
        UserError, match=r"own_rewards.Table of --reward returned a tensor \(1, 1\) for 1 images"
    ):
        load("own_rewards:Table").score([Image.new("RGB", (8, 8))], "a", CPU)


@pytest.mark.parametrize("name", ["double", "red"])
def test_scores_of_any_precision(own, name):
    images = IMAGES.clone().requires_grad_()
    scores = load(f"own_rewards:{name},own_rewards:Bright:0.5")(images, ["a", "b"])
    assert scores.dtype == torch.float32
    assert torch.autograd.grad(scores.sum(), images)[0].dtype == torch.float32


def test_whole_numbers_are_scores_without_gradient(own):
    with torch.no_grad():
        assert load("own_rewards:whole")(IMAGES, ["a", "b"]).dtype == torch.float32


def test_a_gradient_of_zero_is_said_and_allowed(own, caplog):
    load("own_rewards:flat")(IMAGES.clone().requires_grad_(), ["a", "b"])
    assert "own_rewards.flat of --reward has a gradient of zero" in caplog.text


def test_validation_changes_nothing(own):
    reward = load("own_rewards:words")
    gradients = []
    for _ in range(2):  # validated in the first call only
        images = IMAGES.clone().requires_grad_()
        gradients.append(torch.autograd.grad(reward(images, ["a", "four"]).sum(), images)[0])
    assert reward.validated == {"own_rewards.words"} and torch.equal(*gradients)
    assert gradients[0][1, 0, 0, 0] == pytest.approx(4 / 256)


class CountsChecks(torch.Tensor):
    """Scores that count how often they are checked, each of which makes a GPU's host wait."""

    checks = 0

    def isfinite(self):
        CountsChecks.checks += 1
        return torch.ones(len(self), dtype=torch.bool)


def test_scores_without_gradient_are_checked_once(own, monkeypatch):
    """A reward that is held out never gets a gradient; checking it for ever would cost a sync for each
    image."""
    reward = load("own_rewards:red")
    function = reward.rewards["own_rewards.red"]
    reward.rewards["own_rewards.red"] = lambda *given: function(*given).as_subclass(CountsChecks)
    monkeypatch.setattr(CountsChecks, "checks", 0)
    for _ in range(3):
        reward(IMAGES, ["a", "b"])
    assert CountsChecks.checks == 1 and not reward.validated
    for _ in range(3):  # then trained on
        reward(IMAGES.clone().requires_grad_(), ["a", "b"])
    assert CountsChecks.checks == 1 + 2 and reward.validated == {"own_rewards.red"}  # scores and gradient


@pytest.mark.parametrize("name", ["nan", "detached", "steep"])
def test_a_held_out_check_does_not_replace_that_of_training(own, name):
    reward = load(f"own_rewards:{name}")
    reward.finite.add(f"own_rewards.{name}")  # as after a validation whose scores were finite
    with pytest.raises(UserError, match=f"(?s)the reward own_rewards.{name} of --reward {FAULTS[name]}"):
        reward(IMAGES.clone().requires_grad_() * 1, ["a", "b"])


def test_a_reward_of_one_file_and_one_line(own, tmp_path, monkeypatch):
    """As README says: what a specification knows is used everywhere."""
    spec = RewardSpec(
        load=lambda folder, device, dtype: lambda images, prompts: images.mean((1, 2, 3)),
        files=lambda folder: {folder / "grey.pt": "someone/grey"},
        default_target=0.25,
    )
    monkeypatch.setitem(rewards.REWARDS, "grey", spec)
    assert rewards.default_target("grey:3") == 0.75 and rewards.default_target("grey,own_rewards:red") == 2.0
    assert rewards.default_target("imagereward") == 2.0 and rewards.default_target("own_rewards:red") == 2.0
    assert rewards.required_files("own_rewards:red", tmp_path) == {}
    assert list(rewards.required_files("own_rewards:red", tmp_path, "grey")) == [tmp_path / "grey.pt"]
    with pytest.raises(UserError, match="weights are missing:\n  .*grey.pt .*someone/grey"):
        load("grey", tmp_path)
    (tmp_path / "grey.pt").touch()
    assert torch.equal(load("grey", tmp_path)(IMAGES, ["a", "b"])[0], IMAGES.mean((1, 2, 3)))


def test_pil_images_of_any_size_are_scored_by_any_reward(own, reward, tiny):
    images = [Image.new("RGBA", (8, 9), (255, 0, 0)), Image.new("RGB", (40, 50), (0, 0, 51))]
    scores = load("own_rewards:red:2,own_rewards:Bright").score(images, "a", CPU)
    assert scores.tolist() == pytest.approx([2 + 1 / 3, 0.2 / 3])
    both = load("imagereward:2,own_rewards:red", tiny).score(images, "a cat", CPU)
    own_scores = reward.score("a cat", images)  # with its own preprocessing
    assert both.tolist() == pytest.approx([2 * own_scores[0] + 1, 2 * own_scores[1]], abs=1e-5)


def test_faults_end_training_at_the_first_step(own, training_options, monkeypatch):
    # With validation the scores are seen before the first step, the gradient in it.
    for name, steps in (("column", 1), ("nan", 1), ("detached", 1), ("detached", 0)):
        with pytest.raises(UserError, match=f"the reward own_rewards.{name}"):
            run_in_process(
                refl_lora,
                monkeypatch,
                *training_options,
                f"--reward=own_rewards:{name}",
                f"--validation_steps={steps}",
            )
        assert not (own / "out").exists()


def test_a_target_below_all_rewards_is_said(own, training_options, monkeypatch, capsys):
    run_in_process(
        refl_lora, monkeypatch, *training_options, "--reward=own_rewards:red", "--reward_target=-1"
    )
    assert "note: every image is above --reward_target -1.0" in capsys.readouterr().out


def test_a_faulty_reward_does_not_stop_drawing(own, tiny, trained_lora, monkeypatch, capsys):
    drawn = own / "drawn"
    run_in_process(
        inference_lora, monkeypatch, *weight_options(tiny), "--reward=own_rewards:nan",
        f"--lora_path={trained_lora}", f"--output_dir={drawn}",
        *"--num_images_per_prompt 2 --num_inference_steps 2".split(),
    )  # fmt: skip
    assert visible(drawn) == ["0.png", "1.png", "grid.png"]
    out = capsys.readouterr().out
    assert "no rewards shown: the reward own_rewards.nan of --reward returned [nan]" in out
    assert "trained for --reward imagereward" in out


def test_the_reward_in_the_readme_works(tiny, training_options, tmp_path, monkeypatch, capsys):
    """As README says: written into a file, named in --reward, alone and in a sum; training raises it."""
    code = re.search(r"```python\n(# my_rewards\.py\n.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    assert len(code.splitlines()) <= 11
    (tmp_path / "my_rewards.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    alone = [*"--max_train_steps 6 --learning_rate 1e-2 --reward_target None --reward_path nowhere".split()]
    run_in_process(refl_lora, monkeypatch, *training_options, *alone, "--reward=my_rewards:colourful")
    before, after = re.search(r"validation reward (\S+) -> (\S+)", capsys.readouterr().out).groups()
    assert float(after) > float(before)

    both = "imagereward:0.5,my_rewards:colourful:2"
    run_in_process(
        refl_lora, monkeypatch, *training_options, f"--reward={both}", f"--output_dir={tmp_path / 'sum'}"
    )
    board = events(tmp_path / "sum" / "logs")
    for prefix, total in (("reward", "reward/mean"), ("validation", "validation/reward")):
        own, red, sum_ = (
            [point.value for point in board.Scalars(tag)]
            for tag in (f"{prefix}/imagereward", f"{prefix}/my_rewards.colourful", total)
        )
        assert sum_ == pytest.approx([0.5 * a + 2 * b for a, b in zip(own, red, strict=True)], rel=1e-5)

    capsys.readouterr()
    run_in_process(
        inference_lora, monkeypatch, *weight_options(tiny), f"--reward={both}",
        f"--lora_path={tmp_path / 'sum'}", f"--output_dir={tmp_path / 'drawn'}",
        *"--num_images_per_prompt 2 --num_inference_steps 2".split(),
    )  # fmt: skip
    report = json.loads((tmp_path / "drawn" / "rewards.json").read_text())
    for side, mean in report["mean"].items():
        own, red = (report["mean_of_each"][side][name] for name in ("imagereward", "my_rewards.colourful"))
        assert mean == pytest.approx(0.5 * own + 2 * red, rel=1e-5)
