"""`accelerate launch` that ends with the script's own exit code and shows no traceback of its own.

python -m refl.launch --multi_gpu --num_processes 2 refl_lora.py ...
"""

import logging
import sys

from accelerate.commands import launch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main() -> None:
    """Launch; what went wrong was said by the process in which it did."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        launch.main()
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        sys.exit(first.exitcode if first.exitcode > 0 else 1)  # a signal's number is negative


if __name__ == "__main__":
    main()
