"""The paged cache: blocks that rows, beams and forks share until one of them writes."""

import copy
from typing import Any, Self

from torch import Tensor

from hf_efficiency.generation.caches.budget import check_tokens
from hf_efficiency.generation.caches.paging import BlockPool, Tables
from hf_efficiency.integrations.transformers.caches.base import EfficientCache, Layer, cropped, filled
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer


class PagedLayer(Layer):
    """Tables of one pool."""

    is_croppable = True

    def __init__(self, block_size: int) -> None:
        super().__init__()
        self.block_size = block_size
        self.tables: Tables | None = None

    def start(self, key_states: Tensor, value_states: Tensor) -> None:
        """An empty pool."""
        self.tables = Tables(BlockPool(key_states, value_states, self.block_size), key_states.shape[0])

    def held(self) -> Tables:
        """The tables."""
        return filled(self.tables)

    def rows(self) -> int:
        """The batch size."""
        return len(self.held().rows)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Adds new tokens (b, k, t, d), and gives those of all tokens.

        Raises:
            ValueError: See `enter`.
        """
        self.enter(key_states, value_states)
        self.held().append(key_states, value_states)
        self.seen += key_states.shape[2]
        return self.held().dense()

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the last tokens away.

        Raises:
            ValueError: A positive number, or more tokens than there are.
        """
        remove = cropped(type(self).__name__, tokens_to_remove)
        if remove > self.seen:
            raise ValueError(f"{remove} tokens can't be taken back of {self.seen}.")
        if self.is_initialized and remove:
            self.held().crop(remove)
            self.seen -= remove

    def accept(self, path: list[int], of: int) -> None:
        """Keeps one path of the last step's tree."""
        keys, values = (x[:, :, x.shape[2] - of :][:, :, path] for x in self.held().dense())
        self.crop(-of)
        if path:
            self.held().append(keys, values)
        self.seen += len(path)

    def take(self, rows: Tensor) -> None:
        """Takes the batch's rows in this order."""
        self.held().select(rows.tolist())

    def reset(self) -> None:
        """Forgets everything, and gives the blocks back."""
        super().reset()
        self.tables = None

    def tensors(self) -> dict[str, Tensor]:
        """The pool's."""
        pool = self.held().pool
        return {"keys": pool.keys, "values": pool.values}

    def numbers(self) -> dict[str, Any]:
        """Tokens seen, and the tables."""
        return {"seen": self.seen, "rows": self.tables.rows if self.tables is not None else []}

    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Takes what was saved; blocks of other tables are left out."""
        pool = BlockPool(tensors["keys"], tensors["values"], self.block_size)
        pool.keys, pool.values = tensors["keys"], tensors["values"]
        pool.counts = [0] * pool.keys.shape[0]
        self.tables = Tables(pool, len(numbers["rows"]))
        self.tables.rows[:], self.tables.length = numbers["rows"], numbers["seen"]
        for row in self.tables.rows:
            pool.share(row)
        pool.trim()


class PagedCache(EfficientCache):
    """Keys and values in blocks that rows share until one of them writes (PagedAttention, Kwon et al. 2023).

    Beams, `num_return_sequences` and copies of a prompt take the memory of what differs only. Nothing is lost: the
    tokens are those of an ordinary cache, with any attention. Each step gathers the rows' blocks, as an ordinary cache
    copies its tensors. Memory of a layer: blocks in use * heads * block_size * (key size + value size) * bytes of the
    dtype.

    Args:
        model: The model that will use the cache.
        block_size: Tokens of a block.

    Raises:
        ValueError: A block size below 1.
    """

    name = "paged"

    def __init__(self, model: PreTrainedModel, block_size: int = 16) -> None:
        check_tokens("block_size", block_size, 1)
        self.options = {"block_size": block_size}
        super().__init__(model, lambda i, n: PagedLayer(block_size), attends=False)

    def fork(self) -> Self:
        """A cache that goes on from here on its own, and shares the blocks so far: a prompt is computed once.

        Its rows can be repeated with `batch_repeat_interleave`.
        """
        other = copy.copy(self)
        other.layers = []
        for layer in self.layers:
            twin = copy.copy(layer)
            if isinstance(layer, PagedLayer) and isinstance(twin, PagedLayer):
                twin.tables = layer.tables.fork() if layer.tables is not None else None
            elif isinstance(twin, DynamicLayer) and not hasattr(twin, "conv_states"):
                pass  # its tensors are replaced, never written to
            else:
                raise ValueError(f"{type(layer).__name__} holds a recurrent state, which can't be shared.")
            other.layers.append(twin)
        return other

    def trim(self) -> None:
        """Gives the memory of blocks that nobody uses back."""
        for layer in self.layers:
            if isinstance(layer, PagedLayer) and layer.tables is not None:
                layer.tables.pool.trim()

    def blocks(self) -> tuple[int, int]:
        """Blocks in use, and how many there would be if nothing were shared, over all layers."""
        used = total = 0
        for layer in self.layers:
            if isinstance(layer, PagedLayer) and layer.tables is not None:
                used += sum(count > 0 for count in layer.tables.pool.counts)
                total += sum(layer.tables.pool.counts)
        return used, total
