"""Commands that torchrun starts in several processes: they find each other, the first speaks, one tells of an error."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from resq_compiler.errors import ProcessError, ResqError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@contextlib.contextmanager
def joined(arguments: argparse.Namespace) -> Iterator[ProcessGroup | None]:
    """The process group that torchrun started this process in; None without one.

    Inside, "cuda" and "auto" are the GPU of this process, and all but the first are quiet. Of an error that all processes meet, or
    that the others meet because one ended, one tells: in the others it is marked as told.
    """
    from resq_compiler.util import processes

    if not processes.launched():
        yield None
        return
    arguments.device = _device(arguments.device)
    group = processes.Launched(cuda=arguments.device.startswith("cuda"))
    arguments.quiet = arguments.quiet or group.rank > 0
    try:
        yield group.group
    except (Exception, KeyboardInterrupt) as error:
        if not group.speaks_first():
            raise AlreadyTold from error
        if isinstance(error, KeyboardInterrupt):
            raise ProcessError(
                f"process {group.rank} of {group.size}: stopped by an interruption, or because another process ended; torchrun says which. "
                "With a work directory, finished work is kept: the same command goes on from it"
            ) from error
        raise
    group.leave()


class AlreadyTold(ResqError):
    """Another process said what went wrong."""


def _device(name: str) -> str:
    """The device of this process: one GPU each."""
    import torch

    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return name
