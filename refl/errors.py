"""What a person got wrong, as opposed to what the program got wrong."""

import os
import sys
from collections.abc import Callable


class UserError(ValueError):
    """A mistake in the input. Its message says what is wrong, where, and what to do; it is shown without
    traceback."""


def run_as_command(main: Callable[[], None]) -> None:
    """Run a script's `main`: a `UserError` becomes one message on stderr, from one process only, and exit
    code 2."""
    try:
        main()
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
