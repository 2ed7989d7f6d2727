"""Find faults in a data set: `python -m tuner.audit [data=NAME] [KEY=VALUE...]`."""

import logging
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import pandas as pd
import torch
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from tuner import DivergedError, InputError, arguments, output, terminal
from tuner.analysis import audit_page, findings
from tuner.analysis.findings import Images
from tuner.analysis.label_errors import LabelErrors, label_errors
from tuner.analysis.paired import mcnemar
from tuner.bank.copies import copies
from tuner.bank.neighbours import distance_within_class, projected
from tuner.config import CONF, RunConfig, parse
from tuner.data import exclusion, summary
from tuner.files import replacing
from tuner.training.folds import fold_numbers
from tuner.training.model_choice import SIZES, with_size
from tuner.training.out_of_fold import FOLDS, out_of_fold
from tuner.training.setup import Setup, setup_of

log = logging.getLogger("tuner.audit")
KINDS = {  # in the summary
    "exact copy": "exact copies",
    "near copy": "near copies",
    "mirror image": "mirror images",
    "label": "suspected labels",
    "outlier": "outliers",
    "left out": "left out already",
}


@dataclass
class Audit:
    """What was found.

    table: findings.COLUMNS and `row`, the image's number in `images`.
    p: out-of-fold probabilities of the training and validation images, `rows` of the pool.
    accuracy: out of fold, see accuracy_without().
    """

    images: Images
    table: pd.DataFrame
    rows: torch.Tensor
    p: torch.Tensor
    errors: LabelErrors
    accuracy: dict[str, Any]

    @property
    def harms(self) -> bool:
        """Whether leaving out what is suggested lowers the accuracy, more than chance explains."""
        without, p_value = self.accuracy["trained_without"], self.accuracy["p_value"]
        return without is not None and without < self.accuracy["trained_on_all"] and p_value < 0.05


def composed(overrides: Sequence[str], folder: Path | None = None) -> RunConfig:
    """The config of a run with these overrides. Raises InputError as tuner.train does.

    folder: of the user's own configs, as of --config-dir.
    """
    own = [f"hydra.searchpath=['file://{folder.absolute()}']"] if folder else []
    if folder and not folder.is_dir():
        raise InputError(f"--config-dir {folder} is not a folder")
    try:
        with hydra.initialize_config_dir(str(CONF)):
            return parse(hydra.compose("train", [*overrides, *own]))
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(" ".join(str(error).split())) from error


def audit(config: RunConfig, setup: Setup) -> Audit:
    """Audit the data of a setup with its network, all of it frozen: copies, labels, outliers."""
    setup = setup if setup.trains_heads_alone else setup.frozen_whole()
    images = Images(setup.data)
    # 1. Copies and outliers, in the feature bank
    pool, test = setup.data.pool, setup.data.test
    vectors = projected([setup.x, setup.x_test] if len(test) else [setup.x], [len(pool), len(test)][: 1 + bool(test)])
    start = time.perf_counter()
    found = copies([pool.images, test.images], images.digests, vectors)
    rows = torch.cat([setup.data.train, setup.data.val]).sort().values
    distance = distance_within_class(vectors[rows], pool.labels[rows])
    log.info("searched %d images for copies and outliers in %.0f s", len(vectors), time.perf_counter() - start)
    # 2. Labels, from out-of-fold predictions
    fold = fold_numbers(pool.labels[rows], found.groups(len(images.labels))[rows], FOLDS, config.seed)
    log_p = out_of_fold(config, setup, rows, fold)
    errors = label_errors(log_p.exp(), pool.labels[rows])
    # 3. The table, and what leaving images out does
    table = findings.duplicates(images, found) + findings.suspected_labels(images, rows, errors)
    table += findings.outliers(images, rows, distance) + findings.left_out(images)
    frame = pd.DataFrame(table, columns=[*findings.COLUMNS, "row"])
    left_out = torch.isin(rows, torch.tensor(frame.row[frame.exclude == "yes"].unique().astype("int64")))
    accuracy = accuracy_without(config, setup, rows, fold, left_out, log_p)
    return Audit(images, frame, rows, log_p.exp(), errors, accuracy)


def accuracy_without(
    config: RunConfig,
    setup: Setup,
    rows: torch.Tensor,
    fold: torch.Tensor,
    left_out: torch.Tensor,
    log_p: torch.Tensor,
) -> dict[str, Any]:
    """Out-of-fold accuracy on the images that stay, of heads trained on all images and of heads trained on those.

    The images that stay were chosen by the predictions of the former, which favours them.
    left_out: bool [N].   log_p: the former's predictions.
    """
    labels, stays = setup.data.pool.labels[rows], ~left_out
    with_all = (log_p.argmax(1) == labels)[stays]
    values: dict[str, Any] = {"images": int(stays.sum()), "trained_on_all": float(with_all.double().mean())}
    least = torch.bincount(labels[stays], minlength=len(setup.data.classes))[labels.unique()].min()
    if not left_out.any() or least < 2:
        return values | {"trained_without": None, "p_value": None}
    without = (out_of_fold(config, setup, rows, fold, left_out).argmax(1) == labels)[stays]
    p_value = mcnemar(int((with_all & ~without).sum()), int((without & ~with_all).sum()))
    return values | {"trained_without": float(without.double().mean()), "p_value": p_value}


