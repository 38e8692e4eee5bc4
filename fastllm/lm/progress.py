"""How far a long job is, on stderr."""

from __future__ import annotations

import importlib.util
import sys
import time


class ProgressBar:
    """A bar of tqdm on a terminal, where tqdm is installed; a line every tenth elsewhere.

    Parameters
    ----------
    total : int
        The number of things to do.
    first : int
        How many of them were done before.
    """

    def __init__(self, total: int, stream=None, first: int = 0) -> None:
        self.total = total
        self.stream = sys.stderr if stream is None else stream  # None where stderr is closed
        self.start = time.monotonic()
        self.tenth = 10 * first // max(total, 1) - (first == 0)
        self.bar = None
        if self.stream is not None and self.stream.isatty() and importlib.util.find_spec("tqdm") is not None:
            import tqdm

            self.bar = tqdm.tqdm(total=total, initial=first, file=self.stream, dynamic_ncols=True, mininterval=0.2)

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    def update(self, done: int, text: str) -> None:
        """``done`` things are done; ``text`` says more about them."""
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(done - self.bar.n)
            if done >= self.total:
                self.close()
        elif self.stream is not None and 10 * done // self.total > self.tenth:
            self.tenth = 10 * done // self.total
            self.stream.write(f"{done}/{self.total}  {text}\n")
            self.stream.flush()

    def close(self) -> None:
        """Leave the line; what is printed next begins a new one."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
            self.stream = None
