from __future__ import annotations

import io
import logging
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from graph_tools.errors import DataError
from graph_tools.model import ImageInput
from pipeline.evaluate import files, pictures
from pipeline.evaluate.datasets import Dataset, open_dataset
from pipeline.preprocessing import Preprocessing

RAW = Preprocessing(mean=(0.0,), std=(1 / 255,))
Make = Callable[[Path, Mapping[str, bytes]], Path]


def takes(*shape: int, layout: str = "NHWC") -> ImageInput:
    return ImageInput(name="x", shape=shape, layout=layout, batch=None)  # type: ignore[arg-type]


def picture(value: int, size: tuple[int, int] = (4, 4), mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    color = value if len(mode) == 1 else (value,) * len(mode)
    Image.new(mode, size, color).save(buffer, "PNG")
    return buffer.getvalue()


def make_folder(path: Path, content: Mapping[str, bytes]) -> Path:
    for name, data in content.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def make_zip(path: Path, content: Mapping[str, bytes]) -> Path:
    path = path.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return path


both = pytest.mark.parametrize("make", [make_folder, make_zip])


def values(dataset: Dataset, **options: int) -> list[int]:
    """First pixel of each image, which tells our pictures apart."""
    batches = dataset.batches(takes(4, 4, 3), RAW, 2, **options)
    return [int(value) for images, _ in batches for value in images[:, 0, 0, 0]]


def labels(dataset: Dataset, **options: int) -> list[int]:
    batches = dataset.batches(takes(4, 4, 3), RAW, 2, **options)
    return [int(label) for _, part in batches if part is not None for label in part]


CLASSES = {
    "dog/b.png": picture(3),
    "cat/z.png": picture(2),
    "cat/a.PNG": picture(1),
    "eel/deep/x.png": picture(4),
    "README.txt": b"hello",
    "cat/.hidden.png": b"not a picture",
    "__MACOSX/cat/._a.png": b"not a picture",
}


@both
@pytest.mark.parametrize("root", ["", "data/", "data/v2/"])
def test_class_folders_in_sorted_order(tmp_path: Path, make: Make, root: str) -> None:
    content = {f"{root}{name}": data for name, data in CLASSES.items()}
    dataset = open_dataset(make(tmp_path / "d", content))
    assert dataset.class_names == ("cat", "dog", "eel")
    assert (dataset.count, dataset.num_classes) == (4, 3)
    assert values(dataset) == [1, 2, 3, 4]
    assert labels(dataset) == [0, 0, 1, 2]


@both
@pytest.mark.parametrize("root", ["", "data/"])
def test_labels_csv_with_numbers(tmp_path: Path, make: Make, root: str) -> None:
    content = {f"images/{i}.png": picture(i) for i in range(3)}
    table = "\ufefffile,label\r\nimages/2.png,9\r\nimages\\0.png, 4\r\n./images/1.png,0\r\n"
    content["labels.csv"] = table.encode()
    dataset = open_dataset(
        make(tmp_path / "d", {f"{root}{name}": data for name, data in content.items()})
    )
    assert (dataset.count, dataset.num_classes, dataset.class_names) == (3, 10, None)
    assert values(dataset) == [2, 0, 1]
    assert labels(dataset) == [9, 4, 0]


@both
def test_labels_csv_with_names(tmp_path: Path, make: Make) -> None:
    content = {f"{i}.png": picture(i) for i in range(3)}
    content["labels.csv"] = b"label,file\ndog,0.png\ncat,1.png\ndog,2.png\n"
    dataset = open_dataset(make(tmp_path / "d", content))
    assert dataset.class_names == ("cat", "dog")
    assert labels(dataset) == [1, 0, 1]


def test_pictures_that_labels_csv_leaves_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = {f"{i}.png": picture(i) for i in range(3)}
    content["labels.csv"] = b"file,label\n1.png,1\n"
    with caplog.at_level(logging.WARNING):
        dataset = open_dataset(make_folder(tmp_path, content))
    assert values(dataset) == [1]
    assert "does not list 2 of 3 pictures" in caplog.text


@both
def test_one_folder_of_pictures_has_no_labels(tmp_path: Path, make: Make) -> None:
    content = {f"images/{i}.png": picture(i) for i in range(3)}
    dataset = open_dataset(make(tmp_path / "d", content))
    assert (dataset.count, dataset.num_classes, dataset.labels) == (3, None, None)
    assert "one folder" in dataset.unlabelled
    assert values(dataset) == [0, 1, 2]
    ((_, part),) = dataset.batches(takes(4, 4, 3), RAW, 3)
    assert part is None


def test_a_stray_picture_is_named(tmp_path: Path) -> None:
    dataset = open_dataset(make_folder(tmp_path, {**CLASSES, "stray.png": picture(9)}))
    assert dataset.labels is None
    assert dataset.unlabelled == "stray.png lies outside the class folders"


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    make_folder(tmp_path / "real", {"x.png": picture(5)})
    make_folder(tmp_path / "data", {"cat/a.png": picture(1)})
    (tmp_path / "data" / "dog").symlink_to(tmp_path / "real")
    (tmp_path / "data" / "cat" / "loop").symlink_to(tmp_path / "data")
    dataset = open_dataset(tmp_path / "data")
    assert (dataset.class_names, values(dataset)) == (("cat", "dog"), [1, 5])


def test_limit_and_seed(tmp_path: Path) -> None:
    content = {f"c{i % 2}/{i:02}.png": picture(i) for i in range(12)}
    dataset = open_dataset(make_folder(tmp_path, content))
    first, again = values(dataset, seed=1), values(dataset, seed=1)
    assert first == again
    assert sorted(first) == list(range(12))
    assert first != values(dataset, seed=2)
    assert values(dataset, seed=1, limit=5) == first[:5]
    assert labels(dataset, seed=1) == [value % 2 for value in first]
    assert values(dataset, limit=3) == [0, 2, 4]
    assert values(dataset, limit=99) == values(dataset)
    assert values(dataset, limit=0) == []
    with pytest.raises(ValueError, match="not positive"):
        next(dataset.batches(takes(4, 4, 3), RAW, 0))


def test_without_the_images_that_were_drawn(tmp_path: Path) -> None:
    names = {f"{index % 2}/{index:02}.png": picture(index) for index in range(10)}
    dataset = open_dataset(make_folder(tmp_path, names))
    drawn = dataset.drawn(4, 7)
    rest = dataset.without(drawn)
    calibration, test = values(dataset, limit=4, seed=7), values(rest)
    assert rest.count == 6
    assert sorted(calibration + test) == list(range(10))
    assert labels(rest) == [value % 2 for value in test]
    assert test == [value for value in values(dataset) if value not in calibration]
    assert len(set(values(rest, limit=3, seed=1)) & set(test)) == 3


def test_larger_pictures_are_scaled_and_cropped_at_the_center() -> None:
    # Left half black, right half white, 40x20 to 10x10: the middle 20x20 at half size.
    image = Image.new("L", (40, 20))
    image.paste(255, (20, 0, 40, 20))
    pixels = pictures.fit(image, 10, 10, "x")[..., 0]
    assert pixels.shape == (10, 10)
    assert (pixels[:, :4] == 0).all()
    assert (pixels[:, 6:] == 255).all()


def test_the_scaling_is_antialiased() -> None:
    checkers = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    pixels = pictures.fit(Image.fromarray(checkers), 8, 8, "x")
    # The mean of black and white; a bilinear filter without antialiasing may give 0 or 255.
    np.testing.assert_allclose(pixels, 127.5, atol=2)


@pytest.mark.parametrize("size", [(7, 5), (5, 7), (3, 3), (1, 9), (300, 4)])
@pytest.mark.parametrize("wanted", [(4, 6), (6, 4), (5, 5)])
def test_every_size_fits(size: tuple[int, int], wanted: tuple[int, int]) -> None:
    pixels = pictures.fit(Image.new("RGB", size, (9, 8, 7)), *wanted, "x")
    assert pixels.shape == (*wanted, 3)
    assert (pixels == (9, 8, 7)).all()


def test_a_picture_of_the_right_size_is_untouched() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)
    np.testing.assert_array_equal(pictures.fit(Image.fromarray(pixels), 6, 4, "x"), pixels)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "1", "P"])
