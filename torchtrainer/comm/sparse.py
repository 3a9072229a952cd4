"""Gradients by rows: what a rank gives for an embedding of which a step uses few rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from torchtrainer.comm.layout import ALIGNMENT_BYTES, RowsPlace

NO_ROWS, DENSE, SPARSE = 0, 1, 2
"""Marks in shared memory for what a rank has given: nothing, a dense gradient, or some rows."""


def form_of(gradient: torch.Tensor | None) -> int:
    """The form in which a gradient is written."""
    if gradient is None:
        return NO_ROWS
    return SPARSE if gradient.is_sparse and gradient.sparse_dim() == 1 else DENSE


def write_rows(slot: torch.Tensor, place: RowsPlace, gradient: torch.Tensor) -> None:
    """Writes a gradient, dense or sparse, to its place in a slot (bytes)."""
    if form_of(gradient) == DENSE:
        dense = gradient.to_dense() if gradient.is_sparse else gradient
        _values(slot, place, place.shape[0]).copy_(dense)
        return
    rows = gradient.coalesce()  # one entry per row, so that there is room for all
    count = rows.indices().shape[1]
    _count(slot, place).fill_(count)
    _numbers(slot, place, count).copy_(rows.indices()[0])
    _values(slot, place, count).copy_(rows.values())


def average_rows(
    slots: Sequence[torch.Tensor], place: RowsPlace, forms: Sequence[int], scales: Sequence[float] | None = None
) -> torch.Tensor:
    """The mean of what the ranks gave, added up in rank order; sparse unless a rank gave a dense gradient.

    Args:
        slots: by rank, as bytes.
        place: of the parameter in each.
        forms: by rank; at least one is not `NO_ROWS`.
        scales: what each is multiplied with; None: nothing is.
    """
    factors = scales or [1.0] * len(slots)
    if DENSE in forms:
        total = torch.zeros(place.shape, dtype=place.dtype)
        for slot, form, factor in zip(slots, forms, factors, strict=True):
            if form == DENSE:
                total += _values(slot, place, place.shape[0]) * factor
            elif form == SPARSE:
                total += _sparse(place, *_rows(slot, place)) * factor
        return total.div_(len(slots))
    rows = [
        (*_rows(slot, place), factor)
        for slot, form, factor in zip(slots, forms, factors, strict=True)
        if form == SPARSE
    ]
    numbers = torch.cat([one for one, _, _ in rows], dim=1)
    values = torch.cat([one * factor if factor != 1.0 else one for _, one, factor in rows])
    return _sparse(place, numbers, values).coalesce().div_(len(slots))


def _rows(slot: torch.Tensor, place: RowsPlace) -> tuple[torch.Tensor, torch.Tensor]:
    count = int(_count(slot, place))
    return _numbers(slot, place, count)[None], _values(slot, place, count)


def _sparse(place: RowsPlace, numbers: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return torch.sparse_coo_tensor(numbers, values, place.shape, check_invariants=False)


def _count(slot: torch.Tensor, place: RowsPlace) -> torch.Tensor:
    return slot[place.begin : place.begin + torch.int64.itemsize].view(torch.int64)


def _numbers(slot: torch.Tensor, place: RowsPlace, count: int) -> torch.Tensor:
    begin = place.begin + ALIGNMENT_BYTES
    return slot[begin : begin + count * torch.int64.itemsize].view(torch.int64)


def _values(slot: torch.Tensor, place: RowsPlace, count: int) -> torch.Tensor:
    row = place.shape[1:].numel()
    return (
        slot[place.values_at : place.values_at + count * row * place.dtype.itemsize]
        .view(place.dtype)
        .view(count, *place.shape[1:])
    )
