"""What a running matrix shows on a terminal and elsewhere."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from launch.matrix import board as module
from launch.matrix.board import Board
from launch.matrix.cells import Cell, load_matrix

MATRIX = """
name: small
recipe: launch/recipes/digits.yaml
seeds: [0, 1, 2]
cells: [{opt: adamw}, {opt: adamwprune, sparsity: 0.7}]
"""


@pytest.fixture
def cells(tmp_path: Path) -> list[Cell]:
    (tmp_path / "small.yaml").write_text(MATRIX)
    return list(load_matrix(tmp_path / "small.yaml").cells)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def _screen(board: Board, console: Console) -> list[str]:
    with console.capture() as captured:
        console.print(board.table())
    return captured.get().splitlines()


def test_the_table_tells_of_each_cell(cells: list[Cell], clock: list[float]) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=40, color_system=None)
    board = Board("small", cells, console)
    names, epochs = [cell.name for cell in cells], cells[0].config.epochs
    board.was_complete(names[0], "91.50")
    for name in names[1:4]:
        board.started(name, 0)
    board.started(names[4], 5)
    clock[0] += 60.0
    board.reached(names[1], epochs, "93.10")
    board.ended(names[1], fine=True)
    board.ended(names[2], fine=False)
    board.reached(names[3], 3, "")
    lines = _screen(board, console)
    # One cell of 15 epochs and 3 of another took a minute; 12, 10 and 15 are left, of the failed one none.
    assert lines[0].strip() == "small: 2 of 6 cells complete, 1 failed, 2:03 left"
    rows = [[part.strip() for part in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    assert rows == [
        [names[3], "running", f"3/{epochs}", "", "1:00"],
        [names[4], "running", f"5/{epochs}", "", "1:00"],
        [names[2], "FAILED", f"0/{epochs}", "", "1:00"],
        [names[1], "complete", f"{epochs}/{epochs}", "93.10", "1:00"],
        [names[0], "complete", f"{epochs}/{epochs}", "91.50", ""],
        [names[5], "waiting", f"0/{epochs}", "", ""],
    ]


def test_the_table_fits_the_terminal(cells: list[Cell]) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=60, height=11, color_system=None)
    lines = _screen(Board("small", cells, console), console)
    assert len(lines) <= 10
    assert "and 3 more" in lines[-1]
    assert all(len(line) <= 60 for line in lines)


def test_elsewhere_lines_say_the_same(cells: list[Cell], capsys: pytest.CaptureFixture[str]) -> None:
    with Board("small", cells, Console(file=io.StringIO())) as board:
        for cell in cells[:-1]:
            board.was_complete(cell.name, "")
        board.started(cells[-1].name, 2)
        board.reached(cells[-1].name, 0, "")  # it began anew
        board.reached(cells[-1].name, cells[-1].config.epochs, "93.10")
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("small: 90/90 epochs (100 %), ")
    assert f"{cells[-1].name}, top-1 93.10 %" in line
