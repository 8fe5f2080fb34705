"""A thread that reads beside the computing one leaves its operations as fast as they were."""

import threading

import pytest
import torch

from unmurk.devices import reader
from unmurk.io.datasets import Batches


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_reader_has_one_thread_and_others_keep_theirs(two_threads):
    pool = reader()
    try:
        assert pool.submit(torch.get_num_threads).result() == 1
        assert torch.get_num_threads() == 2
        found = []
        other = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        other.start()
        other.join()
        assert found == [2]
    finally:
        pool.shutdown()


def test_batches_are_read_and_bound_with_one_thread(two_threads):
    found = []
    batches = Batches(
        torch.rand(8, 1, 4, 4),
        lambda step: torch.arange(4),
        torch.device("cpu"),
        lambda rows, device: found.append(torch.get_num_threads()),
    )
    try:
        batches.batch_at(0)
    finally:
        batches.close()
    assert found and set(found) == {1}
