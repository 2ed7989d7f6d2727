"""Checks of a figure as a reader sees it: its title and texts, none of them cut off or overlapping."""

import struct
from itertools import combinations

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from tuner import plots


def title(figure):
    return " ".join(figure.get_suptitle().split())


def note(figure):
    return " ".join(figure.get_supxlabel().split())


def texts(figure):
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def drawn(figure, tmp_path):
    """Save the figure, check the file and that no text is "nan" or "inf", and return the title."""
    assert isinstance(figure, Figure)
    path = tmp_path / "plots" / "figure.png"
    plots.save(figure, path)
    content = path.read_bytes()
    width, height = struct.unpack(">II", content[16:24])
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert content.endswith(b"IEND\xaeB`\x82")
    assert (width, height) == pytest.approx(tuple(150 * figure.get_size_inches()), abs=1)
    assert [file.name for file in path.parent.iterdir()] == ["figure.png"]
    assert not [text for text in texts(figure) if text.lower() in ("nan", "inf") or "nan" in title(figure).lower()]
    return title(figure)


def legible(figure, tmp_path, monkeypatch):
    """drawn(), and also check that each text is inside the figure and that no two texts overlap."""
    boxes, draw = {}, Text.draw

    def watch(text, renderer, *args, **kwargs):
        if text.get_visible() and text.get_text().strip():
            boxes[text] = Text.get_window_extent(text, renderer, dpi=150)
        return draw(text, renderer, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Text, "draw", watch)
        drawn_title = drawn(figure, tmp_path)
    width, height = 150 * figure.get_size_inches()
    for text, box in boxes.items():
        inside = box.x0 > -2 and box.y0 > -2 and box.x1 < width + 2 and box.y1 < height + 2
        assert inside, f"{text.get_text()!r} is cut off"
    for (first, a), (second, b) in combinations(boxes.items(), 2):
        apart = min(a.x1, b.x1) - max(a.x0, b.x0) < 2 or min(a.y1, b.y1) - max(a.y0, b.y0) < 2
        assert apart, f"{first.get_text()!r} overlaps {second.get_text()!r}"
    return drawn_title
