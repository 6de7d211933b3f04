"""Text of other people in plots."""

from contextlib import AbstractContextManager

from refl.system.text import printable

from matplotlib import rc_context

MAX_LENGTH = 40  # characters, which fit into a legend


def plain_labels() -> AbstractContextManager:
    """A context in which matplotlib takes no text for mathematics: a folder may be called $a$."""
    return rc_context({"text.parse_math": False})


def label(text: str) -> str:
    """Text for a legend, which would leave out a label that begins with an underscore."""
    text = printable(" ".join(text.split()))
    text = text if len(text) <= MAX_LENGTH else f"{text[: MAX_LENGTH - 3]}..."
    return f" {text}" if text.startswith("_") else text
