"""McNemar's exact test, and the images that two runs were both scored on."""

import csv
import itertools
import logging
import time

import pytest
from scipy.stats import binomtest

from tuner.analysis import paired

HEADER = ["split", "image", "label", "predicted", "confidence"]


def scored(folder, rows):
    """A folder whose predictions.csv has the given (split, image, label, predicted)."""
    folder.mkdir(exist_ok=True)
    with (folder / "predictions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([HEADER, *([*row, "0.5000"] for row in rows)])
    return folder


def of(split, answers, start=0):
    """Rows of (label, predicted) for images from `start` on."""
    return [(split, image, *answer) for image, answer in enumerate(answers, start)]


def pair(tmp_path, a, b):
    return paired.on_the_same_images(scored(tmp_path / "a", a), scored(tmp_path / "b", b))


def counts(both):
    return tuple(both[key] for key in ("split", "images", "both_right", "only_a", "only_b", "both_wrong"))


# The test


def test_mcnemar_is_the_binomial_test_of_scipy():
    for a, b in itertools.product([0, 1, 2, 3, 5, 8, 13, 40, 41, 100, 377], repeat=2):
        expected = binomtest(a, a + b, 0.5).pvalue if a + b else 1.0
        assert paired.mcnemar(a, b) == pytest.approx(expected, rel=1e-9), (a, b)
        assert paired.mcnemar(a, b) == paired.mcnemar(b, a)


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [(0, 0, 1), (1, 0, 1), (3, 3, 1), (0, 5, 2 / 32), (0, 6, 2 / 64), (1, 9, 22 / 1024), (4, 5, 1)],
)
def test_mcnemar_by_hand(only_a, only_b, p):
    assert paired.mcnemar(only_a, only_b) == p


def test_mcnemar_of_many_images_is_fast_and_no_overflow():
    start = time.perf_counter()
    assert paired.mcnemar(25_000, 25_000) == 1
    assert paired.mcnemar(24_500, 25_500) == pytest.approx(binomtest(24_500, 50_000, 0.5).pvalue, rel=1e-6)
    assert paired.mcnemar(0, 50_000) == 0  # smaller than any float
    assert time.perf_counter() - start < 5


# The images


def test_a_worked_example(tmp_path):
    # 10 images: both right 5, only a 1, only b 3, both wrong 1
    a = ["cat"] * 5 + ["cat"] + ["dog"] * 3 + ["dog"]
    b = ["cat"] * 5 + ["dog"] + ["cat"] * 3 + ["bird"]
    both = pair(tmp_path, of("test", [("cat", said) for said in a]), of("test", [("cat", said) for said in b]))
    assert counts(both) == ("test", 10, 5, 1, 3, 1)
    assert both["p_value"] == 10 / 16
    assert both["classes"].to_dict("records") == [
        {"class": "cat", "images": 10, "a_accuracy": 0.6, "b_accuracy": 0.8, "difference": pytest.approx(0.2)}
    ]
    assert paired.verdict(both) == (
        "on the same 10 test images b alone gets 3 right, a alone 1: a difference of +0.2000, no more than chance "
        "explains (exact McNemar test, p = 0.62)"
    )
    assert "the best alone gets 3 right, the default alone 1: a difference of +0.2000" in paired.verdict(
        both, "the default", "the best"
    )


@pytest.mark.parametrize(("better", "says"), [(5, "no more than chance"), (6, "more than chance")])
def test_the_verdict_is_at_five_percent(tmp_path, better, says):
    both = pair(tmp_path, of("test", [("x", "y")] * better), of("test", [("x", "x")] * better))
    assert f", {says} explains" in paired.verdict(both)


def test_classes_are_ordered_from_where_a_is_better_to_where_b_is(tmp_path):
    a = of("test", [("same", "same"), ("b", "?"), ("a", "a")])
    b = of("test", [("same", "same"), ("b", "b"), ("a", "?")])
    both = pair(tmp_path, a, b)
    assert list(both["classes"]["class"]) == ["a", "same", "b"]
    assert list(both["classes"].difference) == [-1, 0, 1]


