from __future__ import annotations

import pickle
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from graph_tools.errors import DataError
from pipeline.images import ImageWriter, open_images

SHAPE = (3, 4, 5)


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(10, *SHAPE)).astype(np.float32)


def write(path: Path, images: np.ndarray, size: int = 4) -> Path:
    with ImageWriter(path, count=len(images), shape=images.shape[1:]) as writer:
        for start in range(0, len(images), size):
            writer.append(images[start : start + size])
    return path


def test_numpy_reads_what_the_writer_wrote(tmp_path: Path, images: np.ndarray) -> None:
    path = write(tmp_path / "images.npz", images)
    with np.load(path, allow_pickle=False) as file:
        assert file.files == ["images"]
        np.testing.assert_array_equal(file["images"], images)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    assert [entry.name for entry in tmp_path.iterdir()] == ["images.npz"]


def test_bytes_depend_on_the_images_only(tmp_path: Path, images: np.ndarray) -> None:
    one = write(tmp_path / "one.npz", images, size=1).read_bytes()
    assert one == write(tmp_path / "two.npz", images, size=7).read_bytes()


@pytest.mark.parametrize("save", ["savez", "savez_compressed", "one_array", "npy"])
def test_reads_what_numpy_wrote(tmp_path: Path, images: np.ndarray, save: str) -> None:
    path = tmp_path / ("x.npy" if save == "npy" else "x.npz")
    if save == "npy":
        np.save(path, images)
    elif save == "one_array":
        np.savez(path, images)
    else:
        getattr(np, save)(path, images=images, labels=np.arange(10))
    found = open_images(path, shape=SHAPE)
    assert (found.count, found.shape) == (10, SHAPE)
    np.testing.assert_array_equal(found.load(), images)
    batches = list(found.batches(4))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    np.testing.assert_array_equal(np.concatenate(batches), images)


def test_limit(tmp_path: Path, images: np.ndarray) -> None:
    found = open_images(write(tmp_path / "x.npz", images))
    assert [len(batch) for batch in found.batches(4, limit=6)] == [4, 2]
    assert len(found.load(limit=3)) == 3
    assert len(found.load(limit=99)) == 10
    assert len(found.load(limit=0)) == 0
    with pytest.raises(ValueError, match="not positive"):
        next(found.batches(0))


def test_big_endian_is_converted(tmp_path: Path, images: np.ndarray) -> None:
    np.save(tmp_path / "x.npy", images.astype(">f4"))
    loaded = open_images(tmp_path / "x.npy").load()
    assert loaded.dtype == np.dtype("<f4")
    np.testing.assert_array_equal(loaded, images)


def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    shape, batch = (3, 32, 32), np.ones((16, 3, 32, 32), dtype=np.float32)
    tracemalloc.start()
    try:
        with ImageWriter(tmp_path / "x.npz", count=2048, shape=shape) as writer:
            for _ in range(128):
                writer.append(batch)
        for _ in open_images(tmp_path / "x.npz").batches(16):
            pass
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # A few copies of one batch; the whole set has 128 batches.
    assert peak < 8 * batch.nbytes


def test_a_replaced_file_is_whole_or_the_old_one(tmp_path: Path, images: np.ndarray) -> None:
    path = write(tmp_path / "x.npz", images)
    before = path.read_bytes()

    def interrupted() -> None:
        with ImageWriter(path, count=10, shape=SHAPE) as writer:
            writer.append(images[:3])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.npz"]
    write(path, images[:5])
    assert open_images(path).count == 5


@pytest.mark.parametrize("count", [2, 5])
def test_wrong_count(tmp_path: Path, images: np.ndarray, count: int) -> None:
    with (
        pytest.raises(ValueError, match="announced"),
        ImageWriter(tmp_path / "x.npz", count=count, shape=SHAPE) as writer,
    ):
        writer.append(images[:4])
    assert not list(tmp_path.iterdir())


def test_wrong_shape_in_append(tmp_path: Path, images: np.ndarray) -> None:
    with (
        pytest.raises(ValueError, match="shape"),
        ImageWriter(tmp_path / "x.npz", count=10, shape=(4, 5, 3)) as writer,
    ):
        writer.append(images)
    assert not list(tmp_path.iterdir())


def test_non_finite_images_are_named(tmp_path: Path, images: np.ndarray) -> None:
    images[7, 0, 0, 0] = np.nan
    np.savez(tmp_path / "x.npz", images=images)
    found = open_images(tmp_path / "x.npz")
    with pytest.raises(DataError, match=r"image 7 .* NaN"):
        found.load()
    assert len(found.load(limit=7)) == 7
    images[7, 0, 0, 0] = np.inf
    with pytest.raises(DataError, match="image 7 "):
        write(tmp_path / "y.npz", images)
    assert not (tmp_path / "y.npz").exists()


def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "folder.npz").mkdir()
    for path in (tmp_path / "absent" / "x.npz", tmp_path / "folder.npz"):
        with (
            pytest.raises(DataError, match=r"cannot be written|is a folder"),
            ImageWriter(path, count=1, shape=SHAPE),
        ):
            pass


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, *SHAPE)), "float64 values, not float32; normalize"),
        (np.zeros((2, *SHAPE), dtype=np.uint8), "uint8 values, not float32; normalize"),
        (np.zeros(SHAPE, dtype=np.float32), "not four axes"),
        (np.zeros((0, *SHAPE), dtype=np.float32), "holds no images"),
        (np.zeros((2, 4, 5, 3), dtype=np.float32), r"shape \[4, 5, 3\].*\[3, 4, 5\]"),
        (np.zeros((2, *SHAPE), dtype=object), "pickled objects, which are never loaded"),
        (np.asfortranarray(np.zeros((2, *SHAPE), dtype=np.float32)), "Fortran order"),
    ],
)
def test_arrays_that_are_refused(tmp_path: Path, array: np.ndarray, message: str) -> None:
    np.savez(tmp_path / "x.npz", images=array)
    with pytest.raises(DataError, match=message):
        open_images(tmp_path / "x.npz", shape=SHAPE)


def test_files_that_are_refused(tmp_path: Path, images: np.ndarray) -> None:
    whole = write(tmp_path / "whole.npz", images).read_bytes()
    np.save(tmp_path / "whole.npy", images)
    npy = (tmp_path / "whole.npy").read_bytes()
    np.savez(tmp_path / "two.npz", a=images, b=images)
    cases = {
        "empty.npz": (b"", "not an .npz or .npy"),
        "text.npz": (b"hello", "not an .npz or .npy"),
        "pickle.npy": (pickle.dumps([1]), "not an .npz or .npy"),
        "cut.npz": (whole[: len(whole) // 2], "cannot be read"),
        "cut.npy": (npy[:-4], "truncated"),
        "long.npy": (npy + b"1234", "does not fit its header"),
        "header.npy": (npy[:20], "cannot be read"),
        "version.npy": (npy[:6] + b"\x09\x00" + npy[8:], "cannot be read"),
        "two.npz": (
            (tmp_path / "two.npz").read_bytes(),
            r'no array "images" \(arrays: a, b\)',
        ),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            open_images(tmp_path / name)
    with pytest.raises(DataError, match="no such file"):
        open_images(tmp_path / "absent.npz")
    with pytest.raises(DataError, match="no such file"):
        open_images(tmp_path)


def test_damage_inside_the_array_is_found(tmp_path: Path, images: np.ndarray) -> None:
    path = write(tmp_path / "x.npz", images)
    content = bytearray(path.read_bytes())
    position = content.index(images[5].tobytes())
    content[position] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"cannot be read.*CRC"):
        open_images(path).load()
