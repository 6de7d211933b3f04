"""TensorBoard: scalars, images, options, the layout of the curves; seconds by phase."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

import numpy as np
import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

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


def write_options(writer: SummaryWriter, options: dict[str, str | int | float | bool | None]) -> None:
    """Options into the run's own HParams tab (`SummaryWriter.add_hparams` would start a second run), and the
    layout of its curves."""
    for summary in hparams(
        {key: str(value) if value is None else value for key, value in options.items()}, {}
    ):
        writer.file_writer.add_summary(summary)
    writer.add_custom_scalars(LAYOUT)


def write_scalars(writer: SummaryWriter, scalars: dict[str, float], step: int) -> None:
    """One point of each curve."""
    for tag, value in scalars.items():
        writer.add_scalar(tag, value, step)


def write_image(writer: SummaryWriter, tag: str, image: Image.Image, step: int) -> None:
    """One PIL image."""
    writer.add_image(tag, np.asarray(image), step, dataformats="HWC")


class Phases:
    """Seconds spent in each named phase since the last `pop`, by CUDA events on a GPU, so that nothing is
    waited for."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.spans = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = self._now()
        yield
        self.spans.append((name, start, self._now()))

    def pop(self) -> dict[str, float]:
        """Seconds by phase; on a GPU this waits for it."""
        seconds = defaultdict(float)
        if self.cuda:
            torch.cuda.synchronize()
        for name, start, end in self.spans:
            seconds[name] += start.elapsed_time(end) / 1000 if self.cuda else end - start
        self.spans.clear()
        return dict(seconds)

    def _now(self):
        if not self.cuda:
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
