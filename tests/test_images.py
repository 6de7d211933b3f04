"""PNG files: exact round trips, and writing on another thread."""

import threading

from refl.system import images
from refl.system.errors import UserError
from refl.system.images import ImageWriter, save_image, to_pil, to_png, to_tensor
from refl.system.ownership import OutputFolder

import pytest
import torch
from conftest import visible
from PIL import Image


@pytest.fixture
def image() -> Image.Image:
    return to_pil(torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)))


def test_round_trip(image, tmp_path):
    save_image(image, tmp_path / "0.png")
    with Image.open(tmp_path / "0.png") as read:
        torch.testing.assert_close(to_tensor(read), to_tensor(image), rtol=0, atol=0)
    assert [path.name for path in tmp_path.iterdir()] == ["0.png"]
    values = torch.tensor([-1.0, 0.0, 0.5, 1.0, 2.0])
    row = to_tensor(to_pil(values.expand(3, 1, 5)))[0, 0]
    torch.testing.assert_close(row, values.clamp(0, 1), rtol=0, atol=0.501 / 255)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.png", b"\x89PNG\r\n\x1a\n" + b"a" * 100),
        ("a.blp", b"BLP2" + b"\x07" * 200),
        ("a.avif", b"\x00\x00\x00\x1cftypavif" + b"\x00" * 100),
        ("a.webp", b"RIFF\x10\x00\x00\x00WEBPVP8 "),
        ("a.txt", b"text"),
        ("a.gif", b""),
    ],
)
def test_files_that_are_no_images(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} cannot be read: (not an image|too large)"):
        images.read_image(tmp_path / name)


def test_images_of_impossible_sizes(tmp_path):
    Image.new("1", (100_000, 1)).save(tmp_path / "long.png")
    with pytest.raises(UserError, match="100000x1 pixels are too narrow"):
        images.read_image(tmp_path / "long.png")
    Image.new("1", (20_000, 10_000)).save(tmp_path / "large.png")
    with pytest.raises(UserError, match="large.png cannot be read: too large"):
        images.read_image(tmp_path / "large.png")


def test_writing_does_not_block_until_the_queue_is_full(image, tmp_path, monkeypatch):
    released = threading.Event()

    def slow(picture):
        assert released.wait(60)
        return to_png(picture)

    monkeypatch.setattr(images, "to_png", slow)
    monkeypatch.setattr(images, "MAX_PENDING", 2)
    with ImageWriter(OutputFolder(tmp_path)) as writer:
        for index in range(2):
            writer.write(image, f"{index}.png")  # returns although nothing can be written yet
        third = threading.Thread(target=writer.write, args=(image, "2.png"))
        third.start()
        third.join(0.2)
        assert third.is_alive() and not list(tmp_path.iterdir())
        released.set()
        third.join()
    assert visible(tmp_path) == ["0.png", "1.png", "2.png"]
    for path in tmp_path.glob("*.png"):
        with Image.open(path) as read:
            read.verify()


def test_a_file_that_cannot_be_written(image, tmp_path):
    (tmp_path / "none").write_text("a file where a folder is needed")
    output = OutputFolder(tmp_path / "none")
    with (
        pytest.raises(UserError, match=f"{tmp_path}/none cannot be written: .*Not a directory.* Make room."),
        ImageWriter(output, " Make room.") as writer,
    ):
        writer.write(image, "0.png")
    with pytest.raises(UserError, match="cannot be written"), ImageWriter(output) as writer:
        for _ in range(images.MAX_PENDING + 1):  # raises when the queue is full, or before
            writer.write(image, "0.png")
        pytest.fail("no error")


def test_after_an_error_what_was_queued_is_written(image, tmp_path):
    with pytest.raises(KeyError, match="of the drawing"), ImageWriter(OutputFolder(tmp_path)) as writer:
        for index in range(5):
            writer.write(image, f"{index}.png")
        raise KeyError("of the drawing")
    assert len(list(tmp_path.glob("?.png"))) == 5
