"""Progress of long work: a bar on a terminal, plain lines with the same facts elsewhere. Always on stderr."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")
_LINE_EVERY_S = 10.0


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


class Progress:
    """Counts units of work done; shows share, rate and time left.

    `total` units of `unit` are expected, `done` of them are there already. On a terminal tqdm draws a bar; otherwise
    `write` gets a line at most every ten seconds, and one at the end.
    """

    def __init__(
        self, total: int, unit: str, label: str, done: int = 0, write: Callable[[str], None] | None = None
    ) -> None:
        self.total, self.unit, self.label = total, unit, label
        self._write = write or (lambda line: print(line, file=sys.stderr, flush=True))  # noqa: T201
        self._done = self._before = done
        self._begin = self._last_line = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=done, unit=f" {unit}", desc=label, dynamic_ncols=True, leave=False)

    def advance(self, count: int = 1, note: str = "") -> None:
        """Report `count` more units; `note` stands at the end of the bar or line."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
            if note:
                self._bar.set_postfix_str(note)
            return
        now = time.monotonic()
        if now - self._last_line >= _LINE_EVERY_S or self._done >= self.total:
            self._last_line = now
            rate = (self._done - self._before) / max(now - self._begin, 1e-9)
            left = (self.total - self._done) / rate if rate else 0.0
            share = 100 * self._done / max(self.total, 1)
            self._write(
                f"{self.label}: {self._done}/{self.total} {self.unit} ({share:.0f} %), {rate:.1f}/s, "
                f"{duration(left)} left{f', {note}' if note else ''}"
            )

    def skip(self, count: int, note: str = "") -> None:
        """Report units that were there already: they do not count for the rate."""
        self._before += count
        self.advance(count, note)

    def close(self) -> None:
        """Take the bar off the terminal; the end of a `with` does it too."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def tracked(items: Sequence[Item], unit: str, label: str) -> Iterator[Item]:
    """The items one by one, each of which is done when the next is asked for."""
    with Progress(len(items), unit, label) as progress:
        for item in items:
            yield item
            progress.advance()
