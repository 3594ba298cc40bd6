"""Progress on stderr: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

LINE_INTERVAL = 10.0  # seconds between lines where there is no terminal


class Progress:
    """A callable (step, done, total), as `compile(progress=...)` takes; close it, or use it in a `with` statement."""

    def __init__(self, quiet: bool = False, stream: TextIO | None = None):
        self.stream = stream or sys.stderr
        self.quiet = quiet
        self.terminal = self.stream.isatty()
        self.began = time.monotonic()
        self.step = ""
        self.next_line = 0.0
        self.bar: Any = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __call__(self, step: str, done: int, total: int) -> None:
        if self.quiet:
            return
        if self.terminal:
            self._draw(step, done, total)
        else:
            self._print(step, done, total)
        self.step = step

    def of(self, step: str) -> Callable[[int, int], None]:
        """A callable (done, total) for one step."""
        return lambda done, total: self(step, done, total)

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _draw(self, step: str, done: int, total: int) -> None:
        if self.bar is None or step != self.step or total != self.bar.total:
            from tqdm import tqdm

            self.close()
            self.bar = tqdm(total=total, desc=step, file=self.stream, leave=False, dynamic_ncols=True, disable=False)
        self.bar.update(done - self.bar.n)

    def _print(self, step: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now < self.next_line:
            return
        self.next_line = now + LINE_INTERVAL
        count = f" {done}/{total}" if total > 1 else ""
        self.stream.write(f"{now - self.began:7.1f} s  {step}{count}\n")
        self.stream.flush()
