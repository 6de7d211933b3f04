"""What training shows: TensorBoard's scalars, histograms and options, captioned grids of pictures, seconds by
phase."""

import io
import textwrap
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

from refl.files import write_whole

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

CAPTION_SIZE = 14  # pixels
MAX_PICTURES = 32  # of a validation that are shown
# TensorBoard's tab "custom scalars": what to look at first. Tags as regular expressions.
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
        "saturated colours": ["Multiline", ["^pictures/saturated$"]],
        "learning rate": ["Multiline", ["^learning_rate$"]],
    },
    "What does it cost?": {
        "seconds": ["Multiline", ["^seconds/"]],
        "pictures per second": ["Multiline", ["^pictures_per_second/total$"]],
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


def write_picture(writer: SummaryWriter, tag: str, picture: Image.Image, step: int) -> None:
    """One PIL picture."""
    writer.add_image(tag, np.asarray(picture), step, dataformats="HWC")


def to_pil(picture: Tensor) -> Image.Image:
    """A picture (3, H, W) in [0, 1], values beyond cut off, as 8-bit RGB."""
    return Image.fromarray(
        (picture.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    )


def grid(
    rows: Sequence[Sequence[Image.Image]],
    captions: Sequence[Sequence[str]],
    cell: int = 256,
    header: str = "",
) -> Image.Image:
    """Pictures with a caption below each, scaled to fit `cell` pixels, one row for each sequence."""
    font = ImageFont.load_default(CAPTION_SIZE)
    per_line = max(8, int(cell / (CAPTION_SIZE * 0.52)))
    lines = [
        [[line for part in text.split("\n") for line in textwrap.wrap(part, per_line)] for text in row]
        for row in captions
    ]
    line_height = int(CAPTION_SIZE * 1.3)
    heights = [cell + line_height * max(len(text) for text in row) + 12 for row in lines]
    top = line_height + 12 if header else 0
    gap = 8
    width = max(len(row) for row in rows) * (cell + gap) + gap
    sheet = Image.new("RGB", (width, top + sum(heights) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((gap, 6), header, fill="black", font=font)
    for row, row_lines, height in zip(rows, lines, heights, strict=True):
        for column, (picture, text) in enumerate(zip(row, row_lines, strict=True)):
            left = gap + column * (cell + gap)
            scale = cell / max(picture.size)
            resample = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS
            shown = picture.resize((round(picture.width * scale), round(picture.height * scale)), resample)
            sheet.paste(shown, (left, top + gap))
            draw.multiline_text((left, top + gap + cell + 2), "\n".join(text), fill="black", font=font)
        top += height
    return sheet


def sheet(
    pictures: Sequence[Image.Image], captions: Sequence[str], header: str, per_row: int = 4
) -> Image.Image:
    """A `grid` of one sequence of pictures, `per_row` in each row."""
    rows = [slice(start, start + per_row) for start in range(0, len(pictures), per_row)]
    return grid([pictures[row] for row in rows], [captions[row] for row in rows], header=header)


def pairs(
    pictures: dict[str, Sequence[Image.Image]],
    captions: dict[str, Sequence[str]],
    per_row: int,
    header: str = "",
) -> Image.Image:
    """A `grid` of sequences by side, such as before and after, as long as each other: each picture above its
    partner."""
    rows, texts = [], []
    for start in range(0, len(next(iter(pictures.values()))), per_row):
        for side, own in pictures.items():
            rows.append(own[start : start + per_row])
            texts.append(captions[side][start : start + per_row])
    return grid(rows, texts, header=header)


def to_tensor(picture: Image.Image) -> Tensor:
    """An RGB picture as (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG whole, or not at all."""
    content = io.BytesIO()
    picture.save(content, format="PNG")
    write_whole(path, content.getvalue())


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
