"""Two runs on the same images: which images each got right, and whether chance explains the difference."""

import logging
from pathlib import Path
from typing import Any

import pandas as pd

from tuner.runs.table import read_predictions

log = logging.getLogger("tuner.analysis.paired")


def on_the_same_images(a: str | Path, b: str | Path) -> dict[str, Any]:
    """Two runs on the images that both predicted.

    Keys: `split`; `images`, their number; both_right, only_a, only_b and both_wrong, which add up to it; `p_value` of
    McNemar's test; `classes`, a table with the images, accuracies and difference of each class. Without common images
    split, p_value and classes are None.
    """
    both = _common(Path(a), Path(b))
    if both is None:
        return {"split": None, "images": 0, "p_value": None, "classes": None}
    columns = {"class": both.label, "a": both.predicted_a == both.label, "b": both.predicted_b == both.label}
    right = pd.DataFrame(columns)
    means = {"images": ("a", "size"), "a_accuracy": ("a", "mean"), "b_accuracy": ("b", "mean")}
    classes = right.groupby("class").agg(**means).reset_index()
    classes["difference"] = classes.b_accuracy - classes.a_accuracy
    only_a, only_b = int((right.a & ~right.b).sum()), int((right.b & ~right.a).sum())
    counts = {"both_right": int((right.a & right.b).sum()), "only_a": only_a, "only_b": only_b}
    counts["both_wrong"] = len(right) - sum(counts.values())
    return {
        "split": both.split.iloc[0],
        "images": len(both),
        **counts,
        "p_value": mcnemar(only_a, only_b),
        "classes": classes.sort_values("difference", kind="stable", ignore_index=True),
    }


def mcnemar(only_a: int, only_b: int) -> float:
    """The p-value of the exact test of McNemar, Psychometrika 12 (1947), 0..1.

    That is the probability that two equally good classifiers differ at least as much on the same images.
    only_a, only_b: the number of images that one classifier got right and the other did not.
    """
    from scipy.stats import binomtest  # slow to import, and a list of runs does not need it

    n = only_a + only_b
    return float(binomtest(min(only_a, only_b), n).pvalue) if n else 1.0


def _common(a: Path, b: Path) -> pd.DataFrame | None:
    """Both runs' predictions on the images they have in common: test images, else validation images; None if none."""
    tables = []
    for folder in (a, b):
        table = read_predictions(folder)
        if table is None:
            return None
        tables.append(table)
    merged = tables[0].merge(tables[1], on=["split", "image"], suffixes=("_a", "_b"))
    for split in ("test", "validation"):
        both = merged[merged.split == split].rename(columns={"label_a": "label"})
        if len(both) and (both.label == both.label_b).all():
            return both
        if len(both):
            log.info("the %s images of the two runs have different labels: they are not the same data", split)
    log.info("the two runs have predictions for no common images")
    return None


def verdict(both: dict[str, Any], a: str = "a", b: str = "b") -> str:
    """The result of McNemar's test in a sentence.   a, b: what it calls the runs."""
    if both["p_value"] is None:
        return "McNemar's test is not possible: the runs have no predictions for the same images"
    gain = (both["only_b"] - both["only_a"]) / both["images"]
    says = "more than chance explains" if both["p_value"] < 0.05 else "no more than chance explains"
    return (
        f"on the same {both['images']:,} {both['split']} images {b} alone gets {both['only_b']} right, {a} alone "
        f"{both['only_a']}: a difference of {gain:+.4f}, {says} (exact McNemar test, p = {both['p_value']:.2g})"
    )
