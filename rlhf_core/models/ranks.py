"""The processes that make an update together: one, or the ranks of a group that shares weights, moments and rows.

Whatever decides something (a sum, a norm, whether a number is finite) is the same on every rank, so that all of them
take the same steps, and none waits for a collective that another one never enters.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from rlhf_core.models.devices import beside
from rlhf_core.ops.finite import first_not_finite

Result = TypeVar("Result")


class Ranks:
    """One process, which has everything to itself. A group answers the same questions for all of its ranks."""

    rank, size = 0, 1

    def share(self, count: int) -> range:
        """Which of so many rows are this rank's; shares differ by one row at most, and may be empty."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def passes(self, rows: int, size: int | None) -> Sequence[Tensor]:
        """Row numbers of this rank's passes, of so many rows at most. All ranks have as many: the last may be empty."""
        mine, largest = self.share(rows), -(-rows // self.size)
        passes = torch.arange(mine.start, mine.stop).split(size or largest)
        missing = -(-largest // (size or largest)) - len(passes)
        return [*passes, *(torch.arange(0) for _ in range(missing))]

    def total(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sums over all ranks, each of which asks for the same names in the same order."""
        return dict(values)

    def largest(self, value: float) -> float:
        """The largest of all ranks' values; infinite where one of them is NaN."""
        return value

    def norm(self, of_mine: float) -> float:
        """The norm of what all ranks have together, from that of this rank's part."""
        return of_mine

    def part(self, tensor: Tensor) -> Tensor:
        """This rank's part of a tensor, in place."""
        return tensor

    def whole(self, tensor: Tensor) -> Tensor:
        """All parts of a tensor, which every rank asks for at the same time."""
        return tensor

    def filled(self, tensor: Tensor) -> Tensor:
        """A tensor of which each rank has filled its share of the rows, and left the others zero."""
        return tensor

    def gathered(self, named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Whole tensors on the CPU, on the first rank; the others help, and get none. What is tied stays tied."""
        kept: dict[int, Tensor] = {}
        found: dict[str, Tensor] = {}
        for name, tensor in named:
            if id(tensor) not in kept:
                kept[id(tensor)] = self._collected(self.whole(tensor.detach()))
            found[name] = kept[id(tensor)]
        return found if self.rank == 0 else {}

    def digests(self, tensors: Sequence[Tensor]) -> list[str]:
        """sha256 of each tensor's bytes."""
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:  # hashing lets go of the interpreter
            return list(threads.map(_digest, tensors))

    def first(self, named: Sequence[tuple[str, Tensor]]) -> str | None:
        """The name of the first tensor, of which this rank has a part, that holds NaN or infinity anywhere."""
        return first_not_finite(named)

    def beside(self, work: Callable[[], Result]) -> AbstractContextManager[Callable[[], Result]]:
        """Do something beside the body, with which it shares nothing. Yields: what gives its result afterwards."""
        return beside(work)

    def _collected(self, tensor: Tensor) -> Tensor:
        return tensor.cpu().contiguous()


class GroupRanks(Ranks):
    """The ranks of the default process group of ``torch.distributed``, each of which has a part of every tensor.

    Args:
        device: of this rank.
    """

    def __init__(self, device: torch.device) -> None:
        import torch.distributed as dist

        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.device = device

    def total(self, values: Mapping[str, float]) -> dict[str, float]:
        """Added up in the order of the ranks."""
        rows = self._of_all(list(values.values()))
        return {name: math.fsum(column) for name, column in zip(values, zip(*rows, strict=True), strict=True)}

    def largest(self, value: float) -> float:
        """Of all ranks."""
        return max(row[0] for row in self._of_all([math.inf if math.isnan(value) else value]))

    def norm(self, of_mine: float) -> float:
        """From the norms of all parts."""
        return math.sqrt(self.total({"squared": of_mine**2})["squared"])

    def part(self, tensor: Tensor) -> Tensor:
        """The local tensor of a DTensor."""
        return cast("Any", tensor).to_local() if hasattr(tensor, "to_local") else tensor

    def whole(self, tensor: Tensor) -> Tensor:
        """The full tensor of a DTensor: a collective."""
        return cast("Any", tensor).full_tensor() if hasattr(tensor, "full_tensor") else tensor

    def filled(self, tensor: Tensor) -> Tensor:
        """In place. A number plus zeros is itself, in whatever order they are added."""
        import torch.distributed as dist

        dist.all_reduce(tensor)
        return tensor

    def digests(self, tensors: Sequence[Tensor]) -> list[str]:
        """One tensor at a time: there is room for parts."""
        return [_digest(self.whole(tensor)) for tensor in tensors]

    def first(self, named: Sequence[tuple[str, Tensor]]) -> str | None:
        """The first of all ranks' findings."""
        names = [name for name, _ in named]
        mine = first_not_finite(named)
        first = -self.largest(-float(len(names) if mine is None else names.index(mine)))
        return None if first == len(names) else names[int(first)]

    def beside(self, work: Callable[[], Result]) -> AbstractContextManager[Callable[[], Result]]:
        """After the body: collectives come in the same order on all ranks."""
        return nullcontext(work)

    def _collected(self, tensor: Tensor) -> Tensor:
        return super()._collected(tensor) if self.rank == 0 else tensor.new_empty(0)

    def _of_all(self, values: Sequence[float]) -> list[list[float]]:
        """Every rank's values. They are gathered and added up by each alike: a reduction may add in any order."""
        import torch.distributed as dist

        mine = torch.tensor(values, dtype=torch.float64, device=self.device)
        rows = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(rows, mine)
        return cast("list[list[float]]", torch.stack(rows).tolist())


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.cpu().reshape(-1).view(torch.uint8).numpy().data).hexdigest()


ALONE = Ranks()
"""The process that computes by itself."""
