"""A progress bar: tqdm's at a terminal where it is installed, else a line of text for each case."""

from __future__ import annotations

import sys
import time


class Lines:
    """A line before each case: its number, the time so far, its name."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.start = total, 0, time.monotonic()

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to close."""

    def begin(self, name: str) -> None:
        """A case begins."""
        self.say(f"[{self.done + 1}/{self.total}, {time.monotonic() - self.start:.0f} s] {name}")

    def end(self) -> None:
        """It is done, however it ended."""
        self.done += 1

    def say(self, text: str) -> None:
        """A line that stays."""
        print(text, file=sys.stderr, flush=True)


def bar(total: int) -> Lines:
    """A bar for so many cases."""
    # Where nobody watches, a bar that redraws itself would fill a log with its remains.
    if not sys.stderr.isatty():
        return Lines(total)
    try:
        from tqdm import tqdm
    except ImportError:
        return Lines(total)

    class Redrawn(Lines):
        def __init__(self) -> None:
            super().__init__(total)
            self.bar = tqdm(total=total, unit="case", dynamic_ncols=True)

        def __exit__(self, *_: object) -> None:
            self.bar.close()

        def begin(self, name: str) -> None:
            self.bar.set_description_str(name)

        def end(self) -> None:
            self.bar.update()

        def say(self, text: str) -> None:
            tqdm.write(text)

    return Redrawn()
