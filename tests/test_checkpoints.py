"""Checkpoints as files: whole or not there, verified, pruned only when there is a newer one."""

import errno

from refl.system import checkpoints
from refl.system.errors import UserError
from refl.system.ownership import PRIVATE
from refl.train.progress import pack_optimizer, unpack_optimizer

import pytest
import torch

FILES = {"a.bin": b"some bytes" * 50, "b.json": b"{}"}


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != PRIVATE)


def test_what_was_written_is_read(tmp_path):
    path = checkpoints.write(tmp_path, 7, FILES)
    assert path == tmp_path / "checkpoint-7" and names(tmp_path) == ["checkpoint-7"]
    assert checkpoints.read(path) == checkpoints.newest(tmp_path) == FILES


@pytest.mark.parametrize("name", [*FILES, "checksums.json"])
def test_damage_anywhere_is_found(tmp_path, name, capsys):
    checkpoints.write(tmp_path, 7, FILES | {"older": b"whole"})
    path = checkpoints.write(tmp_path, 10, FILES)
    content = (path / name).read_bytes()
    for spoilt in (*(content[:length] for length in range(0, len(content), 7)), content[:-1] + b"?", None):
        if spoilt is None:
            (path / name).unlink()
        else:
            (path / name).write_bytes(spoilt)
        with pytest.raises(UserError, match="checkpoint-10.* (is damaged|is not a complete checkpoint)"):
            checkpoints.read(path)
        assert "older" in checkpoints.newest(tmp_path)
        assert "checkpoint-10" in capsys.readouterr().err


def test_none_is_none(tmp_path):
    assert checkpoints.newest(tmp_path) is None and checkpoints.newest(tmp_path / "nowhere") is None
    (tmp_path / "checkpoint-5.partial").mkdir()
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "other").mkdir()
    assert checkpoints.newest(tmp_path) is None and checkpoints.steps(tmp_path) == []


def test_what_is_there_but_cannot_be_read_is_no_reason_to_start_anew(tmp_path, monkeypatch):
    path = checkpoints.write(tmp_path, 7, FILES)
    (path / "a.bin").unlink()
    with pytest.raises(UserError, match="all checkpoints in .* are damaged; --resume_from"):
        checkpoints.newest(tmp_path)

    def broken(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(type(path), "read_bytes", broken)
    checkpoints.write(tmp_path, 9, FILES)
    with pytest.raises(UserError, match="checkpoint-9 cannot be read: .*Input/output error"):
        checkpoints.newest(tmp_path)


def test_a_damaged_one_in_the_way_is_replaced(tmp_path):
    checkpoints.write(tmp_path, 7, FILES)
    (tmp_path / "checkpoint-7" / "a.bin").unlink()
    (tmp_path / PRIVATE / "checkpoint-7").mkdir()
    checkpoints.write(tmp_path, 7, FILES)
    assert checkpoints.newest(tmp_path) == FILES and names(tmp_path) == ["checkpoint-7"]


def test_pruning_keeps_the_newest(tmp_path):
    for step in (2, 4, 10, 12, 99):
        checkpoints.write(tmp_path, step, FILES)
    (tmp_path / PRIVATE / "checkpoint-8").mkdir()
    (tmp_path / "logs").mkdir()
    checkpoints.prune(tmp_path, 12, 2)  # 99 was left by another run
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-12", "logs"]
    assert not list((tmp_path / PRIVATE).glob("checkpoint-*"))


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    checkpoints.write(tmp_path, 1, FILES)
    written = []

    def write_synced(path, content):
        if written:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path.write_bytes(content))

    monkeypatch.setattr(checkpoints, "write_synced", write_synced)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.write(tmp_path, 2, FILES)
    assert names(tmp_path) == ["checkpoint-1"] and checkpoints.newest(tmp_path) == FILES


def test_an_optimizer_comes_back_exactly():
    def build(lr):
        torch.manual_seed(0)
        matrices = [torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(5))]
        return matrices, torch.optim.AdamW(matrices, lr=lr)

    def step(matrices, optimizer, seed):
        generator = torch.Generator().manual_seed(seed)
        for matrix in matrices:
            matrix.grad = torch.randn(matrix.shape, generator=generator)
        optimizer.step()

    straight, one = build(0.1)
    step(straight, one, 1)
    resumed, two = build(0.1)
    with torch.no_grad():
        for matrix, value in zip(resumed, straight, strict=True):
            matrix.copy_(value)
    unpack_optimizer(two, pack_optimizer(one))
    step(straight, one, 2)
    step(resumed, two, 2)
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))
    other, three = build(0.5)  # options are the new run's own
    unpack_optimizer(three, pack_optimizer(one))
    assert three.param_groups[0]["lr"] == 0.5 and pack_optimizer(three) == pack_optimizer(one)
