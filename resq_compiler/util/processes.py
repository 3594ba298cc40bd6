"""Processes that share a compile through torch.distributed: gloo between CPUs, nccl between GPUs.

    with sharing(group):
        shared = current()
        moment = shared.sum(moment_of(shared.part(windows)))

Windows are split, sums over tokens added up, rows of weights shared out. Where nobody shares there is one process, which has everything.
Decisions that rounding could turn another way elsewhere are those of the first process.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from resq_compiler.errors import ConfigError, ProcessError
from resq_compiler.util import devices
from resq_compiler.util.text import first_line

TIMEOUT = timedelta(hours=6)
"""For a process that hangs; one that died is noticed at once. The longest that others wait is while the first writes calibration text."""
LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun says to each process, and what torch.distributed needs to know."""

Value = TypeVar("Value")
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@dataclass
class Traffic:
    """Bytes of the tensors that this process had a part in sending."""

    moved: int = 0


@dataclass(frozen=True)
class Processes:
    """This process among those that share the work: number `rank` of `size`."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    traffic: Traffic = field(default_factory=Traffic)

    @classmethod
    def of(cls, group: dist.ProcessGroup | None) -> Processes:
        """Those of a process group of torch.distributed; None: this one alone."""
        return cls() if group is None else cls(dist.get_rank(group), dist.get_world_size(group), group)

    @property
    def is_first(self) -> bool:
        """Whether this process writes, and says what all have to say."""
        return self.rank == 0

    def part(self, windows: Tensor) -> Tensor:
        """The windows of this process, of all [n, length]. Raises ConfigError: there are fewer windows than processes."""
        if self.size > len(windows):
            raise ConfigError(
                f"{self.size} processes share {len(windows)} calibration windows; start at most as many processes as windows, or ask for "
                "more (basis_samples, calibration_samples)"
            )
        return windows[self.rank :: self.size]

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes, the same bits in each; on the device that computes now, in the place of the value if it is there."""
        if self.size > 1:
            value = devices.here(value)
            self._call(value.nbytes, lambda: dist.all_reduce(value, group=self.group))
        return value

    def from_first(self, value: Tensor) -> Tensor:
        """The value that the first process has."""
        if self.size > 1:
            value = value.contiguous()
            self._send(value, 0)
        return value

    def agreed(self, value: Value) -> Value:
        """A plain value as the first process has it."""
        held = [value]
        if self.size > 1:
            source = dist.get_global_rank(self._group, 0)
            self._call(0, lambda: dist.broadcast_object_list(held, source, self.group, devices.CPU))
        return held[0]

    def every(self, value: Value) -> list[Value]:
        """The values of all processes, by rank. They are small: they travel as objects."""
        if self.size == 1:
            return [value]
        held: list[Any] = [None] * self.size
        self._call(0, lambda: dist.all_gather_object(held, value, self.group))
        return held

    def tensors_of_first(self, tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
        """The tensors that the first process has, by name, on the CPU; None where it has none."""
        if self.size == 1:
            return None if tensors is None else dict(tensors)
        kinds = self.agreed(None if tensors is None else {name: (t.shape, t.dtype) for name, t in tensors.items()})
        if kinds is None:
            return None
        found = {}
        for name, (shape, dtype) in kinds.items():
            mine = tensors[name] if self.is_first and tensors is not None else torch.empty(shape, dtype=dtype)
            found[name] = self.from_first(mine)
        return found

    def rows(self, count: int, rank: int | None = None) -> slice:
        """Of so many rows those that a process works on: this one, or another."""
        rank = self.rank if rank is None else rank
        return slice(count * rank // self.size, count * (rank + 1) // self.size)

    def join_rows(self, whole: Tensor) -> Tensor:
        """Fill in the rows of a tensor that other processes worked on; each has made its `rows`."""
        for rank in range(self.size if self.size > 1 else 0):
            piece = whole[self.rows(len(whole), rank)]
            if len(piece):
                self._send(piece, rank)
        return whole

    @property
    def _group(self) -> dist.ProcessGroup:
        assert self.group is not None, "one process has no group"
        return self.group

    def _send(self, value: Tensor, rank: int) -> None:
        source = dist.get_global_rank(self._group, rank)
        self._call(value.nbytes, lambda: dist.broadcast(value, source, self.group))

    def _call(self, size: int, collective: Callable[[], object]) -> None:
        self.traffic.moved += size
        try:
            collective()
        except RuntimeError as error:  # what torch.distributed raises when a connection is closed, or at the timeout
            raise ProcessError(
                f"process {self.rank} of {self.size}: another process ended or does not answer ({first_line(error)}); see what it said. "
                "With a work directory, finished work is kept: the same command goes on from it"
            ) from error


ALONE = Processes()
_current = ALONE


@contextlib.contextmanager
def sharing(group: dist.ProcessGroup | None) -> Iterator[Processes]:
    """Inside, the work is shared with the processes of a group; None: it is not."""
    global _current
    before, _current = _current, Processes.of(group)
    try:
        yield _current
    finally:
        _current = before


def shared_with_group(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A function with a keyword `process_group`: while it runs, its work is shared with the processes of that group."""

    @functools.wraps(function)
    def call(*arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
        group = options.get("process_group")
        assert group is None or isinstance(group, dist.ProcessGroup)
        with sharing(group):
            return function(*arguments, **options)

    return call


def current() -> Processes:
    """Who shares the work now."""
    return _current


def require_equal(shared: Processes, about: Mapping[str, Any]) -> None:
    """Raise ConfigError, in every process, unless all of them say the same about their work."""
    first, *others = shared.every(dict(about))
    for rank, other in enumerate(others, 1):
        differ = sorted(key for key in {*first, *other} if first.get(key) != other.get(key))
        if differ:
            raise ConfigError(
                f"process {rank} of {shared.size} differs from process 0 in {', '.join(differ)}: {other.get(differ[0])!r} and "
                f"{first.get(differ[0])!r}; give all of them the same command, model, text and versions"
            )


def on_this_machine() -> int:
    """How many of the processes that share the work run on this machine, as torchrun says; 1 where nobody does."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if current().size > 1 else 1


def launched() -> bool:
    """Whether torchrun, or something that says the same to its processes, started this one."""
    return all(name in os.environ for name in LAUNCHED)


class Launched:
    """The processes that torchrun started, joined: group, and one voice for errors."""

    def __init__(self, cuda: bool) -> None:
        """cuda: whether tensors of GPUs go from one to another. Raises ProcessError: they do not find each other."""
        try:
            self.store, rank, size = next(iter(rendezvous("env://", timeout=TIMEOUT)))
            kinds = "cpu:gloo,cuda:nccl" if cuda else "gloo"
            dist.init_process_group(kinds, store=self.store, rank=rank, world_size=size, timeout=TIMEOUT)
        except (RuntimeError, ValueError) as error:
            raise ProcessError(
                f"the processes of this command did not find each other: {first_line(error)}; start them with torchrun"
            ) from error
        self.group = dist.group.WORLD
        self.rank, self.size = rank, size

    def speaks_first(self) -> bool:
        """Whether nobody has told of an error yet: one is told for all."""
        try:
            return int(self.store.add("resq/errors", 1)) == 1
        except RuntimeError:  # the process that kept the store is gone
            return True

    def leave(self) -> None:
        """All is done."""
        dist.destroy_process_group()
