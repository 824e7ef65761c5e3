"""Keys and values of rows that are at different positions, for plain transformers.

r: rows; S: tokens of a forward; K: columns that a forward sees; d: head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class RowCache:
    """A cache whose column p holds the key of position p, in every row.

    A forward writes the keys of its tokens over those of earlier forwards. Columns that a row has
    not reached hold finite values of no meaning; the attention mask hides them.
    """

    def __init__(self) -> None:
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._columns = torch.empty(0)
        self._num_columns = 0

    def open(self, positions: Tensor) -> None:
        """Set the positions [r, S] of the next forward's tokens."""
        self._columns = positions
        self._num_columns = int(positions.max()) + 1

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Write keys and values [r, heads, S, d]; returns those of all columns, [.., K, d]."""
        keys, values = self._layers.get(layer_idx) or (key[:, :, :0], value[:, :, :0])
        missing = self._num_columns - keys.shape[2]
        if missing > 0:
            # Doubled, so that a long response is not copied at every block.
            padding = (0, 0, 0, max(missing, keys.shape[2]))
            keys, values = F.pad(keys, padding), F.pad(values, padding)
            self._layers[layer_idx] = keys, values
        # Layers may be on other devices than the rows.
        index = self._columns.to(key.device)[:, None, :, None].expand_as(key)
        keys.scatter_(2, index, key)
        values.scatter_(2, index, value)
        return keys[:, :, : self._num_columns], values[:, :, : self._num_columns]

    def get_seq_length(self) -> int:
        """Zero: the caller passes positions and visibility."""
        return 0

    def keep(self, rows: Tensor) -> None:
        """Keep some of the rows, [r] bool."""
        for layer, (keys, values) in self._layers.items():
            kept = rows.to(keys.device)
            self._layers[layer] = keys[kept], values[kept]
