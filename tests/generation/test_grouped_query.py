import pytest
import torch

from hf_efficiency.generation.grouped_query import pool_heads


def test_pooled_heads_are_means_of_neighbours():
    """Four heads of size 1: (1, 3) and (5, 9) become 2 and 7."""
    weight = torch.tensor([[1.0, 10], [3, 30], [5, 50], [9, 90]])
    assert pool_heads(weight, 4, 2).tolist() == [[2, 20], [7, 70]]
    assert pool_heads(weight[:, 0], 4, 1).tolist() == [4.5]
    # Two heads of size 2: rows 0 and 2, 1 and 3.
    assert pool_heads(weight, 2, 1).tolist() == [[3, 30], [6, 60]]


def test_heads_that_do_not_divide():
    with pytest.raises(ValueError, match="4 key-value heads can't form 3 equal groups"):
        pool_heads(torch.ones(4, 2), 4, 3)
