"""What identifies the inputs of a run besides its options: the content of the files it computes with."""

import sys
from pathlib import Path

from refl.model.folder import MODEL_PARTS, part_files
from refl.reward import rewards
from refl.system.errors import UserError
from refl.system.files import fingerprint
from refl.train.options import Options


def of_inputs(options: Options) -> dict[str, str]:
    """SHA-256 of samples of the files of each part of the model and of each reward, or of the code of
    the user's own, by the part's name.

    Takes milliseconds, whatever the size. Raises `UserError` for a file that cannot be read.
    """
    folder = Path(options.pretrained_model_name_or_path)
    parts = {part: part_files(folder, part) for part in MODEL_PARTS}
    if options.tiny_decoder_path:
        parts["tiny decoder"] = _files(Path(options.tiny_decoder_path))
    specs = rewards.parse(options.reward)
    if options.early_stop:  # held-out rewards then decide which LoRA is the result
        specs |= rewards.parse_held_out(options.held_out_reward)
    for name, (_, spec) in specs.items():
        paths = spec.files(Path(options.reward_path)) or _module_files(name)
        parts[f"reward {name}"] = [file for path in paths for file in _files(path)]
    try:
        return {name: fingerprint(files) for name, files in parts.items()}
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}.") from error


def _module_files(reward: str) -> list[Path]:
    """The file that defines a reward of the user's own, `module.function`; its weights cannot be known."""
    module = reward.rpartition(".")[0]
    while module and module not in sys.modules:
        module = module.rpartition(".")[0]
    file = getattr(sys.modules.get(module), "__file__", None)
    return [Path(file)] if file else []


def _files(path: Path) -> list[Path]:
    """A file, or the visible files in a folder."""
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
