"""What a person got wrong, as opposed to what the program got wrong."""

import os
import sys
import time
from collections.abc import Callable


class UserError(ValueError):
    """A mistake in the input. Its message says what is wrong, where, and what to do. No traceback."""


def run_as_command(main: Callable[[], None], memory_advice: Callable[[], str] = lambda: "") -> None:
    """Run a script's `main`. A `UserError` becomes one message on stderr and exit code 2.

    So does a GPU whose memory does not suffice; `memory_advice()` says what to change.
    """
    try:
        main()
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
    """Whether this is the first of the processes on its machine: the one that says what they all could."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _exit(message: str, code: int) -> None:
    # Of several processes with the same mistake the first one speaks, and the launcher then ends the others.
    # One that is alone with its mistake is heard a little later.
    if not is_first_process():
        time.sleep(30)  # on a busy machine the first one may be that far behind
    print(message, file=sys.stderr, flush=True)
    sys.exit(code)
