"""Which video tokens are merged into which, and merging and unmerging tensors; needs torch, and no model.

B: samples, L: tokens, n_d: destinations, r: merged tokens.  A merged sequence keeps the order of its tokens,
so that merging none changes nothing.  No shape depends on values: the GPU is never waited for.
"""

from __future__ import annotations

from functools import cache
from math import ceil, prod

import torch
from torch import Tensor

SCORES = 2**24
"""Most scores held at once: 32 MiB in bfloat16. The second-level cache of an H100 or H200 (50 MB) holds them,
so that the search for the largest does not wait for the memory."""
ROW_MULTIPLE = 128
"""Rows of scores that are computed at once divide by it, as the tiles of matrix products do."""


class Merge:
    """An assignment of L tokens to L - r rows, for each sample of a batch.

    Args:
        best: the destination of each token, as its place in ``destinations``; shape (B, L).
        merged: tokens that are merged into theirs; (B, r).
        destinations: (B, n_d), no two alike, none among ``merged``.
    """

    def __init__(self, best: Tensor, merged: Tensor, destinations: Tensor) -> None:
        batch, tokens = best.shape
        self.batch, self.tokens, self.merged = batch, tokens, merged.shape[1]
        self.kept = tokens - self.merged
        places = torch.ones_like(best).scatter_(1, merged, 0)  # 1: kept
        row = places.cumsum(1).sub_(1)
        # Kept tokens write down where they are; merged ones write to a last place that is cut off.
        written = torch.where(places.bool(), row, self.kept)
        order = torch.arange(tokens, device=best.device).expand(batch, tokens)
        kept = best.new_empty(batch, self.kept + 1).scatter_(1, written, order)[:, : self.kept]
        target = best.gather(1, merged)
        rows = row.gather(1, destinations)
        row.scatter_(1, merged, rows.gather(1, target))
        ones = torch.ones((batch, 1), device=best.device)
        counts = ones.repeat(1, destinations.shape[1]).scatter_add_(
            1, target, ones.expand(batch, self.merged)
        )
        self.kept_tokens = kept
        self.destination_counts = counts
        self.destination_rows = rows
        # From here on as rows of the batch's samples one below the other.
        self._kept = _below(kept, tokens)
        self._merged = _below(merged, tokens)
        self._destinations = _below(destinations, tokens)
        self._target = _below(target, destinations.shape[1])
        self._rows = _below(rows, self.kept)
        self._row = _below(row, self.kept)
        self._share = counts.reciprocal().reshape(-1, 1)

    def merge(self, values: Tensor) -> Tensor:
        """Destinations' means with what is merged into them, other tokens as they are: (B, L, d) to (B, L - r, d).

        Sums are in float32; on a GPU their order, and so their last bit, may differ from call to call.
        """
        flat = values.reshape(self.batch * self.tokens, -1)
        precise = torch.promote_types(values.dtype, torch.float32)
        means = flat.index_select(0, self._destinations).to(precise)
        means.index_add_(0, self._target, flat.index_select(0, self._merged).to(precise))
        result = flat.index_select(0, self._kept)
        result.index_copy_(0, self._rows, means.mul_(self._share).to(values.dtype))
        return result.view(self.batch, self.kept, -1)

    def unmerge(self, values: Tensor) -> Tensor:
        """Every token's row: (B, L - r, d) to (B, L, d)."""
        flat = values.reshape(self.batch * self.kept, -1)
        return flat.index_select(0, self._row).view(self.batch, self.tokens, -1)

    def sizes(self) -> Tensor:
        """Tokens in each row, float32; (B, L - r)."""
        ones = torch.ones((self.batch, self.kept), device=self.destination_counts.device)
        return ones.scatter_(1, self.destination_rows, self.destination_counts)


def _below(index: Tensor, length: int) -> Tensor:
    """``index`` (B, n) into samples of ``length`` rows, as an index (B · n) into all of them."""
    if index.shape[0] == 1:
        return index[0]
    offsets = torch.arange(index.shape[0], device=index.device).mul_(length)
    return (index + offsets[:, None]).reshape(-1)


