from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from graph_tools.errors import DataError
from pipeline.evaluate.box_datasets import holds_boxes, open_box_dataset
from pipeline.evaluate.placement import Resize, place, placement


def picture(width: int = 40, height: int = 20) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


YOLO = {
    "images/a.png": picture(),
    "images/b.png": picture(),
    "images/empty.png": picture(),
    "labels/a.txt": b"2 0.5 0.5 0.5 1.0\n\n0 0.25 0.5 0.1 0.2\n",
    "labels/b.txt": b"1.0 0.5 0.5 1 1",
}
COCO = {
    "images": [
        {"id": 7, "file_name": "a.png", "width": 40, "height": 20},
        {"id": 3, "file_name": "b.png"},
    ],
    "categories": [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}],
    "annotations": [
        {"id": 1, "image_id": 3, "category_id": 90, "bbox": [1, 2, 30, 4.5], "area": 99},
        {"id": 2, "image_id": 3, "category_id": 1, "bbox": [0, 0, 2, 2], "iscrowd": 1},
    ],
}


def write(path: Path, content: dict[str, bytes], zipped: bool = False) -> Path:
    if zipped:
        with zipfile.ZipFile(path.with_suffix(".zip"), "w") as archive:
            for name, data in content.items():
                archive.writestr(name, data)
        return path.with_suffix(".zip")
    for name, data in content.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("root", ["", "coco/val/"])
def test_yolo_format(tmp_path: Path, root: str, zipped: bool):
    content = {root + name: data for name, data in YOLO.items()}
    path = write(tmp_path / "data", content, zipped)
    assert holds_boxes(path)
    dataset = open_box_dataset(path)
    assert dataset.names == tuple(f"{root}images/{n}.png" for n in ("a", "b", "empty"))
    assert dataset.shares
    assert dataset.num_classes == 3
    assert dataset.objects[0].classes.tolist() == [2, 0]
    np.testing.assert_allclose(
        dataset.objects[0].boxes, [[0.25, 0, 0.75, 1], [0.2, 0.4, 0.3, 0.6]]
    )
    assert [len(one.classes) for one in dataset.objects] == [2, 1, 0]
    assert dataset.only([2, 0]).names == (dataset.names[2], dataset.names[0])


def test_labels_beside_the_pictures_and_in_the_nearest_images_folder(tmp_path: Path):
    label = b"0 0.5 0.5 1 1"
    write(
        tmp_path,
        {
            "x/a.png": picture(),
            "x/a.txt": label,
            "images/train/images/b.png": picture(),
            "images/train/labels/b.txt": label,
        },
    )
    assert [len(o.classes) for o in open_box_dataset(tmp_path).objects] == [1, 1]


@pytest.mark.parametrize("zipped", [False, True])
def test_coco_format(tmp_path: Path, zipped: bool):
    content = {
        "val/a.png": picture(),
        "val/b.png": picture(),
        "val/unlisted.png": picture(),
        "annotations/instances_val.json": json.dumps(COCO).encode(),
        "annotations/captions_val.json": b"{}",
    }
    path = write(tmp_path / "data", content, zipped)
    assert holds_boxes(path)
    dataset = open_box_dataset(path)
    assert dataset.names == ("val/a.png", "val/b.png")
    assert not dataset.shares
    assert dataset.class_names == ("person", "toothbrush")
    assert dataset.sizes == ((40, 20), None)
    assert not len(dataset.objects[0].classes)
    second = dataset.objects[1]
    assert second.classes.tolist() == [1, 0]
    np.testing.assert_allclose(second.boxes, [[1, 2, 31, 6.5], [0, 0, 2, 2]])
    assert second.areas is not None
    assert second.areas.tolist() == [99, 4]
    assert second.crowd is not None
    assert second.crowd.tolist() == [False, True]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"0 0.5 0.5 1", r"a\.txt, line 1: has 4 number\(s\), not 5; a line is"),
        (b"0 0.5 0.5 1 1 0.9", "has 6 number"),
        (b"cat 0.5 0.5 1 1", "something else than numbers"),
        (b"0 nan 0.5 1 1", r"not in 0\.\.1"),
        (b"-1 0.5 0.5 1 1", "class, -1, is not"),
        (b"0.5 0.5 0.5 1 1", r"class, 0\.5, is not"),
        (b"inf 0.5 0.5 1 1", "class, inf, is not"),
        (b"0 320 240 10 10", r"not in 0\.\.1"),
        (b"\xff\xfe\x00", "is not text"),
    ],
)
def test_yolo_labels_that_are_refused(tmp_path: Path, line: bytes, said: str):
    write(tmp_path, {**YOLO, "labels/a.txt": line})
    with pytest.raises(DataError, match=said):
        open_box_dataset(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (b"[]", "not an object with images"),
        (b"{", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        ({"images": 3}, "no list 'images'"),
        ({"images": []}, "no images or no categories"),
        ({"categories": []}, "no images or no categories"),
        ({"categories": [{"id": 1}, {"id": 1}]}, "two categories of the same id"),
        ({"images": [3]}, r"images\[0\]: is not an object"),
        ({"images": [{"id": "7", "file_name": "a.png"}]}, "its id is '7', not an integer"),
        ({"images": [{"id": 7}]}, "has no file_name"),
        ({"images": [{"id": 7, "file_name": "a.png"}] * 2}, "image 7 is there twice"),
        ({"images": [{"id": 7, "file_name": "c.png"}], "annotations": []}, "c.png.*not there"),
        ({"images": [{"id": 7, "file_name": "../../etc/a.txt"}], "annotations": []}, "not there"),
        ({"annotations": [{"image_id": 9, "category_id": 1}]}, "image 9, category 1: unknown"),
        ({"annotations": [{"image_id": 7, "category_id": 2}]}, "category 2: unknown"),
        ({"annotations": [{"image_id": 7, "category_id": 1, "bbox": [1, 2, 3]}]}, "four numbers"),
        ({"annotations": [{"image_id": 7, "category_id": 1, "bbox": [1, 2, 3, float("nan")]}]},
         "four numbers"),
        ({"annotations": [{"image_id": 7, "category_id": 1, "bbox": [1, 2, -3, 1]}]}, "negative"),
    ],
)  # fmt: skip
def test_coco_annotations_that_are_refused(tmp_path: Path, change, said: str):
    content = change if isinstance(change, bytes) else json.dumps({**COCO, **change}).encode()
    images = {"a.png": picture(), "b.png": picture(), "instances.json": content}
    write(tmp_path, images)
    with pytest.raises(DataError, match=said):
        open_box_dataset(tmp_path)


