"""What a running matrix shows: a table that renews itself on a terminal, plain lines elsewhere. Always on stderr."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from launch.matrix.cells import Cell
from toolkit.log import printable
from toolkit.progress import Progress, duration

_AROUND = 8  # lines of a terminal that are not rows: title, head, borders, caption, and one for the cursor
_STYLES = {"running": "cyan", "FAILED": "bold red", "complete": "green", "waiting": "dim"}  # in the order of their rows


@dataclass
class _Row:
    """A cell; times are those of time.monotonic, of this call."""

    name: str
    epochs: int
    done: int = 0
    state: str = "waiting"
    accuracy: str = ""
    begin: float = 0.0
    end: float = 0.0

    @property
    def took(self) -> str:
        """How long it has been running, or ran; nothing where it did not in this call."""
        return duration((self.end or time.monotonic()) - self.begin) if self.begin else ""


class Board:
    """Is told what becomes of a matrix's cells and shows it; a context manager."""

    def __init__(self, title: str, cells: Sequence[Cell], console: Console | None = None) -> None:
        self._title, self._begin = title, time.monotonic()
        self._rows = {cell.name: _Row(cell.name, cell.config.epochs) for cell in cells}
        self._earlier = 0  # epochs of earlier calls, which say nothing of this one's pace
        self._console = console or Console(stderr=True)
        self._live, self._lines = None, None
        if self._console.is_terminal:
            self._live = Live(console=self._console, get_renderable=self.table, refresh_per_second=1)
        else:
            self._lines = Progress(sum(row.epochs for row in self._rows.values()), "epochs", title)

    def was_complete(self, name: str, accuracy: str) -> None:
        """A cell that an earlier call finished."""
        row = self._rows[name]
        row.state, row.accuracy = "complete", accuracy
        self._skip(name, row.epochs, f"{name} was complete")

    def started(self, name: str, done: int) -> None:
        """A cell's process was started, after `done` epochs of earlier calls."""
        row = self._rows[name]
        row.state, row.begin = "running", time.monotonic()
        self._skip(name, done)

    def reached(self, name: str, done: int, accuracy: str) -> None:
        """A cell has done so many epochs; `accuracy` is its last one in %, empty before the first."""
        row = self._rows[name]
        more = max(0, done - row.done)  # one that began anew counts from where it was
        row.done, row.accuracy = row.done + more, accuracy
        if self._lines and more:
            self._lines.advance(more, f"{name}{f', top-1 {accuracy} %' if accuracy else ''}, running for {row.took}")

    def ended(self, name: str, *, fine: bool) -> None:
        """A cell's process has ended."""
        row = self._rows[name]
        row.state, row.end = "complete" if fine else "FAILED", time.monotonic()

    def table(self) -> Table:
        """As many rows as the terminal has room for: what runs, what failed, what ended last, what comes next."""
        table = Table(title=self._head(), title_justify="left", title_style="bold")
        table.add_column("cell", overflow="ellipsis", no_wrap=True)
        for column in ("state", "epochs", "top-1 %", "time"):
            table.add_column(column, justify="right", no_wrap=True)
        order = list(_STYLES)
        rows = sorted(self._rows.values(), key=lambda row: (order.index(row.state), -row.end))
        shown = rows[: max(1, self._console.height - _AROUND)]
        for row in shown:
            texts = (printable(row.name), row.state, f"{row.done}/{row.epochs}", row.accuracy, row.took)
            table.add_row(*(Text(text, style=_STYLES[row.state]) for text in texts))
        if len(shown) < len(rows):
            table.caption = f"and {len(rows) - len(shown)} more"
        return table

    def _head(self) -> str:
        states = [row.state for row in self._rows.values()]
        counts = f"{states.count('complete')} of {len(states)} cells complete"
        failed = f", {states.count('FAILED')} failed" if "FAILED" in states else ""
        left = sum(row.epochs - row.done for row in self._rows.values() if row.state != "FAILED")
        fresh = sum(row.done for row in self._rows.values()) - self._earlier
        left_s = f", {duration(left * (time.monotonic() - self._begin) / fresh)} left" if fresh else ""
        return f"{self._title}: {counts}{failed}{left_s}"

    def _skip(self, name: str, done: int, note: str = "") -> None:
        self._rows[name].done = done
        self._earlier += done
        if self._lines:
            self._lines.skip(done, note)

    def __enter__(self) -> "Board":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live:
            self._live.stop()
        if self._lines:
            self._lines.close()
