"""Archives, arrays, checkpoints and pictures that are not what they seem."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from graph_tools.errors import DataError, SettingsError
from graph_tools.fixed_inputs import read_input
from graph_tools.side_file import read_side_file
from pipeline import archives
from pipeline.evaluate.datasets import open_dataset
from pipeline.evaluate.files import FolderFiles
from pipeline.evaluate.pictures import decode
from pipeline.images import open_images


class Evil:
    """What a pickle runs when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.fixture(autouse=True)
def nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not Path("ran").exists()


def npy(shape: str, descr: str = "'<f4'") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


# ------------------------------------------------------------------------- arrays


@pytest.mark.parametrize(
    "shape",
    ["(-1, 3, 8, 8)", "(2, 3, 8)", "(1e9, 3, 8, 8)", "-" * 9000 + "1", "(" * 9000, "[]" * 999,
     "None", "(True, 3, 8, 8)", "(1, 1, 1048576, 1048576)", "(9" + "9" * 30 + ", 1, 1, 1)"],
)  # fmt: skip
@pytest.mark.parametrize("packed", [False, True])
def test_headers_that_lie(shape: str, packed: bool) -> None:
    path = Path("images.npz" if packed else "images.npy")
    content = npy(shape) + bytes(64)
    if packed:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("images.npy", content)
    else:
        path.write_bytes(content)
    with pytest.raises(DataError):
        open_images(path)
    if packed:
        with pytest.raises(DataError):
            open_dataset(path)
    else:
        with pytest.raises(SettingsError):
            read_input(path)


def test_object_arrays_are_refused() -> None:
    np.save("x.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    np.savez("x.npz", images=np.array([Evil()], dtype=object))
    for path in ("x.npy", "x.npz"):
        with pytest.raises(DataError, match=r"pickled|allow_pickle"):
            open_images(path)
    with pytest.raises(DataError, match="allow_pickle"):
        open_dataset("x.npz")
    with pytest.raises(SettingsError):
        read_input("x.npy")


@pytest.mark.parametrize("name", ["images.npy", "a/1.png"])
def test_decompression_bombs(name: str) -> None:
    """A hundred megabytes of zeros are a hundred kilobytes."""
    count = 2**19
    content = npy(f"({count}, 3, 4, 4)") + bytes(count * 192)
    with zipfile.ZipFile("bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    if name.endswith("npy"):
        for reader in (open_images, open_dataset):
            with pytest.raises(DataError, match=r"grows from [\d,]+ to [\d,]+ bytes"):
                reader("bomb.zip")
        return
    with (
        open_dataset("bomb.zip").source.files.opened() as read,
        pytest.raises(DataError, match=r"grows from [\d,]+ to [\d,]+ bytes"),
    ):
        read(name)


@pytest.mark.parametrize(
    "name", ["../a/1.png", "/a/1.png", "a/../../1.png", "C:/a.png", "a\\..\\1.png"]
)
def test_names_that_lead_out_of_an_archive(name: str) -> None:
    with zipfile.ZipFile("bad.zip", "w") as archive:
        archive.writestr("b/2.png", b"")
        info = zipfile.ZipInfo("n")
        info.filename = name
        archive.writestr(info, b"")
    with pytest.raises(DataError, match="holds a file outside of itself"):
        open_dataset("bad.zip")


def test_archives_of_too_many_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_MEMBERS", 3)
    with zipfile.ZipFile("many.zip", "w") as archive:
        for index in range(4):
            archive.writestr(f"a/{index}.png", b"")
    with pytest.raises(DataError, match="holds 4 files, more than 3"):
        open_dataset("many.zip")


# ------------------------------------------------------------------------- checkpoints


def test_a_checkpoint_that_runs_code() -> None:
    torch.save({"bn.running_mean": Evil()}, "x.pt")
    Path("y.pt").write_bytes(pickle.dumps(Evil()))
    for path in ("x.pt", "y.pt"):
        with pytest.raises(DataError, match="holds more than tensors"):
            read_side_file(path)


@pytest.mark.parametrize("key", ["bn.running_mean", "conv.weight"])
def test_a_checkpoint_that_repeats_one_number(key: str) -> None:
    torch.save({key: torch.ones(1).expand(2**40)}, "x.pt")
    with pytest.raises(DataError, match=r"would take [\d,]{17,} bytes, many times the file's"):
        read_side_file("x.pt")


def test_a_checkpoint_that_is_compressed() -> None:
    torch.save({"w": torch.zeros(2**20)}, "plain.pt")
    with (
        zipfile.ZipFile("plain.pt") as plain,
        zipfile.ZipFile("x.pt", "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for name in plain.namelist():
            archive.writestr(name, plain.read(name))
    with pytest.raises(DataError, match=r"its parts grow to [\d,]+ bytes"):
        read_side_file("x.pt")


def test_a_checkpoint_that_holds_itself() -> None:
    content: dict[str, object] = {"w": torch.ones(2, 2)}
    content["again"] = content
    torch.save(content, "circle.pt")
    doubled: dict[str, object] = {"w": torch.ones(2)}
    for _ in range(60):
        doubled = {"a": doubled, "b": doubled}
    torch.save(doubled, "doubled.pt")
    for path in ("circle.pt", "doubled.pt"):
        with pytest.raises(DataError, match="holds no BatchNormalization"):
            read_side_file(path)


@pytest.mark.parametrize(
    "header",
    [
        b'{"w":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4]}}',
        b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4000000000]}}',
        b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}}',
        b"[" * 9000,
        b"{}" + b" " * 64,
    ],
)
@pytest.mark.parametrize("length", [None, 2**62])
def test_safetensors_headers_that_lie(header: bytes, length: int | None) -> None:
    size = struct.pack("<Q", len(header) if length is None else length)
    Path("x.safetensors").write_bytes(size + header + bytes(4))
    with pytest.raises(DataError):
        read_side_file("x.safetensors")


# ------------------------------------------------------------------------- pictures


def test_pictures_of_other_formats_are_not_opened() -> None:
    """Pillow would hand PostScript to Ghostscript, whatever the name."""
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    with pytest.raises(DataError, match="cannot identify image file"):
        decode(content, 3, "a.png")


def test_a_picture_of_a_million_by_a_million() -> None:
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    size = struct.pack(">IIBBBBB", 10**6, 10**6, 8, 2, 0, 0, 0)
    content = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"\0"))
    )
    with pytest.raises(DataError, match="pixels"):
        decode(content, 3, "a.png")


def test_pictures_of_the_known_formats_are_opened() -> None:
    from PIL import Image

    for kind in ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM"):
        stream = io.BytesIO()
        Image.new("RGB", (8, 8), "gray").save(stream, kind)
        assert decode(stream.getvalue(), 3, "x").size == (8, 8)


def test_a_pipe_in_a_folder_of_pictures() -> None:
    Path("folder").mkdir()
    os.mkfifo("folder/a.png")
    with (
        FolderFiles(Path("folder")).opened() as read,
        pytest.raises(DataError, match="is not a regular file"),
    ):
        read("a.png")
