"""Values of options that no machine could train with."""

from refl.system.errors import UserError
from refl.train.options import Options, check_values

import pytest

WRONG = {
    "be 1 or more": {
        "rank": 0, "train_batch_size": 0, "gradient_accumulation_steps": 0, "decode_batch_size": 0,
        "rollout_batch_size": 0, "max_train_steps": 0, "num_inference_steps": 0, "num_validation_images": 0,
        "validation_images_per_prompt": 0, "checkpoints_total_limit": 0, "max_nonfinite_steps": 0,
    },
    "be 0 or more": {
        "lr_warmup_steps": -1, "min_stop": -1, "seed": -1, "validation_steps": -1, "checkpointing_steps": -1,
        "noise_distance_weight": -1, "pretrain_weight": float("nan"), "adam_weight_decay": float("inf"),
    },
    "be positive": {
        "learning_rate": float("nan"), "grad_scale": -1, "guidance_scale": 0, "adam_epsilon": 0,
        "lora_alpha": 0, "max_grad_norm": 0,
    },
    "be at least 0 and below 1": {"adam_beta1": 1, "adam_beta2": -0.1, "lora_shrinkage": 1},
    "be a number, or None": {"reward_target": float("nan")},
    "pip install bitsandbytes": {"use_8bit_adam": True},
    "go with a --guidance_scale other than 1": {"guidance_in": "rollout"},
}  # fmt: skip


@pytest.mark.parametrize("demand", WRONG)
def test_values_that_are_wrong_alone(demand, monkeypatch):
    monkeypatch.setattr("refl.train.options.find_spec", lambda name: None)
    for name, value in WRONG[demand].items():
        with pytest.raises(UserError, match=f"--{name} {value}: must .*{demand}"):
            check_values(Options(**{name: value}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_stop": 40}, "--max_stop 40: must be below --num_inference_steps 40"),
        ({"min_stop": 3, "max_stop": 2}, "--max_stop 2: must not be below --min_stop 3"),
        (
            {"train_batch_size": 3, "decode_batch_size": 2},
            "--decode_batch_size 2: must divide --train_batch_size 3",
        ),
        (
            {"low_memory": True, "decode_batch_size": 2},
            "--decode_batch_size 2: must be 1 with --low_memory",
        ),
        ({"lr_warmup_steps": 5}, "take --lr_scheduler constant_with_warmup"),
        ({"early_stop": True, "validation_steps": 0}, "have --validation_steps above 0"),
    ],
)
def test_values_that_do_not_go_together(changes, message):
    with pytest.raises(UserError, match=message):
        check_values(Options(**changes))


def test_the_defaults_are_right():
    check_values(Options())
