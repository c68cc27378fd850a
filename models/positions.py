"""Positions of the patches of a grid, fixed or trained. A smaller grid, of any aspect, takes the centre of a table."""

import torch
from torch import Tensor, nn


class PositionTable(nn.Module):
    """Fixed 2-D sines and cosines. Kept as one axis: the table of a grid follows, at a thousandth of the memory.

    Args:
        side: patches along a side of the whole table.
        offset, scale: patch p sits at (p - offset) * scale.
    """

    axis: Tensor

    def __init__(self, side: int, width: int, offset: float, scale: float) -> None:
        super().__init__()
        self.offset, self.scale = offset, scale
        self.register_buffer("axis", torch.empty(side, width // 2))
        self.init_buffers()

    def init_buffers(self) -> None:
        """Fill the axis: coordinates to sines, then cosines, of geometric frequencies (Vaswani et al. 2017)."""
        side, half = self.axis.shape
        coordinates = (torch.arange(side, dtype=torch.float64) - self.offset) * self.scale
        frequencies = 10000 ** (-torch.arange(half // 2, dtype=torch.float64) / (half // 2))
        angles = coordinates[:, None] * frequencies
        self.axis.copy_(torch.cat([angles.sin(), angles.cos()], dim=1))

    def forward(self, rows: int, columns: int) -> Tensor:
        """The centre of the table: (rows * columns, D)."""
        return position_table(self.axis, rows, columns).flatten(0, 1)


class LearnedPositionTable(nn.Module):
    """A trained table of positions for grids up to side x side."""

    def __init__(self, side: int, width: int) -> None:
        super().__init__()
        self.side = side
        self.table = nn.Parameter(torch.empty(1, side * side, width))

    def forward(self, rows: int, columns: int) -> Tensor:
        """The centre of the table: (rows * columns, D)."""
        top, left = (self.side - rows) // 2, (self.side - columns) // 2
        table = self.table.view(self.side, self.side, -1)
        return table[top : top + rows, left : left + columns].flatten(0, 1)


def position_table(axis: Tensor, rows: int, columns: int) -> Tensor:
    """The centre (rows, columns, D) of the table whose entry (y, x) is axis[x] then axis[y]; axis is (side, D / 2)."""
    side = axis.shape[0]
    top, left = (side - rows) // 2, (side - columns) // 2
    x = axis[None, left : left + columns].expand(rows, -1, -1)
    y = axis[top : top + rows, None].expand(-1, columns, -1)
    return torch.cat([x, y], dim=-1)
