"""Tables and sizes for people; the JSON beside them has the figures."""

from collections.abc import Collection, Iterable, Sequence

MIB = 2**20


def mib(size_bytes: float | None, digits: int = 2) -> str:
    """Bytes as MiB with thousands separated; a dash where nothing was measured."""
    return "–" if size_bytes is None else f"{size_bytes / MIB:,.{digits}f}"


def table(header: Sequence[str], rows: Iterable[Sequence[object]], text: Collection[int] = (0,)) -> list[str]:
    """Lines of a Markdown table: the columns numbered in `text` stand left, the others are figures and stand right."""
    align = ["---" if column in text else "---:" for column in range(len(header))]
    return [f"| {' | '.join(map(str, row))} |" for row in (header, align, *rows)]


def page(*lines: str) -> str:
    """The lines as a file's text."""
    return "\n".join(lines) + "\n"
