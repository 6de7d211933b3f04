"""A run's log: events in the order of the run whatever the clock says, no file of a run that never was."""

import errno
import threading
import time

from refl.report import log as log_module
from refl.report.log import Log

import pytest
import torch
from conftest import events
from PIL import Image


def points(folder):
    return [(point.step, point.value) for point in events(folder).Scalars("loss")]


def test_points_are_those_of_the_last_process_whatever_the_clock_says(tmp_path, monkeypatch):
    now = time.time()
    for first, clock in ((0, now), (2, now - 86400), (4, now - 2 * 86400), (4, now)):
        monkeypatch.setattr(log_module.time, "time", lambda clock=clock: clock)
        log = Log(tmp_path, first, first + 1 if first else 0)
        for step in range(first, first + 3):  # the last one is repeated by the next process
            log.scalars({"loss": float(first + step)}, step + 1)
        log.close()
    assert points(tmp_path) == [(1, 0.0), (2, 1.0), (3, 4.0), (4, 5.0), (5, 8.0), (6, 9.0), (7, 10.0)]


def test_the_file_appears_after_the_first_step(tmp_path):
    log = Log(tmp_path / "logs")
    log.options({"rank": 4, "resolution": None})
    log.scalars({"validation/reward": 1.0}, 0)
    log.image("validation/images", Image.new("RGB", (8, 8)), 0)
    log.flush()
    assert not (tmp_path / "logs").exists()
    log.scalars({"loss": 1.0}, 1)
    log.histogram("rewards", torch.arange(4.0), 1)
    board = events(tmp_path / "logs")  # although it is not closed
    assert [point.step for point in board.Scalars("validation/reward")] == [0]
    assert board.Images("validation/images")[0].width == 8
    assert board.Histograms("rewards")[0].histogram_value.num == 4
    log.close()
    failed = Log(tmp_path / "failed")
    failed.scalars({"validation/reward": 1.0}, 0)
    failed.close()
    assert not (tmp_path / "failed").exists()


@pytest.mark.parametrize("what", ["a file for the folder", "full disk"])
def test_a_log_that_cannot_be_written_ends_with_one_warning(tmp_path, monkeypatch, capsys, what):
    threads = threading.active_count()
    log = Log(tmp_path / "logs")
    if what == "full disk":

        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(log_module.RecordWriter, "write", full)
    else:
        (tmp_path / "logs").write_text("")
    for step in range(3):
        log.scalars({"loss": 1.0, "reward": 2.0}, step)
    log.flush()
    log.close()
    assert not log.is_open and threading.active_count() == threads
    assert capsys.readouterr().err.count("WARNING: the curves end here") == 1
