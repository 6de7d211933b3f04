"""Signals to stop: Ctrl-C, a scheduler's SIGTERM, SLURM's SIGUSR1 before its time limit."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Stopped(BaseException):
    """A signal asked the process to stop. Not an `Exception`, so that no handler of errors catches it."""

    def __init__(self, number: int):
        self.name = signal.Signals(number).name
        self.exit_code = 128 + number
        super().__init__(self.name)


class StopSignals:
    """Handlers for `SIGNALS`, installed on creation.

    If `immediate`, a signal raises `Stopped` inside `interruptible` blocks, or at the start of the next one:
    code outside them must not be interrupted. Otherwise it only sets `received`, because a process that left
    a step early would leave the others waiting.
    """

    def __init__(self, immediate: bool):
        self.immediate = immediate
        self.received = None
        self.is_interruptible = False
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame) -> None:
        first, self.received = self.received is None, self.received or number
        if first and self.is_interruptible:
            raise Stopped(number)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A block that may be interrupted at any point."""
        self.is_interruptible = self.immediate
        try:
            if self.received and self.immediate:
                raise Stopped(self.received)
            yield
        finally:
            self.is_interruptible = False
