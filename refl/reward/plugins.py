"""Code of the user's: its errors are named by the option that brought it in, and shown with its traceback."""

import importlib
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from refl.system.errors import UserError

import torch

OURS = (str(Path(__file__).parents[1]), str(Path(importlib.__file__).parent), "<frozen importlib")


@contextmanager
def users_code(label: str, passed: type[Exception] = UserError) -> Iterator[None]:
    """Raise `UserError` with `label` and the traceback for any error in the block, also for sys.exit().

    Errors of the type `passed`, of memory and of the user (Ctrl-C) are raised as they are.
    """
    try:
        yield
    except (UserError, torch.OutOfMemoryError, passed):
        raise
    except (Exception, SystemExit) as error:
        what = f"calls sys.exit({error.code!r})" if isinstance(error, SystemExit) else "has an error"
        raise UserError(f"{label} {what}:\n\n{_traceback(error)}") from error


def _traceback(error: BaseException) -> str:
    """The traceback from the user's first line on."""
    frames = error.__traceback__
    while frames and frames.tb_frame.f_code.co_filename.startswith(OURS):
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames)).rstrip()
