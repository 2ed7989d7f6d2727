"""Export a trained model as one file for other programs: `python -m tuner.export RUN --format onnx|torchscript|pt2`.

The file takes uint8 images [N, C, H, W], for any N, and returns float32 probabilities [N, classes]. Preprocessing and
temperature are included; README.md lists the metadata. The file is written only if it returns the model's
probabilities. With --quantize int8 that holds for the file in float, and the one in int8 is measured against it.
"""

import copy
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tuner import InputError, arguments, artifacts, output, terminal
from tuner.config import of_run
from tuner.data import Data, exclusion
from tuner.data.files.image_file import expand
from tuner.files import replacing
from tuner.inference import model, quantization
from tuner.inference.model import Model
from tuner.networks.blocks import Preprocess
from tuner.runs.result import read_result

log = logging.getLogger("tuner.export")

SUFFIXES = {"onnx": ".onnx", "torchscript": ".torchscript", "pt2": ".pt2"}
TOLERANCE = 1e-4  # largest difference of a probability
IMAGES = 200  # number of images to compare on, at most
Exported = tuple[bytes, Callable[[torch.Tensor], torch.Tensor]]  # the file's content, and a function that runs it


class Fixed(nn.Module):
    """Preprocess for images of one size, exactly. The resize is two matrix products, which every format supports.

    A resize is linear, for rows and columns separately: the resized identity is its matrix.
    """

    def __init__(self, original: Preprocess, height: int, width: int):
        super().__init__()
        self.rows: torch.Tensor
        self.columns: torch.Tensor
        self.mean: torch.Tensor
        self.std: torch.Tensor
        self.resizes = (height, width) != (original.size, original.size)
        for name, length in (("rows", height), ("columns", width)):
            matrix = torch.eye(length)[None, None]
            matrix = F.interpolate(matrix, (original.size, length), mode="bilinear", antialias=True)[0, 0]
            self.register_buffer(name, matrix)  # [size, length]
        self.register_buffer("mean", original.mean.clone())
        self.register_buffer("std", original.std.clone())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [B, 1 or 3, height, width] -> float32 [B, 3, size, size]."""
        x = images.float() / 255
        if self.resizes:
            x = self.rows @ x @ self.columns.t()
        return (x - self.mean) / self.std


def exportable(original: Model) -> Model:
    """A copy of the model, without operations that some format lacks."""
    copied = copy.deepcopy(original)
    for tensor in (*copied.parameters(), *copied.buffers()):
        tensor.data = tensor.data.contiguous()  # torch.export.save warns about channels last
    for module in list(copied.modules()):
        for name, child in module.named_children():
            if isinstance(child, Preprocess):
                setattr(module, name, Fixed(child, *original.input_shape[1:]))
    return copied


def metadata(original: Model) -> dict[str, str]:
    """The metadata of an exported file, each value as JSON."""
    about: dict[str, Any] = {"class_names": original.classes, "input_shape": original.input_shape, "fit": original.fit}
    about |= {"range": original.range, "temperature": original.temperature}
    return {key: json.dumps(value) for key, value in about.items()}


def to_onnx(network: Model, example: torch.Tensor, about: dict[str, str]) -> Exported:
    """The ONNX file, and onnxruntime on the CPU to run it. Raises InputError if a package of the extra is missing.

    example: uint8 [2, *input_shape].   about: metadata of the file.
    """
    if missing := [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]:
        raise InputError(f"--format onnx needs {', '.join(missing)}: pip install 'tuner[onnx]'")
    import onnxruntime

    for name in ("onnx_ir", "onnxscript"):  # they log every node that they simplify
        logging.getLogger(name).setLevel(logging.WARNING)
    shapes = {"images": {0: torch.export.Dim("N")}}
    program = torch.onnx.export(
        network,
        (example,),
        dynamo=True,
        dynamic_shapes=shapes,
        verbose=False,
        input_names=["images"],
        output_names=["probabilities"],
    )
    assert program is not None
    program.model.metadata_props.update(about)
    content: bytes = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return content, lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def to_torchscript(network: Model, example: torch.Tensor, about: dict[str, str]) -> Exported:
    """The traced TorchScript file, and the module loaded from it. Arguments as for to_onnx."""
    with warnings.catch_warnings():  # torch.jit is deprecated, but its format was asked for
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        warnings.filterwarnings("ignore", "`torch.jit", FutureWarning)
        file = io.BytesIO()
        torch.jit.save(torch.jit.trace(network, example, check_trace=False), file, _extra_files=about)
        return file.getvalue(), torch.jit.load(io.BytesIO(file.getvalue()))


def to_pt2(network: Model, example: torch.Tensor, about: dict[str, str]) -> Exported:
    """The file of torch.export, and the module loaded from it. Arguments as for to_onnx."""
    file = io.BytesIO()
    program = torch.export.export(network, (example,), dynamic_shapes={"images": {0: torch.export.Dim("N")}})
    torch.export.save(program, file, extra_files=about)
    return file.getvalue(), torch.export.load(io.BytesIO(file.getvalue())).module()


FORMATS = {"onnx": to_onnx, "torchscript": to_torchscript, "pt2": to_pt2}


def export(original: Model, form: str, images: torch.Tensor) -> tuple[bytes, float, int]:
    """The file's content, the largest difference from the model's probabilities, and how many top classes differ.

    original: in float32, on the CPU.   form: one of FORMATS.   images: to compare on, uint8 [N, *input_shape].
    Raises InputError if a probability differs by more than TOLERANCE, or if the format does not support the network.
    """
    about = metadata(original)
    example = torch.zeros(2, *original.input_shape, dtype=torch.uint8)
    with torch.no_grad(), warnings.catch_warnings():
        for about_torch in (".*LeafSpec.* is deprecated", "The given buffer is not writable"):  # torch 2.11's own code
            warnings.filterwarnings("ignore", about_torch)
        try:
            content, run = FORMATS[form](exportable(original), example, about)
        except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError) as error:
            if isinstance(error, InputError):
                raise
            reason = " ".join(str(error).split())[:300]
            raise InputError(f"--format {form} does not support this network ({reason}): try another format") from error
        sizes = [1, len(images) - 1] if len(images) > 1 else [1]  # two batch sizes, as N must be free
        got = torch.cat([run(batch) for batch in images.split(sizes)])
        wanted = original.predict(images)
    difference, others = float((got - wanted).abs().max()), int((got.argmax(1) != wanted.argmax(1)).sum())
    if not difference <= TOLERANCE:  # also if it is NaN
        raise InputError(
            f"--format {form}: a probability differs by {difference:.2g} from the model's; at most {TOLERANCE:g} is "
            "allowed. No file was written: try another format"
        )
    return content, difference, others


def images_to_check(original: Model, run: str | Path, inputs: list[Path]) -> tuple[torch.Tensor, str]:
    """Images to compare on, uint8 [N, *input_shape], and their source: files, the run's test split, or random."""
    if inputs:
        paths = expand(inputs)[:IMAGES]
        return torch.stack([original.read(path) for path in paths]), "of the files given"
    try:
        test = of_run(model.file_of(run).parent, "data").data.target.build().test.images
        if test.shape[1:] == original.input_shape:
            return test[:IMAGES].clone(), "of the run's test images"
        reason = f"they are {list(test.shape[1:])} now"
    except InputError as error:
        reason = str(error)
    log.info(
        "the run's test images are not available (%s): checking on random ones; --check FILES gives others", reason
    )
    generator = torch.Generator().manual_seed(0)
    shape = (IMAGES, *original.input_shape)
    return torch.randint(256, shape, generator=generator, dtype=torch.uint8), "random images"


