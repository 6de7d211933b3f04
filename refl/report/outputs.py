"""Files of output folders: those of versions that kept no records of what they wrote are known by content."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from refl.model.lora import KOHYA_FILE, LORA_FILE, METADATA_KEY
from refl.system.checkpoints import is_checkpoint
from refl.system.errors import UserError
from refl.system.images import image_size
from refl.system.ownership import OutputFolder, take

CARD, OPTIONS, SETTINGS, EVALUATION = "README.md", "options.json", "settings.json", "evaluation.json"
CARD_IMAGES = ("curves.png", "validation_before.png", "validation_after.png", "before_after.png")
BEST = "best"  # folder of a run's best LoRA so far


def _has_keys(*keys: str) -> Callable[[Path], bool]:
    """Whether a file holds a JSON object with these keys."""

    def has_keys(path: Path) -> bool:
        try:
            content = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError):
            return False
        return isinstance(content, dict) and content.keys() >= set(keys)

    return has_keys


def _contains(*texts: str) -> Callable[[Path], bool]:
    """Whether the first MiB of a file contains these texts."""

    def contains(path: Path) -> bool:
        with open(path, "rb") as file:
            head = file.read(2**20)
        return all(text.encode() in head for text in texts)

    return contains


_is_lora = _contains('"format"', f'"{METADATA_KEY}"')
_is_card = _contains("library_name: diffusers", "\n- refl\n", "trained by reward feedback")
_is_evaluation = _has_keys("cases", "shown", "measures")
_is_settings = _has_keys("the model's files", "prompts")
_is_rewards = _has_keys("reward", "mean", "images")


def _is_in_card(path: Path) -> bool:
    """Whether the card beside an image shows it."""
    card = path.with_name(CARD)
    return card.is_file() and _is_card(card) and _contains(f"({path.name})")(card)


def _is_of_checkpoint(path: Path) -> bool:
    return is_checkpoint(path.parent)


def _is_of_evaluation(path: Path, levels: int = 0) -> bool:
    return _is_settings(path.parents[levels] / SETTINGS)


def _is_drawn(path: Path) -> bool:
    return _is_rewards(path.with_name("rewards.json"))


RUN = {
    LORA_FILE: _is_lora,
    KOHYA_FILE: _is_lora,
    f"{BEST}/{LORA_FILE}": _is_lora,
    f"{BEST}/{KOHYA_FILE}": _is_lora,
    OPTIONS: _has_keys("pretrained_model_name_or_path", "output_dir", "reward", "train_batch_size"),
    CARD: _is_card,
    EVALUATION: _is_evaluation,
    "checkpoint-*/checksums.json": _is_of_checkpoint,
    "checkpoint-*/state.json": _is_of_checkpoint,
} | dict.fromkeys(CARD_IMAGES, _is_in_card)
EVALUATED = {
    SETTINGS: _is_settings,
    EVALUATION: _is_evaluation,
    "images.csv": _contains("case,prompt_index,image_index,seed,prompt"),
    "prompts.csv": _contains("case,prompt_index,prompt"),
    "report.html": _contains("against the base model</h1>"),
    "grid.png": _is_of_evaluation,
    "images/*/*.png": partial(_is_of_evaluation, levels=2),
}
DRAWN = {"rewards.json": _is_rewards, "grid.png": _is_drawn, "[0-9]*.png": _is_drawn}


def is_run(folder: str | Path) -> bool:
    """Whether a folder is the output of a training, and not one of its checkpoints."""
    return (Path(folder) / OPTIONS).is_file()


def open_evaluation(folder: Path, prompts_file: str, images: Sequence[Path], side: int) -> OutputFolder:
    """Lock the folder of an evaluation; raises `UserError` if a report would replace a file of others, or if
    an image is not the one that was drawn."""
    output = take(folder, EVALUATED)
    output.check([name for name in EVALUATED if "*" not in name], inputs=[prompts_file])
    existing = [image for image in images if image.exists()]
    names = {image.relative_to(folder).as_posix(): image for image in existing}
    try:
        wrong = output.foreign(list(names))
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}.") from error
    wrong = wrong or [name for name, image in names.items() if image_size(image) != (side, side)]
    if wrong:
        others = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise UserError(
            f"{folder / wrong[0]}{others}: not the image that was drawn there. Delete it; the same command "
            "draws it again."
        )
    return output
