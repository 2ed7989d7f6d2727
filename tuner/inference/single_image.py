"""One image file, classified: its probabilities, and a picture of the evidence."""

from dataclasses import dataclass
from pathlib import Path

from tuner import plots
from tuner.inference.evidence import Explainer


@dataclass(frozen=True)
class Classified:
    """probabilities: calibrated, by class.   picture: a PNG of the image, and the evidence for its top class."""

    probabilities: dict[str, float]
    picture: bytes


def classified(explain: Explainer, path: Path) -> Classified:
    """An image file, classified by the model of `explain`. Raises image_file.BrokenImageError if it can't be used."""
    model = explain.model
    image = model.read(path)
    [probabilities] = model.predict(image[None])
    label = int(probabilities.argmax())
    heat = explain(image, label).numpy()
    pixels = image.permute(1, 2, 0).numpy()  # [H, W, C]
    name, p = model.classes[label], float(probabilities[label])
    figure = plots.attention(pixels, heat, path.name, name, p, explain.method)
    return Classified(dict(zip(model.classes, probabilities.tolist(), strict=True)), plots.png(figure))