def quantized(content: bytes, run: str | Path, original: Model) -> bytes:
    """An ONNX file of a run in int8. Prints what it gains and loses on the validation images, and writes that into it.

    Raises InputError if the run's data is not available, or if too much accuracy is lost.
    """
    import onnx

    data = data_of(run, original)
    generator = torch.Generator().manual_seed(0)
    rows = data.train[torch.randperm(len(data.train), generator=generator)[:IMAGES]]
    result = quantization.to_int8(content, data.pool.images[rows])
    threads = torch.get_num_threads()
    labels = data.pool.labels[data.val]
    before, after = (
        quantization.measure(file, data.pool.images[data.val], labels, threads) for file in (content, result)
    )
    about = quantization.compare(before, after, len(rows), threads)
    lines = [
        f"int8, calibrated on {len(rows):,} training images; {len(data.val):,} validation images, {threads} threads:"
    ]
    for name, measured, file in (("float32", before, content), ("int8", after, result)):
        speed = f"{measured.latency:.1f} ms an image (median of {quantization.LATENCY_RUNS})"
        lines.append(f"  {name:<8} accuracy {measured.accuracy:.4f}, {speed}, {len(file) / 1e6:.1f} MB")
    differ = about["largest_difference"]
    lines.append(
        f"  they agree on {about['agreement']:.2%} of the images; probabilities differ by at most {differ:.4f}"
    )
    output.print_text("\n".join(lines))
    if before.accuracy - after.accuracy > quantization.VISIBLE_LOSS:
        log.warning("int8 loses %.4f of accuracy", before.accuracy - after.accuracy)
    if after.latency > before.latency:
        log.warning("int8 is slower on this CPU: it pays on one with int8 instructions, such as AVX-512 VNNI")
    model_proto = onnx.load_from_string(result)
    model_proto.metadata_props.add(key="quantization", value=json.dumps(about))
    serialized: bytes = model_proto.SerializeToString()
    return serialized


