"""The web page of a finished run: how good the model is, on what, and how it was trained."""

import base64
import html
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tuner import InputError, output, plots
from tuner.analysis import finished_run as facts
from tuner.analysis.finished_run import SPLITS, FinishedRun
from tuner.analysis.model_card import title
from tuner.runs import calibration
from tuner.safe_text import printable

log = logging.getLogger("tuner.report")

NAMED = 50  # classes
STYLE = """<style>
body { max-width: 1080px } h1 { margin-bottom: .2rem } p, li { max-width: 75ch }
h2 { border-top: 1px solid #e6e6e6; padding-top: 1.2rem } h1 + h2 { border: 0; padding: 0; margin-top: 1rem }
.cards { display: flex; flex-wrap: wrap; gap: 12px; margin: 1.2rem 0 }
.card { border: 1px solid #e6e6e6; border-radius: 8px; padding: .8rem 1.1rem; flex: 1 1 200px; background: #fafbfc }
.card b { display: block; font-size: 1.9rem; line-height: 1.3; font-weight: 600; font-variant-numeric: tabular-nums }
.card span { display: block; color: #666; font-size: 13px }
.pictures { display: flex; flex-wrap: wrap; gap: 16px; align-items: flex-start }
.pictures img { flex: 1 1 440px; min-width: 0; max-width: 100% }
.pictures img.one { flex: 0 1 auto; max-width: min(100%, 760px); max-height: 560px }
.images { display: flex; flex-wrap: wrap; gap: 12px }
.images figure { margin: 0; width: 118px; font-size: 12px; line-height: 1.35; overflow-wrap: anywhere }
.images img { width: 116px; image-rendering: pixelated; border: 1px solid #ccc; display: block; margin-bottom: 4px }
figcaption i { color: #b34700; font-style: normal } figcaption small { color: #666 }
.facts th { position: static; font-weight: normal; color: #666; vertical-align: top }
.facts th, .facts td { white-space: normal; overflow-wrap: anywhere }
pre { background: #f6f7f8; border-radius: 6px; padding: .8rem 1rem } summary { cursor: pointer; margin: 1rem 0 }
</style>"""


def write(path: Path, run: FinishedRun) -> None:
    """Write the page of a run."""
    sections = [(heading, body) for heading, body in _sections(run) if body]
    output.page(path, title(run), sections, with_figures=False)


def _sections(run: FinishedRun) -> Iterator[tuple[str, str]]:
    """(heading, HTML) each; a section without content has an empty one."""
    yield "How good it is", STYLE + _summary(run)
    yield "Limitations", _list(facts.limitations(run))
    yield "Data", _facts(facts.data_facts(run)) + _paragraph(facts.test_use(run))
    yield "Training", _pictures(_curves(run))
    yield "Confusion matrix", _pictures(_confusion(run))
    if run.per_class is not None:
        yield f"Classes, the weakest {run.split} accuracy first", output.html_table(run.per_class, run.folder)
    yield f"The most confident mistakes on the {run.split} images", _mistakes(run)
    yield "Calibration", _pictures(_calibration(run))
    yield "All metrics", output.html_table(facts.scores(run), run.folder)
    yield "How to use it", _usage(run)
    yield "How it was trained", _facts(facts.training_facts(run) | facts.versions(run)) + _config(run)
    yield "Licence of the weights", _paragraph(facts.licence(run))


def _summary(run: FinishedRun) -> str:
    names = ", ".join(run.classes[:NAMED]) + (", ..." if len(run.classes) > NAMED else "")
    lines = [facts.purpose(run), f"Classes: {names}."]
    if run.seeds > 1:
        lines.append(f"The test accuracy is the mean of {run.seeds} seeds; tables and pictures are those of the first.")
    cards = "".join(_card(*values) for values in _cards(run))
    parts = [*map(_paragraph, lines), f'<div class="cards">{cards}</div>', _paragraph(facts.comparison(run) or "")]
    return "".join(parts)


