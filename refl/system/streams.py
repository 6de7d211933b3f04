"""Standard output and error that never end a program: closed, full, or too narrow for a character.

A script protects its streams before its imports, which take seconds:

    from refl.system.streams import protect_streams

    if __name__ == "__main__":
        protect_streams()
"""

import errno
import io
import os
import signal
import sys

lost: dict[str, OSError] = {}
"""By stream, the first error other than a reader's end: something that was printed is missing."""


class _Raw(io.FileIO):
    """A file descriptor whose writes are dropped where they fail."""

    def __init__(self, name: str, descriptor: int):
        super().__init__(descriptor, "w", closefd=False)
        self.stream = name

    def write(self, content: bytes) -> int | None:
        try:
            return super().write(content)
        except OSError as error:
            if error.errno != errno.EPIPE:  # nobody is there to miss it
                lost.setdefault(self.stream, error)
            return len(content)


def protect_streams() -> None:
    """Replace stdout and stderr by streams that drop what cannot be written and escape what cannot be
    encoded; until `run_as_command`, Ctrl-C ends the process without a traceback.

    A descriptor that is closed is opened on the null device: otherwise the next file that the program opens
    would take its number, and with it all that libraries print there.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, this one
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is not None and stream is not getattr(sys, f"__{name}__"):
            continue  # replaced already
        is_unbuffered = stream is not None and stream.write_through
        raw = _Raw(name, descriptor)
        protected = io.TextIOWrapper(
            raw if is_unbuffered else io.BufferedWriter(raw),
            encoding=stream.encoding if stream else "utf-8",
            errors="backslashreplace",
            line_buffering=stream.line_buffering if stream else False,
            write_through=is_unbuffered,
        )
        setattr(sys, name, protected)
        setattr(sys, f"__{name}__", protected)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as under nohup
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def restore_interrupt() -> None:
    """Let Ctrl-C raise `KeyboardInterrupt` again, which `protect_streams` prevents during imports."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def warn_of_loss() -> None:
    """Print a warning if something that was printed is missing."""
    sys.stdout.flush()
    if "stdout" in lost:
        text = "WARNING: what was printed is incomplete: standard output could not be written"
        print(f"{text} ({lost['stdout']}).", file=sys.stderr)