def counts(result: Audit) -> pd.DataFrame:
    """A row for each kind of finding: its images, groups, and how many of them are suggested to be left out."""
    by_kind = result.table.groupby("kind")
    rows = [
        {
            "finding": name,
            "images": len(part := by_kind.get_group(kind)) if kind in by_kind.groups else 0,
            "exclude": int((part.exclude == "yes").sum()) if kind in by_kind.groups else 0,
        }
        for kind, name in KINDS.items()
    ]
    return pd.DataFrame(rows)


def sentences(result: Audit) -> list[str]:
    """What the numbers say, as lines."""
    duplicated = result.table[result.table.group.notna()]
    by_group = duplicated.groupby("group")
    lines = []
    if len(duplicated):
        across = int((by_group.split.nunique() > 1).sum())
        conflicts = int((by_group.label.nunique() > 1).sum())
        text = f"{by_group.ngroups:,} groups of copies: {across:,} in several splits, {conflicts:,} with several labels"
        lines.append(text)
    accuracy = result.accuracy
    text = f"accuracy out of fold ({FOLDS} folds) on the {accuracy['images']:,} images that stay: "
    text += f"{accuracy['trained_on_all']:.4f} trained on all images"
    if accuracy["trained_without"] is not None:
        text += (
            f", {accuracy['trained_without']:.4f} without the others (McNemar's test, p = {accuracy['p_value']:.2g})"
        )
    return [*lines, text]


def next_step(result: Audit, overrides: Sequence[str], folder: Path) -> list[str]:
    """The command that trains without the images that are suggested to leave out, if there are any."""
    if result.harms:
        return ["leaving them out makes it worse: look at them before you exclude any"]
    if not (result.table.exclude == "yes").any():
        return []
    path = f"data.exclude={output.near(folder / 'audit.csv')}"
    words = [*(line for line in overrides if not line.startswith("data.exclude=")), path]
    return [f"train without them: python -m tuner.train {shlex.join(words)}"]


def write(result: Audit, overrides: Sequence[str], folder: Path) -> None:
    """Write audit.csv and audit.html into an existing folder."""
    with replacing(folder / "audit.csv") as file:
        file.write(output.cells(result.table[list(findings.COLUMNS)]).to_csv(index=False).encode())
    tables = {
        "Findings": counts(result),
        "Classes that are confused": confused(result),
        "Labels by class": noise(result),
    }
    text = [*summary.lines(result.images.data), *sentences(result), *next_step(result, overrides, folder)]
    audit_page.write(folder / "audit.html", result.images, result.table, tables, text, shares(result))


def shares(result: Audit) -> dict[int, torch.Tensor]:
    """The out-of-fold probabilities of each image that was judged, by its number."""
    return dict(zip(result.rows.tolist(), result.p, strict=True))


def confused(result: Audit) -> pd.DataFrame:
    """The classes that are taken for each other most often, out of fold."""
    labels = result.images.labels[result.rows]
    return findings.confusions(result.p.argmax(1), labels, result.images.data.classes)


def noise(result: Audit) -> pd.DataFrame:
    """Images, and the estimated share of wrong labels, of each class, the worst first."""
    classes, labels = result.images.data.classes, result.images.labels[result.rows]
    images = torch.bincount(labels, minlength=len(classes)).tolist()
    columns = {"class": list(classes), "images": images, "wrong_labels": result.errors.noise.tolist()}
    frame = pd.DataFrame(columns).round(4)
    return frame.sort_values("wrong_labels", ascending=False, kind="stable", ignore_index=True)


def as_json(result: Audit) -> dict[str, Any]:
    """The audit as values for JSON."""
    tables = {"findings": counts(result), "confused": confused(result), "label_noise": noise(result)}
    frames = {name: output.records(table) for name, table in tables.items()}
    return frames | {"accuracy": result.accuracy, "images": output.records(result.table.drop(columns="row"))}


def main() -> None:
    """Audit a data set, write audit.csv and audit.html, and print a summary."""
    args = arguments.audit().parse_intermixed_args()  # options stand anywhere
    config = composed(args.overrides, args.config_dir)
    if args.summary:
        for line in summary.lines(exclusion.load(with_size(config, SIZES[0]).data)):
            output.print_text(line)
        return
    folder = args.out or Path("audit") / time.strftime("%Y-%m-%d_%H-%M-%S")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {folder} can't be a folder: {error.strerror}") from error
    try:
        result = audit(config, setup_of(config, shared=False))
    except DivergedError as error:
        raise InputError(str(error)) from error
    write(result, args.overrides, folder)
    if args.json:
        output.print_json(as_json(result))
        return
    for title, table in {
        "Findings": counts(result),
        "Classes that are confused (out-of-fold predictions)": confused(result),
        "Estimated share of wrong labels by class": noise(result).head(10),
    }.items():
        output.terminal(table, title)
        print()
    for line in sentences(result):
        output.print_text(line)
    output.print_text(f"look at it: {output.near(folder / 'audit.html')}")
    for line in next_step(result, args.overrides, folder):
        output.print_text(line)


if __name__ == "__main__":
    terminal.command(main)