def _cards(run: FinishedRun) -> Iterator[tuple[str, str, str]]:
    """What is measured, its value, and a note."""
    for prefix, split in reversed(SPLITS.items()):
        if measured := facts.interval(run, prefix):
            accuracy, images, (low, high) = measured
            note = f"95%: {low:.4f} to {high:.4f}, {images:,} images"
            spread = run.number("test_accuracy_std")
            if prefix == "test" and run.seeds > 1 and spread is not None:
                note += f"; mean of {run.seeds} seeds, standard deviation {spread:.4f}"
            yield f"{split.capitalize()} accuracy", f"{accuracy:.4f}", note
    if found := facts.best_baseline(run):
        metric, name, score, own = found
        if own is None:
            yield "Best baseline", f"{score:.4f}", f"validation {metric}, {name}"
        else:
            yield "Against the best baseline", f"{own - score:+.4f}", f"validation {metric}; {name} {score:.4f}"
    prefix = {split: prefix for prefix, split in SPLITS.items()}[run.split]
    if (error := run.number(f"{prefix}_ece_calibrated")) is not None:
        before, temperature = run.number(f"{prefix}_ece"), run.number("temperature")
        note = f"on {run.split} images"
        if before and temperature:
            note += f"; {before:.4f} before temperature {temperature:.2f}"
        yield "Calibration error", f"{error:.4f}", note


def _card(name: str, value: str, note: str) -> str:
    name, value, note = (html.escape(printable(text)) for text in (name, value, note))
    return f'<div class="card">{name}<b>{value}</b><span>{note}</span></div>'


def _paragraph(text: str) -> str:
    return f"<p>{html.escape(printable(text))}</p>" if text else ""


def _list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(printable(line))}</li>" for line in lines) + "</ul>"


def _facts(values: Mapping[str, Any]) -> str:
    """Names and values, a row each."""
    lines = ((html.escape(printable(str(text))) for text in pair) for pair in values.items())
    rows = (f'<tr><th scope="row">{name}</th><td>{value}</td></tr>' for name, value in lines)
    return f'<table class="facts">{"".join(rows)}</table>'


# Pictures


def _pictures(pngs: Mapping[str, bytes]) -> str:
    """Pictures by what they show, side by side."""
    kind = "one" if len(pngs) == 1 else "several"
    images = (f'<img class="{kind}" src="{_data_url(png)}" alt="{html.escape(alt)}">' for alt, png in pngs.items())
    return f'<div class="pictures">{"".join(images)}</div>' if pngs else ""


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _curves(run: FinishedRun) -> dict[str, bytes]:
    if run.metrics is None:
        return {}
    epoch = int(run.result["saved_epoch"])
    drawn = {"Accuracy by epoch": plots.accuracy(run.metrics, epoch), "Loss by epoch": plots.loss(run.metrics, epoch)}
    return {name: plots.png(figure) for name, figure in drawn.items()}


def _confusion(run: FinishedRun) -> dict[str, bytes]:
    counts = run.confusion_matrix
    if counts is None:
        return {}
    return {"Confusion matrix": plots.png(plots.confusion_matrix(counts, run.classes, run.split))}


def _calibration(run: FinishedRun) -> dict[str, bytes]:
    p = run.predictions
    if p is None:
        return {}
    right = torch.tensor((p["label"] == p["predicted"]).tolist())
    bins = calibration.bins_of(torch.tensor(p["confidence"].tolist(), dtype=torch.float64), right)
    return {"Accuracy by confidence": plots.png(plots.calibration(bins, calibration.error(bins), run.split))}


def _mistakes(run: FinishedRun) -> str:
    """The images of the most confident mistakes; without the data set, their names."""
    mistakes = run.mistakes
    if mistakes is None:
        return ""
    if mistakes.empty:
        return _paragraph(f"Every {run.split} image is classified correctly.")
    shown = mistakes.head(facts.MISTAKES)
    note = f"{len(shown):,} of {len(mistakes):,} mistakes: the label, then the prediction with its probability."
    try:
        pictures = facts.thumbnails(run, shown["image"].tolist())
    except (InputError, OSError) as error:
        pictures = [None] * len(shown)
        reason = printable(" ".join(str(error).split()))
        log.warning("the report has no images: %s", reason)
        note += f" There are no images: {reason}."
    figures = (_figure(row, picture) for row, picture in zip(shown.to_dict("records"), pictures, strict=True))
    return f'{_paragraph(note)}<div class="images">{"".join(figures)}</div>'


def _figure(row: Mapping[Any, Any], picture: bytes | None) -> str:
    label, predicted, name = (html.escape(printable(str(row[key]))) for key in ("label", "predicted", "image"))
    image = f'<img src="{_data_url(picture)}" alt="{label}">' if picture else ""
    caption = f"{label}<br><i>{predicted} {row['confidence']:.3f}</i><br><small>{name}</small>"
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def _usage(run: FinishedRun) -> str:
    found = facts.usage(run)
    if found is None:
        return _paragraph("The run folder has no model.safetensors.")
    return "".join(output.html_text(code) for code in found)


def _config(run: FinishedRun) -> str:
    values = {key: value for key, value in run.config.items() if value is not None}
    return f"<details><summary>The config of the run</summary>{_facts(values)}</details>"
