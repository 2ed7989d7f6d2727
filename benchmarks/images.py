"""Time and memory of decoding a folder of images, of their features, and of a run, as the folder grows tenfold.

    python benchmarks/images.py [--most 100000]

Writes that many synthetic JPEGs of 10 classes with sides of 64 to 160 pixels. Trains `model=tiny` on the first 1,000,
10,000, ... of them, twice: with an empty cache, and with images and features cached. Peak memory is the process's own
memory (RssAnon in /proc, sampled every 20 ms). Pages of mapped files, which the system can reclaim, are in a separate
column.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import results
import torch
from PIL import Image

CLASSES = 10
RUN = ("model=tiny", "epochs=2", "device=cpu", "plots=false", "test=true", "data=image_folder", "cache_dir=cache")


def write_images(folder: Path, start: int, stop: int) -> None:
    """Write the images with numbers start to stop - 1; all are different."""
    for number in range(start, stop):
        draw = np.random.default_rng(number)
        coarse = Image.fromarray(draw.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        size = draw.integers(64, 161, 2).tolist()
        coarse.resize(size).save(folder / str(number % CLASSES) / f"{number}.jpg", quality=85)


def grow(folder: Path, count: int, target: int) -> None:
    """Add images to a folder that has `count`, up to `target`."""
    for label in range(CLASSES):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor() as pool:
        parts = [(start, min(start + 2000, target)) for start in range(count, target, 2000)]
        for future in [pool.submit(write_images, folder, *part) for part in parts]:
            future.result()


def run(folder: Path, arguments: Sequence[str]) -> tuple[float, float, float, str]:
    """Seconds; peaks of own memory and of mapped files, in MB; and the output of a run."""
    words = [sys.executable, "-m", "tuner.train", *RUN, f"data.root={folder}/images", *arguments]
    start, own, files = time.perf_counter(), 0, 0
    with (folder / "output.txt").open("w+") as output:
        process = subprocess.Popen(words, cwd=folder, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text()
            sizes = {name: int(kb) for name, kb in re.findall(r"Rss(Anon|File):\s+(\d+) kB", status)}
            own, files = max(own, sizes.get("Anon", 0)), max(files, sizes.get("File", 0))
            time.sleep(0.02)
        seconds = time.perf_counter() - start
        output.seek(0)
        printed = output.read()
    if process.returncode:
        sys.exit(printed)
    return seconds, own / 1000, files / 1000, printed


def arguments() -> argparse.ArgumentParser:
    parser = results.parser(__doc__)
    parser.add_argument("--most", type=int, default=100_000)
    return parser


def main() -> None:
    args = arguments().parse_args()
    counts = [100] if args.smallest else [10**n for n in range(3, 10) if 10**n <= args.most]
    header = ["images", "decoded, images/s", "features, images/s", "the run, from nothing, s", "peak memory, MB"]
    rows, written = [[*header, "cached: s", "peak memory, MB", "pages of mapped files, MB"]], 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for count in counts:
            grow(folder / "images", written, count)
            written = count
            first, again = run(folder, []), run(folder, [])
            rates = [re.findall(rf"{what} in .* \((\d+) images/s\)", first[3])[0] for what in ("decoded", "computed")]
            rows.append([f"{count:,}", *(f"{int(rate):,}" for rate in rates), f"{first[0]:.0f}", f"{first[1]:,.0f}"])
            rows[-1] += [f"{again[0]:.0f}", f"{again[1]:,.0f}", f"{again[2]:,.0f}"]
            print(" | ".join(rows[-1]), flush=True)
    results.write("a folder of images", torch.device("cpu"), rows, f"`{' '.join(RUN)}`, one run each.")


if __name__ == "__main__":
    main()
