from __future__ import annotations

from pathlib import Path

import pytest
import torch

from graph_tools.errors import DataError
from pipeline.generate.statistics import Sums
from pipeline.generate.store import BatchStore, batch_sizes, open_store


def fill(store: BatchStore) -> list[tuple[torch.Tensor, ...]]:
    kept = []
    for index, size in enumerate(store.sizes):
        batch = store.create(index, torch.randn(size, 2, 3, 4))
        batch.first_moment.normal_()
        batch.second_moment.normal_()
        batch.set_sums(Sums(*(torch.randn(5, dtype=torch.float64) for _ in range(3))))
        kept.append(tuple(tensor.clone() for tensor in batch.tensors))
    return kept


@pytest.mark.parametrize("in_memory", [False, True])
def test_batches_come_back_bit_by_bit_in_any_order(tmp_path: Path, in_memory: bool) -> None:
    with open_store(
        tmp_path / "images.npz",
        sizes=(4, 4, 4, 2),
        canvas_shape=(2, 3, 4),
        num_statistics=5,
        device=torch.device("cpu"),
        in_memory=in_memory,
    ) as store:
        kept = fill(store)
        for index in (2, 2, 0, 3, 1, 0):
            batch = store.get(index)
            assert batch.canvas.requires_grad
            for found, expected in zip(batch.tensors, kept[index], strict=True):
                assert torch.equal(found, expected)
        assert len(list(tmp_path.iterdir())) == 1
        store.get(1).canvas.detach().fill_(7)
        store.get(2)
        assert (store.get(1).canvas == 7).all()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_new_batch_has_no_optimizer_state(tmp_path: Path, in_memory: bool) -> None:
    with open_store(
        tmp_path / "x",
        sizes=(2, 2),
        canvas_shape=(1, 2, 2),
        num_statistics=1,
        device=torch.device("cpu"),
        in_memory=in_memory,
    ) as store:
        first = store.create(0, torch.ones(2, 1, 2, 2))
        first.first_moment.fill_(3)
        second = store.create(1, torch.ones(2, 1, 2, 2))
        assert not any(tensor.any() for tensor in second.tensors[1:])
        assert (store.get(0).first_moment == 3).all()


def test_no_folder_is_left_after_a_failure(tmp_path: Path) -> None:
    def fail() -> None:
        with open_store(
            tmp_path / "x",
            sizes=(2, 2),
            canvas_shape=(1, 2, 2),
            num_statistics=1,
            device=torch.device("cpu"),
        ) as store:
            fill_all = [store.create(index, torch.ones(2, 1, 2, 2)) for index in (0, 1)]
            raise KeyError(len(fill_all))

    with pytest.raises(KeyError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_the_users_fault(tmp_path: Path) -> None:
    store = open_store(
        tmp_path / "nowhere" / "x",
        sizes=(1,),
        canvas_shape=(1, 2, 2),
        num_statistics=1,
        device=torch.device("cpu"),
    )
    with pytest.raises(DataError, match="no folder can be made"):
        store.__enter__()


def test_the_last_batch_may_be_smaller() -> None:
    assert batch_sizes(10, 4) == (4, 4, 2)
    assert batch_sizes(8, 4) == (4, 4)
    assert batch_sizes(3, 4) == (3,)
