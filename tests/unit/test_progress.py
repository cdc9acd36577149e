from toolkit import progress
from toolkit.progress import Progress, duration, tracked


def test_durations():
    assert [duration(s) for s in (0, 59.6, 61, 3600 + 62)] == ["0:00", "1:00", "1:01", "1:01:02"]


def test_lines_carry_share_rate_and_time_left(monkeypatch):
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    lines = []
    report = Progress(100, "images", "digits", write=lines.append)
    for _ in range(20):
        now += 1.0
        report.advance(5, "fine")
    assert len(lines) == 2
    assert lines[0] == "digits: 50/100 images (50 %), 5.0/s, 0:10 left, fine"
    assert lines[1].startswith("digits: 100/100 images (100 %)")


def test_tracked_items_are_counted_and_all_come(capsys):
    assert list(tracked(range(3), "items", "x")) == [0, 1, 2]
    assert capsys.readouterr().err.startswith("x: 3/3 items (100 %)")
