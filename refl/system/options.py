"""Options of a command: read by tyro, then checked for numbers that nothing can be computed with."""

import dataclasses
import math
from typing import Any, TypeVar

from refl.system.errors import UserError

Options = TypeVar("Options")

MAX_FLOAT = 1e9  # products of several such numbers are still finite in float32
MAX_INT = 10**7
MAX_INTS = {  # of options with another limit, by name
    "seed": 2**64 - 1,  # that torch takes
    "resolution": 2**14,
    "decode_resolution": 2**14,
    "rank": 2**12,
}
MAY_BE_INFINITE = ("max_grad_norm",)  # inf does not clip


def read(kind: type[Options], arguments: list[str] | None = None, **settings: Any) -> Options:
    """Read options of `kind`, a dataclass, from `arguments`, or from the command line. Raises `UserError`.

    `settings` are further arguments of `tyro.cli`.
    """
    import tyro  # here, because the doctor imports modules with options to check whether tyro is installed

    options = tyro.cli(kind, args=arguments, use_underscores=True, **settings)
    check_numbers(options)
    return options


def check_numbers(options: Any) -> None:
    """Raise `UserError` for a number among the options that is not finite or far too large."""
    for field in dataclasses.fields(options):
        check_number(field.name, getattr(options, field.name))


def check_number(name: str, value: Any) -> None:
    """Raise `UserError` if the value of the option `name` is a number that is not finite or far too large."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or (name in MAY_BE_INFINITE and value == math.inf):
        return
    limit = MAX_INTS.get(name, MAX_INT) if isinstance(value, int) else MAX_FLOAT
    if not abs(value) <= limit:
        shown = f"{limit:,}" if isinstance(value, int) else f"{limit:g}"
        raise UserError(f"--{name} {value}: must be a finite number, at most {shown}.")
