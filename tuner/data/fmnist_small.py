"""The bundled part of Fashion-MNIST: 6,000 of the official training images, 600 per class, as a CSV file.

This command writes it from the original files, and writes the same bytes each time (with the same liblzma):

    python -m tuner.data.fmnist_small --from /usr/share/datasets/fashion-mnist --out tuner/assets/fmnist_small.csv.xz
"""

import argparse
import lzma
from pathlib import Path

import numpy as np

from tuner.data import Data, csv_file, fashion_mnist
from tuner.files import replacing

PATH = Path(__file__).parents[1] / "assets" / "fmnist_small.csv.xz"
PER_CLASS = 600


def load(*, val_share: float = 0.125, test_share: float = 0.2, seed: int = 0) -> Data:
    """The bundled images, uint8 [N, 1, 28, 28]. By default 4,200 for training, 600 for validation, 1,200 for testing.

    test_share: held out, the same rows for every seed.   val_share: of the other images, drawn with `seed`.
    The test images are part of the official *training* split, so results on them are not comparable with published
    results.
    """
    return csv_file.load(PATH, classes=fashion_mnist.CLASSES, val_share=val_share, test_share=test_share, seed=seed)


def write(folder: Path, out: Path) -> None:
    """Draw PER_CLASS images of each class from the official training split and write them as an .xz CSV."""
    samples = fashion_mnist.read(folder, "train")
    images, labels = samples.images.flatten(1).numpy(), samples.labels.numpy()
    order = np.random.RandomState(0).permutation(len(labels))  # numpy never changes RandomState's numbers
    rows = np.concatenate([order[labels[order] == label][:PER_CLASS] for label in range(len(fashion_mnist.CLASSES))])
    lines = [",".join(["label", *(f"pixel{i}" for i in range(1, images.shape[1] + 1))])]
    lines += [
        ",".join(map(str, [labels[row], *images[row].tolist()])) for row in np.random.RandomState(1).permutation(rows)
    ]
    with replacing(out) as file:
        file.write(lzma.compress("\n".join([*lines, ""]).encode(), preset=9 | lzma.PRESET_EXTREME))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the bundled CSV file from the original files of Fashion-MNIST.")
    parser.add_argument("--from", dest="folder", type=Path, required=True, help="folder of the four IDX files")
    parser.add_argument("--out", type=Path, required=True, help="file to write, .csv.xz")
    options = parser.parse_args()
    write(options.folder, options.out)
