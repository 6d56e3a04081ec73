"""Paged storage of keys and values (PagedAttention, Kwon et al. 2023): blocks, tables, sharing, copy on write.

Shape legend: b batch, k key-value heads, n tokens of a row, m blocks of a row, p blocks of the pool, s tokens a block,
d head size.
"""

import weakref

import torch
from torch import Tensor


class BlockPool:
    """Blocks that several tables may share; a block is free when no table refers to it.

    Attributes:
        keys: (p, k, s, d).
        values: (p, k, s, d_v).
        counts: References to each block.
    """

    def __init__(self, keys: Tensor, values: Tensor, block_size: int) -> None:
        """Empty, for tokens like those of keys and values (b, k, t, d)."""
        k = keys.shape[1]
        self.keys = keys.new_empty(0, k, block_size, keys.shape[3])
        self.values = values.new_empty(0, k, block_size, values.shape[3])
        self.counts: list[int] = []
        self.tables: weakref.WeakSet[Tables] = weakref.WeakSet()

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self.keys.shape[2]

    def take(self, count: int) -> list[int]:
        """So many free blocks, each with one reference; the pool grows where too few are free."""
        free = [i for i, references in enumerate(self.counts) if references == 0][:count]
        more = count - len(free)
        if more:
            free += range(len(self.counts), len(self.counts) + more)
            self.counts += [0] * more
            self.keys = torch.cat((self.keys, self.keys.new_zeros(more, *self.keys.shape[1:])))
            self.values = torch.cat((self.values, self.values.new_zeros(more, *self.values.shape[1:])))
        for block in free:
            self.counts[block] = 1
        return free

    def share(self, blocks: list[int]) -> None:
        """One more reference to each block."""
        for block in blocks:
            self.counts[block] += 1

    def release(self, blocks: list[int]) -> None:
        """One reference less to each block."""
        for block in blocks:
            self.counts[block] -= 1

    def trim(self) -> None:
        """Gives the memory of free blocks back."""
        used = [i for i, references in enumerate(self.counts) if references > 0]
        if len(used) == len(self.counts):
            return
        index = torch.tensor(used, dtype=torch.int64, device=self.keys.device)
        self.keys, self.values = self.keys.index_select(0, index), self.values.index_select(0, index)
        place = {old: new for new, old in enumerate(used)}
        self.counts = [self.counts[i] for i in used]
        for table in self.tables:
            table.renumber(place)


class Tables:
    """The blocks of each row, in the order of its tokens. All rows have the same number of tokens.

    Attributes:
        pool: Where the blocks lie.
        rows: Block numbers of each row.
        length: n.
    """

    def __init__(self, pool: BlockPool, rows: int) -> None:
        self.pool, self.length = pool, 0
        self.rows: list[list[int]] = [[] for _ in range(rows)]
        self._index: Tensor | None = None
        pool.tables.add(self)
        # A table that is forgotten gives its blocks back.
        weakref.finalize(self, _release_rows, pool, self.rows)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Adds tokens (b, k, t, d) to each row. A shared block that they would change is copied first."""
        t, s, pool = keys.shape[2], self.pool.block_size, self.pool
        if self.length % s:
            self._own_last()
        needed = -(-(self.length + t) // s)
        for row in self.rows:
            row += pool.take(needed - len(row))
        places = torch.arange(self.length, self.length + t, device=keys.device)
        self.length += t
        self._index = None
        blocks, offsets = self.index()[:, places // s], (places % s).expand(len(self.rows), t)
        pool.keys[blocks, :, offsets] = keys.transpose(1, 2)
        pool.values[blocks, :, offsets] = values.transpose(1, 2)

    def _own_last(self) -> None:
        """Gives each row a last block of its own."""
        pool = self.pool
        for row in self.rows:
            if pool.counts[row[-1]] > 1:
                (copy,) = pool.take(1)
                pool.keys[copy], pool.values[copy] = pool.keys[row[-1]], pool.values[row[-1]]
                pool.release([row[-1]])
                row[-1] = copy

    def index(self) -> Tensor:
        """Block numbers (b, m) as a tensor."""
        if self._index is None:
            self._index = torch.tensor(self.rows, dtype=torch.int64, device=self.pool.keys.device)
        return self._index

    def dense(self) -> tuple[Tensor, Tensor]:
        """Keys and values (b, k, n, d)."""
        index = self.index()
        found = []
        for blocks in (self.pool.keys, self.pool.values):
            rows = blocks.index_select(0, index.flatten()).view(*index.shape, *blocks.shape[1:]).transpose(1, 2)
            found.append(rows.flatten(2, 3)[:, :, : self.length])
        return found[0], found[1]

    def crop(self, remove: int) -> None:
        """Takes the last tokens of each row away, and its reference to the blocks that held them alone."""
        self.length -= remove
        needed = -(-self.length // self.pool.block_size)
        for row in self.rows:
            self.pool.release(row[needed:])
            del row[needed:]
        self._index = None

    def select(self, order: list[int]) -> None:
        """Takes the rows in this order; blocks are shared, not copied."""
        chosen = [list(self.rows[i]) for i in order]
        for row in chosen:
            self.pool.share(row)
        for row in self.rows:
            self.pool.release(row)
        self.rows[:] = chosen
        self._index = None

    def fork(self) -> "Tables":
        """Other tables of the same blocks."""
        other = Tables(self.pool, len(self.rows))
        other.length = self.length
        other.rows[:] = [list(row) for row in self.rows]
        for row in other.rows:
            self.pool.share(row)
        return other

    def renumber(self, place: dict[int, int]) -> None:
        """Follows blocks that moved."""
        self.rows[:] = [[place[block] for block in row] for row in self.rows]
        self._index = None


def _release_rows(pool: BlockPool, rows: list[list[int]]) -> None:
    for row in rows:
        pool.release(row)