def test_color_modes(mode: str) -> None:
    data = picture(255, mode=mode) if mode != "P" else palette_with_transparency()
    for channels in (1, 3):
        image = pictures.decode(data, channels, "x")
        assert image.mode == {1: "L", 3: "RGB"}[channels]
        assert np.asarray(image).max() == 255


def palette_with_transparency() -> bytes:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 255, 255, 255])
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=bytes([0, 128]))
    return buffer.getvalue()


def test_sixteen_bits_and_odd_channel_counts_are_refused() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), dtype=np.uint16)).save(buffer, "PNG")
    with pytest.raises(DataError, match=r"x\.png: has more than 8 bits a channel"):
        pictures.decode(buffer.getvalue(), 1, "x.png")
    with pytest.raises(DataError, match="1 or 3 channels, but the model takes 4"):
        pictures.decode(picture(0), 4, "x.png")


def noisy_jpeg() -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


@both
@pytest.mark.parametrize(
    "data",
    [b"", b"hello", picture(1)[:50], noisy_jpeg()[:20], noisy_jpeg()[:2000]],
    ids=["empty", "text", "cut png", "cut jpeg header", "cut jpeg"],
)
def test_damaged_pictures_are_named(tmp_path: Path, make: Make, data: bytes) -> None:
    dataset = open_dataset(make(tmp_path / "d", {**CLASSES, "dog/c.png": data}))
    with pytest.raises(DataError, match=r"dog/c\.png: cannot be decoded"):
        values(dataset)