def test_paths_that_are_refused(tmp_path: Path):
    with pytest.raises(DataError, match="no such file"):
        open_box_dataset(tmp_path / "none")
    assert not holds_boxes(tmp_path / "none")
    write(tmp_path / "plain", {"a.png": picture(), "b/a.txt": b""})
    assert not holds_boxes(tmp_path / "plain")
    with pytest.raises(DataError, match=r"holds no boxes; give labels/NAME\.txt"):
        open_box_dataset(tmp_path / "plain")
    write(tmp_path / "bare", {"labels/a.txt": b""})
    with pytest.raises(DataError, match="holds no pictures"):
        open_box_dataset(tmp_path / "bare")
    two = {"a.png": picture(), "instances_a.json": b"{}", "instances_b.json": b"{}"}
    write(tmp_path / "two", two)
    with pytest.raises(DataError, match=r"holds 2 files of annotations: instances_a\.json"):
        open_box_dataset(tmp_path / "two")
    outside = write(tmp_path / "evil", {**YOLO, "../../labels/c.txt": b""}, zipped=True)
    with pytest.raises(DataError, match="a file outside of itself"):
        open_box_dataset(outside)
    same = {"x/a.png": picture(), "y/a.png": picture(), "b.png": picture()}
    write(tmp_path / "same", {**same, "instances.json": json.dumps(COCO).encode()})
    with pytest.raises(DataError, match=r"'a\.png', which is there 2 times"):
        open_box_dataset(tmp_path / "same")


@pytest.mark.parametrize("resize", ["crop", "stretch", "letterbox"])
@pytest.mark.parametrize("size", [(60, 20), (20, 60), (48, 32)])
def test_boxes_get_back_to_where_they_were(resize: Resize, size: tuple[int, int]):
    """A white block is found on the input and brought back to the picture."""
    pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    middle = size[0] // 2, size[1] // 2
    block = (middle[0] - 6, middle[1] - 4, middle[0] + 8, middle[1] + 6)
    pixels[block[1] : block[3], block[0] : block[2]] = 255
    height, width = 192, 256
    shown = place(Image.fromarray(pixels), height, width, resize, "here")
    assert shown.shape == (height, width, 3)
    rows, columns = np.nonzero(shown[..., 0] >= 128)
    box = np.array([[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]])
    back = placement(size, height, width, resize).to_picture(box)
    np.testing.assert_allclose(back[0], block, atol=0.5)


def test_letterbox_keeps_the_shape_and_fills_with_gray():
    white = Image.new("RGB", (50, 100), (255, 255, 255))
    shown = place(white, 100, 100, "letterbox", "here")
    assert (shown[:, :25] == 114).all()
    assert (shown[:, 25:75] == 255).all()
    assert (shown[:, 75:] == 114).all()
    stretched = place(white.convert("L"), 100, 100, "stretch", "here")
    assert stretched.shape == (100, 100, 1)
    assert (stretched == 255).all()
