"""Copies on the host: made once, into memory that is used again."""

import torch

from sharpmoe.parallel.ranks.background import HostCopies


def test_host_copies_are_made_once_and_their_memory_is_used_again() -> None:
    copies, source = HostCopies(), torch.arange(6.0)
    view = source[2:]
    copies.start()
    first, again, part = copies.tensor(source), copies.tensor(source), copies.tensor(view)
    assert copies.finish() == source.nbytes + view.nbytes
    source += 1
    assert first is again
    assert first.tolist() == [0, 1, 2, 3, 4, 5]
    assert part.tolist() == [2, 3, 4, 5]
    place = first.data_ptr()
    copies.start()
    assert copies.tensor(source).data_ptr() == place
    assert copies.tensor(torch.ones(9)).tolist() == [1.0] * 9
    assert copies.finish() == source.nbytes + 36
