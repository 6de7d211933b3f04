"""A run's log: curves, images and options in TensorBoard's files."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

# TensorBoard's tab "custom scalars": what to look at first. Tags are regular expressions.
LAYOUT = {
    "Does it get better?": {
        "reward, in training": ["Margin", ["reward/mean", "reward/min", "reward/max"]],
        "reward, on validation prompts": ["Multiline", ["^validation/reward$"]],
        "each reward, also those held out": ["Multiline", [r"^validation/(?!reward$|diversity$|saturated$)"]],
        "diversity, saturated colours": ["Multiline", ["^validation/(diversity|saturated)$"]],
    },
    "Is it healthy?": {
        "loss": ["Multiline", ["^loss$"]],
        "gradient norm": ["Multiline", ["^gradient_norm$"]],
        "saturated colours": ["Multiline", ["^images/saturated$"]],
        "learning rate": ["Multiline", ["^learning_rate$"]],
    },
    "What does it cost?": {
        "seconds": ["Multiline", ["^seconds/"]],
        "images per second": ["Multiline", ["^images_per_second/total$"]],
        "peak memory, GiB": ["Multiline", ["^memory/peak_gib$"]],
    },
}


class Log:
    """TensorBoard's writer; without a folder it writes nothing.

    A disk that is full ends the log with one warning, and not the run.
    """

    def __init__(self, folder: Path | None, purge_step: int = 0):
        """Points from `purge_step` on, left by an earlier process, are purged when the files are read."""
        self.writer = SummaryWriter(folder, purge_step=purge_step) if folder else None

    @property
    def is_open(self) -> bool:
        """Whether anything is still written."""
        return self.writer is not None

    def options(self, options: dict[str, str | int | float | bool | None]) -> None:
        """Write the options to the run's HParams tab, and the layout of the curves.

        `SummaryWriter.add_hparams` would start a second run.
        """
        values = {name: str(value) if value is None else value for name, value in options.items()}
        for summary in hparams(values, {}):
            self._write(lambda writer, summary=summary: writer.file_writer.add_summary(summary))
        self._write(lambda writer: writer.add_custom_scalars(LAYOUT))

    def scalars(self, scalars: dict[str, float], step: int) -> None:
        """Add one point to each curve."""
        for tag, value in scalars.items():
            self._write(lambda writer, tag=tag, value=value: writer.add_scalar(tag, value, step))

    def histogram(self, tag: str, values: Tensor, step: int) -> None:
        """Add a histogram of values (N,)."""
        self._write(lambda writer: writer.add_histogram(tag, values, step))

    def image(self, tag: str, image: Image.Image, step: int) -> None:
        """Add an image."""
        self._write(lambda writer: writer.add_image(tag, np.asarray(image), step, dataformats="HWC"))

    def flush(self) -> None:
        """Write what is buffered to the disk."""
        self._write(lambda writer: writer.flush())

    def close(self) -> None:
        """End the log."""
        self._write(lambda writer: writer.close())

    def _write(self, write: Callable[[SummaryWriter], None]) -> None:
        if self.writer is None:
            return
        try:
            write(self.writer)
        except OSError as error:
            tqdm.write(f"WARNING: the curves end here: they cannot be written ({error})", file=sys.stderr)
            self.writer = None