def match(metric: Tensor, destinations: Tensor, count: int, norms: Tensor | None = None) -> Merge:
    """Merges the ``count`` tokens of each sample that are nearest, by cosine, to a destination.

    Args:
        metric: what is compared; (B, L, m).
        destinations: (B, n_d).
        norms: L2 norms of ``metric``, if known; (B, L), float32.
    """
    with torch.no_grad():
        score, best = nearest(metric, destinations)
        # The nearest destination of a token does not depend on the token's norm, its rank among tokens does.
        cosine = score.float().div_((row_norms(metric) if norms is None else norms).clamp_min(1e-12))
        cosine.scatter_(1, destinations, -torch.inf)
        merged = cosine.topk(count, dim=1, sorted=False).indices
        return Merge(best, merged, destinations)


def nearest(metric: Tensor, destinations: Tensor) -> tuple[Tensor, Tensor]:
    """The largest product of each token with the normalised destinations, and which one that is: (B, L) each.

    At most :data:`SCORES` products are held at once (one row at least).
    """
    batch, tokens, width = metric.shape
    count = destinations.shape[1]
    chosen = metric.reshape(batch * tokens, width).index_select(0, _below(destinations, tokens)).float()
    norms = torch.linalg.vector_norm(chosen, dim=-1, keepdim=True)
    chosen = chosen.div_(norms.clamp_min_(1e-12)).to(metric.dtype).view(batch, count, width)
    best = torch.empty((batch, tokens), dtype=torch.long, device=metric.device)
    score = torch.empty((batch, tokens), dtype=metric.dtype, device=metric.device)
    rows = _rows_at_once(tokens, max(1, SCORES // count))
    for sample in range(batch):
        across = chosen[sample].T
        for start in range(0, tokens, rows):
            part = slice(start, start + rows)
            torch.max(metric[sample, part] @ across, dim=1, out=(score[sample, part], best[sample, part]))
    return score, best


def _rows_at_once(tokens: int, most: int) -> int:
    """Even parts of at most ``most`` rows, rounded up to tiles where that fits."""
    even = ceil(tokens / ceil(tokens / most))
    tiled = ceil(even / ROW_MULTIPLE) * ROW_MULTIPLE
    return tiled if tiled <= most else even


def row_norms(values: Tensor) -> Tensor:
    """L2 norms of the last dimension, in float32."""
    return torch.linalg.vector_norm(values, dim=-1, dtype=torch.float32)


def cell_destinations(grid: tuple[int, int, int], stride: tuple[int, int, int], draw: Tensor) -> Tensor:
    """One token of each cell of ``stride`` of the ``grid``.

    Cells at the end of an axis are cut off there.  ``draw``: numbers from [0, 1), shape (3, cells).  Returns tokens of shape (cells,), in the cells' order.
    """
    begin, extent, weight = _cells(grid, stride, draw.device)
    return begin.add((draw * extent).long()).mul_(weight).sum(0)


@cache
def _cells(
    grid: tuple[int, int, int], stride: tuple[int, int, int], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """First frame, row and column of each cell, how far it goes, and what a step along each axis adds."""
    firsts = [torch.arange(0, size, step) for size, step in zip(grid, stride, strict=True)]
    begin = torch.stack([axis.reshape(-1) for axis in torch.meshgrid(*firsts, indexing="ij")])
    sizes, steps = (torch.tensor(three).reshape(3, 1) for three in (grid, stride))
    extent = torch.minimum(sizes - begin, steps)
    weight = torch.tensor([prod(grid[axis + 1 :]) for axis in range(3)]).reshape(3, 1)
    return begin.to(device), extent.to(device), weight.to(device)


def bin_destinations(norms: Tensor, size: int, draw: Tensor) -> Tensor:
    """One token of each bin of ``size`` tokens that follow each other by norm; the last bin may be smaller.

    Args:
        norms: (B, L).
        draw: numbers from [0, 1), shape (bins,).

    Returns:
        Tokens of shape (B, bins).
    """
    tokens = norms.shape[1]
    begin = torch.arange(0, tokens, size, device=norms.device)
    extent = (tokens - begin).clamp_max_(size)
    return norms.argsort(dim=1).index_select(1, begin + (draw * extent).long())
