"""All measurements of one GPU in one table: at most 13 minutes on an H100 or H200 with 16 CPU cores.

    python benchmarks/gpu.py [--device auto] [--root FOLDER] [--only PART ...]
    python benchmarks/gpu.py --smallest --results FILE   # 1 to 2 minutes on two CPU cores: shows that every part works

Each part is a process with its own time limit. A part that fails or runs out of time becomes a row that says so, and
the others continue. The table is written after every part. Fashion-MNIST is read from --root or Debian's folder. If it
is missing, the bundled images are used, repeated if a part needs more, and the rows say so.

ceilings     the reference for the shares below: a large copy on the device, in bytes read plus bytes written; and the
             fastest of several matrix products in the precision of training (bfloat16 on a GPU).
tests        python -m pytest -m gpu tests/test_gpu.py
default      python -m tuner.train, the whole process: with an empty cache, then with the features cached.
search       100 trials of hparams_search=optuna at 224 px with an empty cache, and how its time divides. `start` ends
             when trial 0 has its config, `images and network` when it is ready to train. `training` counts an epoch of
             a stack once. `the rest`: reports, pruning, the study, the trials' files.
heads        a training step of K heads on cached features (4,096, width 512, batch 128, fused AdamW) in fit():
             seconds of an epoch divided by its steps. The floor is step_bytes() divided by the copy's bandwidth.
extraction   images/s of features.bank(), from uint8 images to the verified file, and of the network alone on images
             already on the device. 2 x backbone.macs() operations per image.
finetune     all five blocks of VGG16 trained at 64 px, batch 128: without augmentation, and with that of finetune_all.
             6 x backbone.macs() operations per image: the backward pass takes twice as many as the forward pass.
accuracy     experiment=finetune_all, with as many of its epochs as fit into the remaining time, but at least 3.

Repeated measurements are medians with their range, after a warm-up. Runs and searches are done once.
"""

import argparse
import contextlib
import io
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import bank
import results
import torch
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from tuner.bank import features
from tuner.bank.extraction import network_of
from tuner.cache_files import Cache
from tuner.config import CONF, parse
from tuner.data import digests, fashion_mnist, fmnist_small
from tuner.device import choose_device, choose_precision, is_cpu, repeatable, wait
from tuner.runs.result import read_result
from tuner.runs.table import read_metrics
from tuner.training.fit import fit
from tuner.training.heads import Head
from tuner.training.schedules import onecycle
from tuner.training.setup import backbone_of
from tuner.training.spec import Metrics, Spec

# Seconds per part, with imports, which took up to 20 s a process; together less than 13 minutes. `accuracy` also gets
# the time that the others leave.
LIMITS = {"ceilings": 25, "tests": 150, "default": 75, "search": 300, "heads": 40, "extraction": 50, "finetune": 40}
LIMITS["accuracy"] = 75
RESERVE = 5  # a part ends its run so many seconds before its limit, to report the progress
NO_EPOCHS = 30  # seconds of a fine-tuning run besides its epochs: imports, images, the head alone, scores
REPOSITORY = Path(__file__).resolve().parents[1]
ROOT = Path(os.environ.get("TUNER_CACHE", "~/.cache/tuner"), "fashion_mnist")
SMALL = ["model=tiny", "model.last_block=block2", "data=synthetic", "data.n=80"]
FEATURES, WIDTH, CLASSES, BATCH = 4096, 512, 10, 128
Row = list[Any]  # the columns what, figure and beside; then a dict of numbers for later parts


