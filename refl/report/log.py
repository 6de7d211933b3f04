"""A run's log: curves, images and options in TensorBoard's files."""

import errno
import io
import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.utils.tensorboard.summary import custom_scalars, histogram, hparams, image, scalar
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
_POSITIVE = 1e-12 * 1.1 ** np.arange(774)  # up to 1e20
BINS = [*-_POSITIVE[::-1], 0.0, *_POSITIVE]  # of histograms, those of torch's SummaryWriter


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
    """A file of TensorBoard's events; without a folder nothing is written.

    The file appears with the first point after `first_step`: a run that fails in its first step leaves none.
    A disk that is full ends the log with one warning, and not the run.
    """

    def __init__(self, folder: Path | None, first_step: int = 0, purge_step: int | None = None):
        """Points from `purge_step` on, left by an earlier process, are purged when the files are read."""
        self.folder, self.first_step = folder, first_step
        self.waiting = io.BytesIO()  # records for a file that does not exist yet
        self.file: BinaryIO | None = None
        self._add(file_version="brain.Event:2", step=purge_step)
        if purge_step is not None:
            self._add(session_log=SessionLog(status=SessionLog.START), step=purge_step)

    @property
    def is_open(self) -> bool:
        """Whether anything is still written."""
        return self.folder is not None

    def options(self, options: dict[str, str | int | float | bool | None]) -> None:
        """Add the options to the run's HParams tab, and the layout of the curves."""
        values = {name: str(value) if value is None else value for name, value in options.items()}
        for summary in (*hparams(values, {}), custom_scalars(layout(options))):
            self._add(summary=summary)

    def scalars(self, scalars: dict[str, float], step: int) -> None:
        """Add one point to each curve."""
        for tag, value in scalars.items():
            self._add(summary=scalar(tag, value), step=step)

    def histogram(self, tag: str, values: Tensor, step: int) -> None:
        """Add a histogram of values (N,)."""
        self._add(summary=histogram(tag, values.numpy(), BINS), step=step)

    def image(self, tag: str, picture: Image.Image, step: int) -> None:
        """Add an image."""
        self._add(summary=image(tag, np.asarray(picture), dataformats="HWC"), step=step)

    def flush(self) -> None:
        """Sync the file to the disk."""
        if self.file:
            with self._ending_at_error():
                os.fsync(self.file.fileno())

    def close(self) -> None:
        """End the log."""
        if self.file:
            with self._ending_at_error():
                self.file.close()
        self.folder = self.file = None

    def _add(self, step: int | None = None, **content: Any) -> None:
        if self.folder is None:
            return
        with self._ending_at_error():
            event = Event(wall_time=time.time(), step=step, **content)
            RecordWriter(self.waiting).write(event.SerializeToString())
            is_due = step is not None and step > self.first_step and "summary" in content
            if self.file or is_due:
                self.file = self.file or self._open()
                if self.file.write(self.waiting.getvalue()) < self.waiting.tell():
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self.waiting = io.BytesIO()

    def _open(self) -> BinaryIO:
        """Create the file. Files are read in the order of their names, which start with a time: the name is
        later than those of all others, even if the clock was set back."""
        self.folder.mkdir(parents=True, exist_ok=True)
        names = (re.match(r"events\.out\.tfevents\.(\d+)", path.name) for path in self.folder.iterdir())
        number = max([int(time.time()), *(int(match[1]) + 1 for match in names if match)])
        name = f"events.out.tfevents.{number:010d}.{socket.gethostname()}.{os.getpid()}.0"
        return open(self.folder / name, "xb", buffering=0)

    @contextmanager
    def _ending_at_error(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            tqdm.write(f"WARNING: the curves end here: they cannot be written ({error})", file=sys.stderr)
            self.folder = self.file = None