def huge_png(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")


@pytest.mark.parametrize("side", [8_000, 10_000, 60_000])
def test_huge_pictures_are_refused_before_they_are_decoded(side: int) -> None:
    # Pillow is silent about the first, warns about the second and raises for the third.
    with pytest.raises(DataError, match=r"x\.png"):
        pictures.decode(huge_png(side, side), 3, "x.png")


def test_a_thread_of_a_picture_does_not_fill_the_memory() -> None:
    with pytest.raises(DataError, match="pixels"):
        pictures.fit(Image.new("L", (1, 20_000)), 224, 224, "x")


@both
def test_large_files_are_refused(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_BYTES", 10)
    dataset = open_dataset(make(tmp_path / "d", CLASSES))
    with pytest.raises(DataError, match="bytes large, more than 10"):
        values(dataset)


@both
@pytest.mark.parametrize(
    ("table", "message"),
    [
        (b"name,class\n0.png,1\n", "not the header file,label"),
        (b"", "not the header file,label"),
        (b"file,label\n", "lists no files"),
        (b"file,label\n9.png,1\n", r"row 2 names '9\.png', which is not there"),
        (b"file,label\n0.png,1\n../0.png,1\n", "row 3 names"),
        (b"file,label\n0.png\n", "row 2 has no label"),
        (b"file,label\n0.png,-1\n", "label -1 is negative"),
        (b"file,label\n\xff\xfe,1\n", "not a CSV file in UTF-8"),
    ],
)
def test_labels_csv_that_cannot_be_used(
    tmp_path: Path, make: Make, table: bytes, message: str
) -> None:
    content = {"0.png": picture(0), "labels.csv": table}
    with pytest.raises(DataError, match=message) as caught:
        open_dataset(make(tmp_path / "d", content))
    assert "labels.csv" in caught.value.where


def test_paths_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        open_dataset(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.zip").write_bytes(b"hello")
    with pytest.raises(DataError, match="holds no pictures"):
        open_dataset(tmp_path / "empty")
    with pytest.raises(DataError, match="holds no pictures"):
        open_dataset(make_zip(tmp_path / "none", {"a.txt": b""}))
    with pytest.raises(DataError, match=r"not a folder, a zip archive or an \.npz"):
        open_dataset(tmp_path / "text.zip")


def test_a_zip_with_damage_inside(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "d", CLASSES)
    content = bytearray(path.read_bytes())
    content[content.index(picture(3)) + 20] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"dog/b\.png: cannot be read.*CRC"):
        values(open_dataset(path))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_of_pixels(tmp_path: Path, save: Callable[..., None]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    save(tmp_path / "x.npz", images=pixels, labels=np.array([3, 1, 0, 2, 1], dtype=np.uint8))
    dataset = open_dataset(tmp_path / "x.npz")
    assert (dataset.count, dataset.num_classes) == (5, 4)
    ((images, found),) = dataset.batches(takes(3, 4, 4, layout="NCHW"), RAW, 8)
    np.testing.assert_array_equal(images, pixels.transpose(0, 3, 1, 2))
    assert found is not None
    assert found.tolist() == [3, 1, 0, 2, 1]
    assert found.dtype == np.int64


def test_npz_of_gray_pixels_fits_other_sizes_and_colors(tmp_path: Path) -> None:
    pixels = np.full((2, 8, 8), 7, dtype=np.uint8)
    np.savez(tmp_path / "x.npz", images=pixels)
    dataset = open_dataset(tmp_path / "x.npz")
    assert dataset.unlabelled
    for shape in ((8, 8, 1), (4, 4, 1), (5, 9, 3)):
        ((images, _),) = dataset.batches(takes(*shape), RAW, 2)
        assert images.shape == (2, *shape)
        assert (images == 7).all()


def test_npz_in_the_models_own_normalization(tmp_path: Path) -> None:
    stored = np.random.default_rng(0).normal(size=(4, 2, 3, 3)).astype(np.float32)
    np.savez(tmp_path / "x.npz", images=stored, labels=np.arange(4))
    dataset = open_dataset(tmp_path / "x.npz")
    ((images, _),) = dataset.batches(takes(2, 3, 3, layout="NCHW"), RAW, 4)
    np.testing.assert_array_equal(images, stored)
    with pytest.raises(DataError, match=r"shape \[2, 3, 3\], but the model takes \[3, 3, 2\]"):
        list(dataset.batches(takes(3, 3, 2), RAW, 4))


def test_npz_with_nan_names_the_image(tmp_path: Path) -> None:
    stored = np.zeros((4, 1, 2, 2), dtype=np.float32)
    stored[2, 0, 1, 1] = np.nan
    np.savez(tmp_path / "x.npz", images=stored)
    with pytest.raises(DataError, match="image 2 "):
        list(open_dataset(tmp_path / "x.npz").batches(takes(1, 2, 2, layout="NCHW"), RAW, 3))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros(3)}, r'no array "images" \(arrays: x\)'),
        ({"images": np.zeros((2, 3), dtype=np.uint8)}, '"images" is uint8'),
        ({"images": np.zeros((2, 4, 4, 3), dtype=np.int64)}, '"images" is int64'),
        ({"images": np.zeros((0, 4, 4, 3), dtype=np.uint8)}, "holds no images"),
        ({"images": np.zeros((2, 4, 4, 3), dtype=object)}, "cannot be read.*allow_pickle"),
        (
            {"images": np.zeros((2, 4, 4, 3), dtype=np.uint8), "labels": np.zeros(3, int)},
            "not 2 integers",
        ),
        (
            {"images": np.zeros((2, 4, 4, 3), dtype=np.uint8), "labels": np.zeros(2)},
            "is float64",
        ),
        (
            {"images": np.zeros((2, 4, 4, 3), dtype=np.uint8), "labels": np.array([0, -1])},
            "not 2 integers",
        ),
    ],
)
def test_npz_that_is_refused(
    tmp_path: Path, arrays: dict[str, np.ndarray], message: str
) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(DataError, match=message):
        open_dataset(tmp_path / "x.npz")


def test_npz_of_many_channels_needs_the_exact_shape(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=np.zeros((2, 4, 4, 5), dtype=np.uint8))
    dataset = open_dataset(tmp_path / "x.npz")
    assert len(list(dataset.batches(takes(4, 4, 5), RAW, 2))) == 1
    with pytest.raises(DataError, match=r"5 channel\(s\), but the model takes 3"):
        list(dataset.batches(takes(4, 4, 3), RAW, 2))


def test_real_images(shared_data: Path) -> None:
    cifar = open_dataset(shared_data / "cifar10_test_dev.zip")
    assert (cifar.count, cifar.num_classes) == (5000, 10)
    assert cifar.labels is not None
    assert np.bincount(cifar.labels).tolist() == [500] * 10
    imagenet = open_dataset(shared_data / "imagenet_dev.zip")
    assert (imagenet.count, imagenet.class_names) == (500, None)
    assert imagenet.labels is not None
    assert len(set(imagenet.labels.tolist())) == 500
