"""User errors: exit code 2, one message, no traceback."""

import os
import sys
import time
from collections.abc import Callable

from refl.system.streams import restore_interrupt, warn_of_loss
from refl.system.text import printable


class UserError(ValueError):
    """An error of the user. Its message says what is wrong, where, and what to do."""


def run_as_command(main: Callable[[], None], memory_advice: Callable[[], str] = lambda: "") -> None:
    """Run a script's `main`; turn a `UserError` into a message on stderr and exit code 2.

    Does the same when GPU memory runs out; `memory_advice()` says what to change.
    """
    restore_interrupt()
    try:
        main()
        warn_of_loss()
    except UserError as error:
        _exit(f"error: {error}", 2)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; not imported here
            raise
        reason = str(error).partition(". ")[0]
        _exit(f"error: the GPU's memory does not suffice ({reason}). {memory_advice()}", 2)


def is_first_process() -> bool:
    """Whether this process is the first on its machine, which reports what concerns all of them."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _exit(message: str, code: int) -> None:
    # If all processes have the same error, the first one reports it and the launcher then ends the others. An
    # error of another process alone is reported after a delay.
    if not is_first_process():
        time.sleep(30)  # on a busy machine the first one may be that far behind
    print(printable(message), file=sys.stderr, flush=True)
    sys.exit(code)
