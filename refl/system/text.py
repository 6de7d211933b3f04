"""Text of other people on a terminal."""

import re

# Control characters but line breaks and tabs, reversals of the direction of writing, halves of surrogate
# pairs: they could move the cursor, hide or recolour what else is printed, or not be written at all.
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object) -> str:
    """Text for a terminal: what could control it is spelled out, such as \\x1b."""
    return UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], str(text))