def data_of(run: str | Path, original: Model) -> Data:
    """The data of a run, with the same training and validation images. Raises InputError if it is not available."""
    folder = model.file_of(run).parent
    try:
        data = exclusion.load(of_run(folder, "data").data)
    except InputError as error:
        raise InputError(f"--quantize needs the run's own images, which are not available: {error}") from error
    result = read_result(folder) if (folder / "result.json").exists() else {}
    before = result.get("split_hashes")
    if not isinstance(before, dict) or any(before.get(name) != data.hashes[name] for name in ("train", "val")):
        raise InputError("--quantize needs the images that the run was trained on, and its data has changed since")
    if data.pool.images.shape[1:] != original.input_shape:
        raise InputError(
            f"--quantize: images are {list(data.pool.images.shape[1:])} now, not {list(original.input_shape)}"
        )
    if not result.get("n_val"):
        log.info("the model was trained on the validation images, too: their accuracy shows what int8 loses, no more")
    return data


def main() -> None:
    """Write a run's model as one file, and print how far its probabilities are from the model's.

    Raises InputError, and writes nothing, if the exported model differs or --out is not in an existing folder.
    """
    parser = arguments.export()
    args = parser.parse_args()
    if args.quantize and args.format != "onnx":
        parser.error("--quantize needs --format onnx")
    if args.format == "torchscript":
        log.warning("TorchScript is deprecated in PyTorch: use --format pt2, or onnx for other programs")
    source = model.file_of(args.run)
    if args.out is None and artifacts.is_url(args.run):
        raise InputError(f"{args.run} is a copy of a run: say where to write the model, --out FILE")
    suffix = f".{args.quantize}{SUFFIXES[args.format]}" if args.quantize else SUFFIXES[args.format]
    out = args.out or source.with_suffix(suffix)
    if out.is_dir():
        raise InputError(f"--out {out} is a folder: name a file, as in --out {out / ('model' + suffix)}")
    if not out.absolute().parent.is_dir():
        raise InputError(f"--out {out}: there is no folder {out.absolute().parent}")
    original = model.load(args.run, device="cpu", precision="fp32")
    images, what = images_to_check(original, args.run, args.check)
    content, difference, others = export(original, args.format, images)
    if args.quantize:
        content = quantized(content, args.run, original)
    with replacing(out) as file:
        file.write(content)
    shape = ", ".join(map(str, original.input_shape))
    output.print_text(
        f"{out}: uint8 [N, {shape}] -> probabilities [N, {len(original.classes)}], {len(content) / 1e6:.1f} MB"
    )
    what = f"{what}, before it was quantised" if args.quantize else what
    compared = f"probabilities differ by at most {difference:.2g}, the top class of {others:,} images"
    print(f"checked on {len(images):,} {what}: {compared}")


if __name__ == "__main__":
    terminal.command(main)