def test_an_image_that_is_listed_twice_counts_once(tmp_path):
    a, b = of("test", [("x", "x"), ("x", "x")]), of("test", [("x", "y"), ("x", "x")])
    assert counts(pair(tmp_path, [*a, a[0]], [*b, b[0]])) == ("test", 2, 1, 1, 0, 0)


RIGHT = [("x", "x")] * 6


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        pytest.param(
            of("validation", RIGHT), of("validation", RIGHT, 4), ("validation", 2), id="other seeds, some shared"
        ),
        pytest.param(of("validation", RIGHT), of("validation", RIGHT, 6), (None, 0), id="other seeds, none shared"),
        pytest.param(*[of("validation", RIGHT) + of("test", RIGHT[:3])] * 2, ("test", 3), id="test first"),
        pytest.param(
            *(of("validation", RIGHT) + of("test", RIGHT), of("validation", RIGHT)), ("validation", 6), id="one tested"
        ),
        pytest.param(of("validation", RIGHT), of("test", RIGHT), (None, 0), id="a trial and a retrained best"),
        pytest.param(of("test", RIGHT), of("test", [("y", "y")] * 6), (None, 0), id="other class names"),
        pytest.param(of("test", RIGHT), of("test", [*RIGHT[:5], ("y", "x")]), (None, 0), id="one label disagrees"),
        pytest.param(
            of("test", RIGHT) + of("validation", RIGHT),
            of("test", [("y", "x")]) + of("validation", RIGHT),
            ("validation", 6),
            id="another test split",
        ),
        pytest.param([], [], (None, 0), id="no rows"),
        pytest.param(of("test", RIGHT), list(reversed(of("test", RIGHT))), ("test", 6), id="another order"),
    ],
)
def test_only_images_that_both_were_scored_on_are_compared(tmp_path, a, b, expected):
    both = pair(tmp_path, a, b)
    assert (both["split"], both["images"]) == expected
    assert (both["p_value"] is None) == (both["classes"] is None) == (expected[0] is None)
    assert ("is not possible" in paired.verdict(both)) == (expected[0] is None)


@pytest.mark.parametrize(
    "name", ["nan", "NA", "null", "1", "007", "1e3", "True", "", " ", "a,b", 'say "x"', "é\n2", "#"]
)
def test_a_class_may_have_any_name(tmp_path, name):
    both = pair(
        tmp_path, of("test", [(name, name), ("other", name)]), of("test", [(name, "other"), ("other", "other")])
    )
    assert counts(both) == ("test", 2, 0, 1, 1, 0)
    assert list(both["classes"]["class"]) == [name, "other"]


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"split,image\ntest,1\n", id="columns missing"),
        pytest.param(b"split,image,label,predicted\ntest,1,x,x\ntest,1,y,x\n", id="an image with two labels"),
        pytest.param(b"\x89PNG\xff\x00\n", id="binary"),
        pytest.param(b'split,image,label,predicted\ntest,1,"x', id="an open quote"),
    ],
)
def test_damaged_predictions_are_logged_and_left_out(tmp_path, caplog, content):
    a, b = scored(tmp_path / "a", of("test", RIGHT)), tmp_path / "b"
    b.mkdir()
    (b / "predictions.csv").write_bytes(content)
    for folders in ((a, b), (b, a)):
        caplog.clear()
        assert paired.on_the_same_images(*folders)["p_value"] is None
        assert f"left out {b / 'predictions.csv'}: " in caplog.text


def test_a_run_without_predictions(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    (tmp_path / "b").mkdir()
    both = paired.on_the_same_images(scored(tmp_path / "a", of("test", RIGHT)), tmp_path / "b")
    assert both == {"split": None, "images": 0, "p_value": None, "classes": None}
    assert "b has no predictions.csv: it is unfinished, or of an older version" in caplog.text
