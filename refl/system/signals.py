"""Being told to stop: Ctrl-C, a scheduler's SIGTERM, SLURM's SIGUSR1 before its time limit."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Stopped(BaseException):
    """A signal asked the process to stop. Not an `Exception`: nothing may take it for an error and go on."""

    def __init__(self, number: int):
        self.name = signal.Signals(number).name
        self.exit_code = 128 + number
        super().__init__(self.name)


class StopSignals:
    """From when it is made, the signals raise `Stopped`, but only inside `interruptible`, where nothing that
    must be whole is half done; elsewhere they wait for the next such place.

    Not `immediate`, they only set `received`: of several processes, none may leave the others waiting for it.
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
        """A block that may be left at any point."""
        self.is_interruptible = self.immediate
        try:
            if self.received and self.immediate:
                raise Stopped(self.received)
            yield
        finally:
            self.is_interruptible = False
