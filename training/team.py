"""Work that is split by hand over the processes of a run: evaluation, and Muon's matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Team:
    """This process among those of the run. What is called here must be called by all of them, in the same order."""

    rank: int = 0
    world: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's part of ``items``."""
        return list(items[self.rank :: self.world])

    def gather(self, results: Sequence[T]) -> list[T]:
        """The results for everybody's :meth:`share`, in the order of the items, on every process."""
        if self.world == 1:
            return list(results)
        parts: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(parts, list(results))
        return [parts[i % self.world][i // self.world] for i in range(sum(map(len, parts)))]

    def map_tensors(
        self, function: Callable[[Tensor], Tensor], inputs: Sequence[Tensor], costs: Sequence[float]
    ) -> list[Tensor]:
        """``function`` of every tensor, computed by one process each and handed to the others.

        Args:
            function: keeps shape and dtype.
            inputs: the same on every process.
            costs: of each call, in any unit; the sums are about the same for all processes.
        """
        if self.world == 1:
            return [function(x) for x in inputs]
        owners = spread(costs, self.world)
        outputs = [
            function(x) if owner == self.rank else torch.empty_like(x) for x, owner in zip(inputs, owners, strict=True)
        ]
        for rank in range(self.world):
            mine = [index for index, owner in enumerate(owners) if owner == rank]
            if not mine:
                continue
            flat = torch.cat([outputs[index].flatten() for index in mine])
            torch.distributed.broadcast(flat, src=rank)
            pieces = flat.split([outputs[index].numel() for index in mine])
            for index, piece in zip(mine, pieces, strict=True):
                outputs[index] = piece.view(outputs[index].shape)
        return outputs


ALONE = Team()


def spread(costs: Sequence[float], num_workers: int) -> list[int]:
    """Who does what, so that all finish at about the same time: the longest first, to whom has least to do."""
    loads = [0.0] * num_workers
    owners = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owner = loads.index(min(loads))
        owners[index] = owner
        loads[owner] += costs[index]
    return owners
