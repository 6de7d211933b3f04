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

# TensorBoard's tab "custom scalars": what to look at first. Tags are regular expressions, except those of a
# "Margin", a curve and its band. TensorBoard does not smooth these curves, and smoothing hides the course of
# the few points of a validation: theirs are margins with an empty band. Margins come last, in reverse order.
LAYOUT = {
    "Does it get better?": {
        "saturated colours, on validation prompts": ["Margin", ["validation/saturated"] * 3],
        "diversity, on validation prompts": ["Margin", ["validation/diversity"] * 3],
        "reward, in training": ["Margin", ["reward/mean", "reward/min", "reward/max"]],
        "reward, on validation prompts": ["Margin", ["validation/reward"] * 3],
        "each reward, on validation prompts; smoothing: 0": [
            "Multiline",
            [r"^validation/(?!reward$|diversity$|saturated$)"],
        ],
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


def layout(options: dict[str, str | int | float | bool | None]) -> dict[str, dict[str, list]]:
    """`LAYOUT` without the charts of what a run with these options does not measure."""
    absent = {"diversity"} if options.get("validation_images_per_prompt") == 1 else set()
    absent |= {"validation"} if options.get("validation_steps") == 0 else set()
    return {
        category: {
            title: chart for title, chart in charts.items() if not any(word in title for word in absent)
        }
        for category, charts in LAYOUT.items()
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
        self._write(lambda writer: writer.add_custom_scalars(layout(options)))

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