def arguments() -> argparse.ArgumentParser:
    parser = results.parser(__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of the four files of Fashion-MNIST")
    parser.add_argument("--only", nargs="+", choices=LIMITS, metavar="PART", help="only these parts")
    # For the process of a part: its name, the time by which it must end, numbers from earlier parts.
    parser.add_argument("--part", choices=LIMITS, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--numbers", type=json.loads, default={}, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    args = arguments().parse_args()
    args.root = args.root.expanduser().resolve()
    args.files = fashion_mnist_files(args.root)
    device = choose_device(args.device)
    if args.part:
        torch.set_flush_denormal(True)  # as in a run
        for row in PARTS[args.part](args, device):
            print(json.dumps(row), flush=True)
        return
    if is_cpu(device) and args.device == "auto" and not args.smallest:
        sys.exit("benchmarks/gpu.py needs a GPU, and torch sees none: use --device cpu or --smallest")

    table, failed, start, limits = [["what", "figure", "beside"]], False, time.time(), LIMITS
    if args.smallest:
        limits = dict.fromkeys(LIMITS, 300)
        os.environ["OMP_NUM_THREADS"] = "1"  # on a busy CPU, threads of small operations wait for each other
    for name in (name for name in LIMITS if name in (args.only or LIMITS)):
        left = start + sum(limits.values()) - time.time()
        rows, problem = measure(name, args, device, left if name == "accuracy" else min(left, limits[name]))
        if problem:
            rows.append([name, *problem])
            failed = True
        for row in rows:
            args.numbers |= row[3] if len(row) > 3 else {}
            table.append([cell.replace("|", "/") for cell in row[:3]])
            print(" | ".join(table[-1]), flush=True)
        with contextlib.redirect_stdout(io.StringIO()):  # only to the file, which stays if this process is killed
            results.write("one GPU", device, table)
    results.write("one GPU", device, table, f"{source(args)}. All parts took {time.time() - start:.0f} s.")
    sys.exit(failed)


def measure(
    name: str, args: argparse.Namespace, device: torch.device, limit: float
) -> tuple[list[Row], list[str] | None]:
    """Run a part in its own process: (the rows it printed, the problem or None)."""
    command = [sys.executable, str(Path(__file__).resolve()), "--part", name, "--deadline", str(time.time() + limit)]
    command += ["--device", str(device), "--root", str(args.root), "--numbers", json.dumps(args.numbers)]
    command += ["--smallest"] if args.smallest else []
    problem = None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        options = {"cwd": folder, "env": environment(), "text": True, "errors": "replace", "stdin": subprocess.DEVNULL}
        options |= {"process_group": 0}  # its own group, so its child processes can be killed too
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
        try:
            out, err = process.communicate(timeout=limit)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            out, err = process.communicate()
            problem = ["out of time", f"after {limit:.0f} s"]
    if process.returncode and not problem:
        problem = ["failed", last_line(err)]
    print("".join(f"{name}: {line}\n" for line in err.splitlines()[-20:]), end="", file=sys.stderr, flush=True)
    return [json.loads(line) for line in out.splitlines() if line[:2] == '["' and line[-1] == "]"], problem


def environment(**more: str) -> dict[str, str]:
    """The environment of this process, with the repository first in PYTHONPATH."""
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path} | more


def last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no output")


# Shared by parts


def config(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF)):
        return compose("train", list(overrides))


def fashion_mnist_files(root: Path) -> Path | None:
    """The folder with all four files, or None."""
    for folder in (root, root / fashion_mnist.TORCHVISION, fashion_mnist.DEBIAN):
        if all((folder / name).is_file() or (folder / f"{name}.gz").is_file() for name in fashion_mnist.MD5):
            return folder
    return None


def source(args: argparse.Namespace) -> str:
    if args.smallest:
        return "A few synthetic or bundled images"
    return "All of Fashion-MNIST" if args.files else "The bundled images, because Fashion-MNIST is missing"


def data_overrides(args: argparse.Namespace) -> list[str]:
    if args.smallest:
        return SMALL
    return ["data=fashion_mnist", f"data.root={args.files}"] if args.files else ["data=fmnist_small"]


