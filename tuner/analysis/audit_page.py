"""The web page of an audit: what was found, with the images."""

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from tuner import output, plots
from tuner.analysis.findings import Images
from tuner.safe_text import printable

MOST = 200  # images or groups of a section: the page stays a few megabytes
STYLE = """<style>.images { display: flex; flex-wrap: wrap; gap: 8px }
.group { border: 1px solid #e6e6e6; padding: 6px }
figure { margin: 0; width: 128px; font-size: 11px; line-height: 1.3; overflow-wrap: anywhere }
figure img { width: 128px; image-rendering: pixelated; border: 1px solid #999 }</style>"""
NOTES = {  # what a section shows
    "Findings": "The images of each kind, and how many of them audit.csv suggests to leave out (exclude: yes).",
    "Classes that are confused": "Images of a label that a head which was not trained on them takes for another class, "
    "and their share of the images with this label.",
    "Labels by class": "wrong_labels is the estimated share of a class's labels that are wrong (confident learning).",
    "copies": "A box holds images that show the same. The number is what differs after they are aligned: 0 is an exact "
    "copy.",
    "label": "The numbers are probabilities by a head that was not trained on the image. All of these are suggested to "
    "exclude: look at them first, as some are right.",
    "outlier": "The number is the distance to the other images of the class, in deviations above the usual one. None "
    "is suggested to exclude.",
}


def write(
    path: Path,
    images: Images,
    table: pd.DataFrame,
    tables: Mapping[str, pd.DataFrame],
    lines: Sequence[str],
    p: Mapping[int, torch.Tensor],
) -> None:
    """Write the page.

    table: of the findings, with `row`.   tables: further ones, by their headings.   lines: of the summary.
    p: out-of-fold probabilities [classes] of the images that were judged, by their row.
    """
    sections = [("Summary", STYLE + output.html_text("\n".join(lines)))]
    sections += [(heading, _note(heading) + output.html_table(frame, path.parent)) for heading, frame in tables.items()]
    groups = [part for _, part in table[table.group.notna()].groupby("group", sort=True)]
    parts = [f'<div class="images group">{_figures(images, part, p)}</div>' for part in groups[:MOST]]
    gallery = f'{_note("copies")}<div class="images">{"".join(parts)}</div>'
    sections.append((_heading("Groups of copies", len(groups)), gallery))
    for kind, name in (
        ("label", "Suspected labels, the most suspicious first"),
        ("outlier", "Outliers, the farthest first"),
    ):
        part = table[table.kind == kind]
        gallery = f'{_note(kind)}<div class="images">{_figures(images, part.head(MOST), p)}</div>'
        sections.append((_heading(name, len(part)), gallery))
    output.page(path, "Audit of a data set", sections, with_figures=False)


def _note(section: str) -> str:
    return f"<p>{html.escape(NOTES[section])}</p>"


def _heading(name: str, count: int) -> str:
    return f"{name} ({MOST} of {count:,})" if count > MOST else f"{name} ({count:,})"


def _figures(images: Images, part: pd.DataFrame, p: Mapping[int, torch.Tensor]) -> str:
    return "".join(_figure(images, row, p.get(int(row["row"]))) for row in part.to_dict("records"))


def _figure(images: Images, row: Mapping[Any, Any], p: torch.Tensor | None) -> str:
    classes = images.data.classes
    label, score = str(row["label"]), row["score"]
    lines = [f"{row['split']}: {label}", f"{row['kind']}, {score}", str(row["file"])]
    if row["kind"] == "label" and p is not None:
        suggested = str(row["suggested_label"])
        lines[0] += f" {p[classes.index(label)]:.2f}"
        lines[1] = f"predicted: {suggested} {p[classes.index(suggested)]:.2f}"
    if row["exclude"] == "yes" and row["kind"] != "label":
        lines.append("suggested to exclude")
    caption = "<br>".join(html.escape(printable(line)) for line in lines)
    picture = base64.b64encode(plots.thumbnail(images.pixels(int(row["row"])))).decode()
    return f'<figure><img src="data:image/png;base64,{picture}" alt=""><figcaption>{caption}</figcaption></figure>'
