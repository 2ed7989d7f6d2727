"""What a trained head should beat: the scores of classifiers that need no tuning, and the lines about them."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tuner.rules import is_number

if TYPE_CHECKING:
    import torch  # a sweep, which starts without it, writes these lines, too

METRICS = {  # of predicted classes
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1 score",
}
SCORES = ("majority_class", "nearest_neighbours", "ridge_regression")


def record(
    objective: str, predictions: Mapping[str, "Mapping[float, torch.Tensor]"], labels: "torch.Tensor", classes: int
) -> dict[str, Any]:
    """`baselines` of result.json: the metric, the score of each of SCORES, `neighbours` (k) and `penalty`.

    objective: of the search; the metric is the accuracy if it needs more than predicted classes.
    predictions: for each of SCORES, by setting, the classes of the validation images, int64 [N]. The best setting
    counts.   labels: int64 [N].
    """
    import torch

    from tuner.runs import metrics

    metric = objective if objective in METRICS else "accuracy"
    values: dict[str, Any] = {"metric": metric}
    chosen: dict[str, float] = {}
    for name, by_setting in predictions.items():
        predicted = torch.nn.functional.one_hot(torch.stack(list(by_setting.values())), classes).float()
        scores = metrics.scores(predicted, labels, [metric])[metric]
        values[name] = max(scores)
        chosen[name] = list(by_setting)[scores.index(values[name])]
    return values | {"neighbours": chosen["nearest_neighbours"], "penalty": chosen["ridge_regression"]}


def of_result(result: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record in a result.json; None if it has none, or one that is damaged."""
    found = result.get("baselines")
    if not isinstance(found, dict) or found.get("metric") not in list(METRICS):
        return None
    numbers = (*SCORES, "neighbours", "penalty", "n_train", "n_train_available")
    return found if all(is_number(found.get(key)) for key in numbers) else None


def by_name(found: Mapping[str, Any]) -> dict[str, float]:
    """The scores of a record, by names for people."""
    names = (
        *("the majority class", f"{found['neighbours']} nearest neighbour{'s' * (found['neighbours'] != 1)}"),
        "ridge regression on the features",
    )
    return dict(zip(names, (found[key] for key in SCORES), strict=True))


def lines(found: Mapping[str, Any], value: object, what: str) -> list[str]:
    """The scores, and a line if `value`, that of `what` in the same metric, is not above all of them."""
    metric, scores = METRICS[found["metric"]], by_name(found)
    text = f"for comparison, validation {metric} of " + ", ".join(f"{name} {v:.4f}" for name, v in scores.items())
    if found["n_train"] < found["n_train_available"]:
        text += f" (from {found['n_train']:,} of {found['n_train_available']:,} training images)"
    best = max(scores, key=lambda name: scores[name])
    if not isinstance(value, int | float) or value > scores[best]:
        return [text]
    return [text, f"{what} does not beat {best}: validation {metric} {value:.4f} against {scores[best]:.4f}"]
