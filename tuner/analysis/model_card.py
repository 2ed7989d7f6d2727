"""The model card of a finished run: Markdown, with front matter as the cards of Hugging Face have it."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

import tuner
from tuner.analysis import finished_run as facts
from tuner.analysis.finished_run import SPLITS, FinishedRun
from tuner.files import replacing
from tuner.safe_text import markdown, printable

NAMED = 50  # classes
OWNER = "**To be completed by the owner:**"


def write(path: Path, run: FinishedRun) -> None:
    """Write the card of a run."""
    with replacing(path) as file:
        file.write(card(run).encode())


def card(run: FinishedRun) -> str:
    """The card of a run, as text."""
    front = yaml.safe_dump(front_matter(run), sort_keys=False, allow_unicode=True)
    parts = [
        f"---\n# license: the owner's choice; see Licence below\n{front}---\n",
        f"# {markdown(title(run))}\n\n{markdown(facts.purpose(run))}\n",
        _owner("Intended use", "what it is for, who may use it, and what it must not be used for"),
        _section("Results", [_scores(run), *map(markdown, filter(None, [_tested(run), facts.comparison(run)]))]),
        _section("Limitations", [_bullets(facts.limitations(run))]),
        _section(
            "Training data", [_table(facts.data_facts(run)), markdown(_classes(run)), markdown(facts.test_use(run))]
        ),
        _owner("Origin of the data", "where the images come from, whom they show, and who labelled them"),
        _section("Training", [_table(facts.training_facts(run))]),
        _section("Use", _usage(run)),
        _section("Versions", [_table(facts.versions(run))]),
        _section("Licence", [markdown(facts.licence(run)), f"{OWNER} the licence of this model."]),
        f"Written by tuner {tuner.__version__}, from the files of the run.\n",
    ]
    return "\n".join(parts)


def title(run: FinishedRun) -> str:
    """The title of a run's card and of its page."""
    return f"{run.config.get('model.name', 'Image classifier')} on {facts.data_name(run)}"


def front_matter(run: FinishedRun) -> dict[str, Any]:
    """The metadata of the card."""
    values = []
    for prefix, split in SPLITS.items():
        for metric in ("accuracy", "macro_f1"):
            if (value := run.number(f"{prefix}_{metric}")) is not None:
                name = f"{split.capitalize()} {metric.replace('_', ' ')}"
                values.append((split, {"type": metric.removeprefix("macro_"), "value": round(value, 4), "name": name}))
    dataset = printable(facts.data_name(run))
    results = [
        {
            "task": {"type": "image-classification"},
            "dataset": {"name": dataset, "type": dataset, "split": split},
            "metrics": [metric for of, metric in values if of == split],
        }
        for split in dict(values)
    ]
    front: dict[str, Any] = {"library_name": "tuner", "pipeline_tag": "image-classification"}
    front |= {"tags": ["image-classification", "tuner"]}
    if results:
        front |= {"metrics": sorted({str(metric["type"]) for _, metric in values})}
        front |= {"model-index": [{"name": printable(title(run)), "results": results}]}
    return front


def _tested(run: FinishedRun) -> str | None:
    """The accuracy with its interval, of the test images if there are any."""
    text = []
    for prefix, split in SPLITS.items():
        if measured := facts.interval(run, prefix):
            accuracy, images, (low, high) = measured
            mean = f", mean of {run.seeds} seeds" if prefix == "test" and run.seeds > 1 else ""
            text.append(f"{split} accuracy {accuracy:.4f}{mean} (95%: {low:.4f} to {high:.4f}, {images:,} images)")
    joined = "; ".join(reversed(text))
    return f"{joined[0].upper()}{joined[1:]}." if joined else None


def _scores(run: FinishedRun) -> str:
    frame = facts.scores(run)
    return _rows([str(name) for name in frame], frame.to_numpy().tolist())


def _classes(run: FinishedRun) -> str:
    names = ", ".join(run.classes[:NAMED])
    return f"Classes: {names}" + (f" and {len(run.classes) - NAMED:,} more." if len(run.classes) > NAMED else ".")


def _usage(run: FinishedRun) -> list[str]:
    found = facts.usage(run)
    if found is None:
        return ["The run folder has no model.safetensors."]
    python, commands = found
    return [f"```python\n{python}\n```", f"```sh\n{commands}\n```"]


def _section(heading: str, parts: Iterable[str]) -> str:
    return f"## {heading}\n\n" + "\n\n".join(parts) + "\n"


def _owner(heading: str, what: str) -> str:
    return _section(heading, [f"{OWNER} {what}."])


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {markdown(line)}" for line in lines)


def _table(values: Mapping[str, str]) -> str:
    return _rows(["", ""], [[name, value] for name, value in values.items()])


def _rows(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    cells = ([text if text == "---" else markdown(text) for text in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