def images(args: argparse.Namespace, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 [count, 1, 28, 28] and labels [count]; repeated if there are fewer."""
    samples = fashion_mnist.read(args.files, "train") if args.files else fmnist_small.load().pool
    times = -(-count // len(samples))  # rounded up
    return samples.images.repeat(times, 1, 1, 1)[:count], samples.labels.repeat(times)[:count]


def train(args: argparse.Namespace, device: torch.device, *words: str) -> float:
    """Seconds of `python -m tuner.train` in this folder, with its cache in ./cache.

    Kills the command and raises TimeoutError if it would outlast the part.
    """
    command = [sys.executable, "-m", "tuner.train", *words, f"device={device}"]
    env = environment(TUNER_CACHE=str(Path("cache").resolve()))
    with Path("log").open("w+", errors="replace") as log:
        start, limit = time.perf_counter(), max(1.0, args.deadline - RESERVE - time.time())
        try:
            done = subprocess.run(command, env=env, stdout=log, stderr=subprocess.STDOUT, timeout=limit)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"not done after {limit:.0f} s") from None
        seconds = time.perf_counter() - start
        log.seek(0)
        text = log.read()
    for line in [line for line in text.splitlines() if " WARNING " in line][:10]:
        print(line, file=sys.stderr)  # for example a step that could not be captured
    if done.returncode:
        raise RuntimeError(last_line(text))
    return seconds


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds until the device has finished the call."""
    wait(device)
    start = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - start


def copy_rates(device: torch.device) -> list[float]:
    """Bytes per second of a large copy on the device, bytes read plus bytes written."""
    x = torch.rand(2**24 if is_cpu(device) else 2**30, device=device)  # float32
    y = torch.empty_like(x)
    return [2 * x.nbytes / timed(lambda: y.copy_(x), device) for _ in range(12)][2:]


def best_product(args: argparse.Namespace, device: torch.device) -> tuple[float, str]:
    products = bank.PRODUCTS[: 1 if args.smallest else None]
    return bank.best_product(products, device, choose_precision("auto", device))


def share_of_peak(rates: list[float], flops: int, args: argparse.Namespace, device: torch.device) -> str:
    """Operations per second at these rates (images/s), and their share of the best matrix product. flops: per image."""
    peak = args.numbers.get("peak") or best_product(args, device)[0]
    share = results.spread([100 * rate * flops / peak for rate in rates], ".3g")
    speed = results.spread([rate * flops / 1e12 for rate in rates], ".3g")
    return f"{speed} TFLOP/s, {share}% of the best matrix product"


def epochs(x: torch.Tensor, labels: torch.Tensor, device: torch.device, *, k: int = 1, **options: Any) -> list[float]:
    """Seconds of five epochs of K heads without validation, after a first epoch in which a GPU captures its graph.

    options: for fit(), such as feature_size, and for the specs.
    """
    seconds: list[float] = []

    def on_epoch(_epoch: int, metrics: Mapping[Spec, Metrics]) -> tuple[Spec, ...]:
        seconds.append(metrics[specs[0]]["seconds"])
        return ()

    sizes = {"num_classes": CLASSES, "feature_size": options.pop("feature_size"), "trunk": options.pop("trunk", None)}
    options = {"epochs": 6, "batch_size": BATCH, "label_smoothing": 0.1} | options
    optimizer, rows = partial(torch.optim.AdamW, lr=1e-4, weight_decay=1e-2, fused=True), torch.arange(len(x))
    specs = [Spec(Head((WIDTH,), 0.3, i), optimizer, onecycle, 0, rows, None, **options) for i in range(k)]
    fit(specs, x, labels, on_epoch=on_epoch, device=device, precision=choose_precision("auto", device), **sizes)
    return seconds[1:]


# The parts. Each yields its rows as soon as it has them.


def ceilings(args: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    rates = copy_rates(device)
    figure = f"{results.spread([rate / 1e12 for rate in rates], '.3g')} TB/s"
    yield ["copy on the device", figure, "bytes read + bytes written", {"bandwidth": max(rates)}]
    peak, shape = best_product(args, device)
    dtype = str(choose_precision("auto", device)).removeprefix("torch.")
    yield [f"best matrix product, {dtype}", f"{peak / 1e12:.3g} TFLOP/s", shape, {"peak": peak}]


def tests(args: argparse.Namespace, _device: torch.device) -> Iterator[Row]:
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/test_gpu.py", "-p", "no:cacheprovider"]
    command += ["--verbosity=-1", *(["--collect-only"] if args.smallest else [])]  # as -q, independent of the config
    done = subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True)
    if done.returncode:
        print(done.stdout[-4000:], done.stderr[-1000:], file=sys.stderr)
        raise RuntimeError(last_line(done.stdout))
    yield ["pytest -m gpu", last_line(done.stdout), ""]


def default(args: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    small = [*SMALL, "epochs=2"] if args.smallest else []
    for name, folder in (("from nothing", "first"), ("features cached", "second")):
        seconds = train(args, device, f"hydra.run.dir={folder}", *small)
        result = read_result(Path(folder))
        beside = f"test accuracy {result['test_accuracy']:.4f} ({result['n_test']:,} images); "
        beside += f"{result['seconds']:.1f} s without imports, {result['seconds_features']:.1f} s of it features"
        yield [f"default run, {name}", f"{seconds:.1f} s", beside]


def search(args: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    trials, words = 100, ["model.image_size=224"]
    if args.smallest:
        trials, words = 2, ["epochs=2", "hydra.launcher.stack=2"]
    words += ["-m", "hparams_search=optuna", f"hydra.sweeper.n_trials={trials}", "study=search", *data_overrides(args)]
    start, late, folder = time.time(), None, Path("multirun/search")
    try:
        train(args, device, *words)
    except TimeoutError as error:
        if not (folder / "1").exists():
            raise
        late = error
    seconds = time.time() - start
    runs = sorted((path for path in folder.iterdir() if path.name.isdecimal()), key=lambda path: int(path.name))
    curves = [read_metrics(run) for run in runs]
    ended = [read_result(run) for run in runs if (run / "result.json").exists()]
    best = read_result(folder / "best") if (folder / "best/result.json").exists() else {}
    name = f"search, {trials} trials" if late is None else f"search, KILLED with {len(ended)} of {trials} trials done"
    states = ", ".join(f"{n} {state}" for state, n in Counter(result["status"] for result in ended).items())
    yield [name, f"{seconds:.1f} s", f"{states}; {sum(map(len, curves)):,} epochs trained; {source(args)}"]

    # Trials of a stack start one after another; each starts when the previous one is ready to train.
    start_times = [(run / ".hydra/config.yaml").stat().st_mtime for run in runs[:2]]
    extraction = sum(result.get("seconds_features", 0) for result in ended)
    stacked = {
        (row.epoch, row.seconds) for curve in curves for row in curve.itertuples()
    }  # an epoch of a stack counts once
    times = {
        "start: imports, Hydra, the study": start_times[0] - start,
        "images and network": max(0.0, start_times[1] - start_times[0] - extraction),
        "features of the training images": extraction,
        "training of the stacks": sum(epoch_seconds for _, epoch_seconds in stacked),
        "last run, with the features of the test images": best.get("seconds", 0.0),
    }
    for what, part in (times | {"the rest": seconds - sum(times.values())}).items():
        yield [f"... {what}", f"{part:.2f} s", f"{part / seconds:.0%}"]
    if late:
        raise late
    value = yaml.safe_load((folder / "optimization_results.yaml").read_text())["best_value"]
    beside = f"test accuracy {best['test_accuracy']:.4f} ({best['n_test']:,} images), standard deviation "
    beside += f"{best['test_accuracy_std']:.4f} of {len(best['seeds'])} seeds"
    yield ["... best validation accuracy", f"{value:.4f}", beside]


def heads(args: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    bandwidth = args.numbers.get("bandwidth") or max(copy_rates(device))
    counts, size, steps = ((1, 2), 256, 4) if args.smallest else ((1, 4, 16, 64), FEATURES, 200)
    x = torch.randn(steps * BATCH, size, device=device).to(choose_precision("auto", device))
    labels = torch.randint(CLASSES, (len(x),), device=device)
    for k in counts:
        times = [1e6 * seconds / steps for seconds in epochs(x, labels, device, k=k, feature_size=size)]  # us per step
        moved = step_bytes(k, size, x.dtype)
        floor = 1e6 * moved / bandwidth
        beside = f"{statistics.median(times) / floor:.3g} times the floor of {floor:,.0f} us ({moved / 1e9:.3g} GB)"
        yield [f"step, K = {k}, {size:,} features", f"{results.spread(times)} us", beside]


def step_bytes(k: int, size: int, dtype: torch.dtype) -> int:
    """Bytes of device memory that a step must move if each operand is read once and each result is written once.

    Counted: 28 bytes per parameter for AdamW, which reads the float32 parameter, gradient and two moments, and writes
    all but the gradient. For each weight of the first layer, 16 more: its bfloat16 copy (4 read, 2 written; 2 read by
    the forward product) and its gradient (2 written by the backward product; 2 read, 4 written as float32). In float32
    these are 8: the weight read forward, the gradient written. And x, read once. Not counted, because they are small or
    may stay in the cache: hidden units, logits, dropout, the copies of the second layer.
    """
    first = k * WIDTH * size
    parameters = first + k * (WIDTH + WIDTH * CLASSES + CLASSES)
    return 28 * parameters + (8 if dtype == torch.float32 else 16) * first + BATCH * size * dtype.itemsize


def extraction(args: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    dtype = choose_precision("auto", device)
    pool, _ = images(args, 64 if args.smallest else 60_000)
    pool_digests = digests(pool)  # a run gets them from reading the images
    for size in (32,) if args.smallest else (64, 224):
        backbone = backbone_of(parse(config(*(SMALL if args.smallest else []), f"model.image_size={size}")))
        batch, flops = backbone.batch_size(device), 2 * backbone.macs()

        def fill(turn: int, n: int = len(pool), size: int = size, backbone=backbone) -> None:
            cache = Cache(Path(f"{size}-{turn}"))  # an empty one for each turn
            features.bank(pool[:n], backbone, cache=cache, device=device, dtype=dtype, digests=pool_digests[:n])

        fill(0, 2 * batch)  # warm-up
        rates = [len(pool) / timed(partial(fill, turn), device) for turn in (1, 2, 3)]
        name = f"extraction of {len(pool):,} images, {size} px"
        beside = share_of_peak(rates, flops, args, device)
        yield [f"{name}, the bank's path", f"{results.spread(rates)} images/s", beside]

        def run_network(network, batches) -> None:
            with torch.inference_mode(), repeatable(device):
                for images in batches:
                    network(images)

        batches = pool.to(device).split(batch)[:8]
        run = partial(run_network, network_of(backbone, device, dtype), batches)
        rates = [sum(map(len, batches)) / timed(run, device) for _ in range(6)][1:]
        beside = share_of_peak(rates, flops, args, device)
        yield [f"... the network alone, batches of {batch:,}", f"{results.spread(rates)} images/s", beside]


def finetune_all(args: argparse.Namespace) -> DictConfig:
    return config("experiment=finetune_all", *(SMALL if args.smallest else []))


def finetune(args: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    cfg = finetune_all(args)
    flops = 6 * backbone_of(parse(cfg)).macs()
    for augmented in (False, True):
        rates = fine_tuning(cfg, args, device, augmented)
        name = "augmented as in finetune_all" if augmented else "no augmentation"
        what = f"all blocks trained, {cfg.model.image_size} px, {name}"
        numbers = {"rate": statistics.median(rates)} if augmented else {}
        yield [what, f"{results.spread(rates)} images/s", share_of_peak(rates, flops, args, device), numbers]


def fine_tuning(cfg: DictConfig, args: argparse.Namespace, device: torch.device, augmented: bool) -> list[float]:
    """Images/s of five epochs that train all blocks."""
    backbone, (batch, steps) = backbone_of(parse(cfg)), (8, 2) if args.smallest else (BATCH, 100)
    x, labels = images(args, steps * batch)
    trunk = backbone.trained_part().to(device)
    options = {"feature_size": backbone.feature_size, "augment": parse(cfg).augment.build() if augmented else None}
    seconds = epochs(x.to(device), labels, device, batch_size=batch, trunk=trunk, **options)
    return [len(x) / s for s in seconds]


def accuracy(args: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    cfg = finetune_all(args)
    rate = args.numbers.get("rate") or statistics.median(fine_tuning(cfg, args, device, augmented=True))
    images_per_epoch = 1.2 * (55_000 if args.files else 4_200)  # with validation and some reserve
    fit_in = int((args.deadline - RESERVE - time.time() - NO_EPOCHS) * rate / images_per_epoch)
    words = ["epochs=1", "head_first=1"] if args.smallest else [f"epochs={max(3, min(cfg.epochs, fit_in))}"]
    words += ["experiment=finetune_all", "plots=false", "hydra.run.dir=run", *data_overrides(args)]
    seconds = train(args, device, *words)
    result, curve = read_result(Path("run")), read_metrics("run")
    beside = f"{result['n_test']:,} test images; validation {result['val_accuracy']:.4f}; {seconds:.0f} s, "
    what = f"experiment=finetune_all, {len(curve)} of its {cfg.epochs} epochs"
    yield [what, f"{result['test_accuracy']:.4f}", f"{beside}{curve.seconds.median():.2f} s an epoch"]


PARTS = {part.__name__: part for part in (ceilings, tests, default, search, heads, extraction, finetune, accuracy)}

if __name__ == "__main__":
    main()
