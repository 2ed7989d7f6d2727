"""An ONNX file in int8: quantised with onnxruntime, and measured against the file it was made from."""

import logging
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tuner import InputError

WARMUP, LATENCY_RUNS = 5, 30  # runs of one image
PER_BATCH = 32
LARGE_LOSS = 0.05  # of accuracy; from here on the file is not written
VISIBLE_LOSS = 0.01  # of accuracy; from here on there is a warning
QUANTIZED = ("Conv", "Gemm", "MatMul")


@dataclass(frozen=True)
class Measured:
    """A file on labelled images.   latency: of one image, in ms, the median of LATENCY_RUNS."""

    accuracy: float
    latency: float
    probabilities: torch.Tensor  # [N, classes]

    @property
    def predicted(self) -> torch.Tensor:
        """The most probable classes, int64 [N]."""
        return self.probabilities.argmax(1)


def to_int8(content: bytes, images: torch.Tensor) -> bytes:
    """An ONNX file, quantised: static, QDQ, weights by channel.

    content: a file that takes uint8 `images`.   images: to calibrate on, uint8 [N, C, H, W].
    The layers before the first convolution stay in float: they are the preprocessing.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches: Iterator[torch.Tensor] = iter(images.split(PER_BATCH))

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch.numpy()}

    metadata = {entry.key: entry.value for entry in onnx.load_from_string(content).metadata_props}
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # onnxruntime logs advice to the root logger
    try:
        with tempfile.TemporaryDirectory() as folder:
            original, prepared, done = (Path(folder) / f"{name}.onnx" for name in ("float", "prepared", "int8"))
            original.write_bytes(content)
            quant_pre_process(original, prepared, skip_symbolic_shape=True)
            quantize_static(
                prepared,
                done,
                Reader(),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=list(QUANTIZED),
                nodes_to_exclude=_preprocessing(onnx.load(prepared)),
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                reduce_range=True,  # 7 bits: sums of 8 bits overflow on a CPU without VNNI, which cost 0.09 of accuracy
            )
            model = onnx.load(done)
    finally:
        root.setLevel(level)
    onnx.helper.set_model_props(model, metadata)
    result: bytes = model.SerializeToString()
    return result


def _preprocessing(model: Any) -> list[str]:
    """The names of the nodes before the first convolution; none if there is no convolution."""
    kinds = [node.op_type for node in model.graph.node]
    first = kinds.index("Conv") if "Conv" in kinds else 0
    return [node.name for node in model.graph.node[:first]]


def measure(content: bytes, images: torch.Tensor, labels: torch.Tensor, threads: int) -> Measured:
    """Score a file, and time it on one image at a time.   images, labels: uint8 [N, C, H, W], int64 [N]."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    outputs = [session.run(None, {"images": batch.numpy()})[0] for batch in images.split(PER_BATCH)]
    scores = torch.from_numpy(np.concatenate(outputs))
    one, times = {"images": images[:1].numpy()}, []
    for _ in range(WARMUP + LATENCY_RUNS):
        start = time.perf_counter()
        session.run(None, one)
        times.append(1000 * (time.perf_counter() - start))
    accuracy = float((scores.argmax(1) == labels).float().mean())
    return Measured(accuracy, statistics.median(times[WARMUP:]), scores)


def compare(before: Measured, after: Measured, n_calibration: int, threads: int) -> dict[str, Any]:
    """What quantisation changed, for the metadata. Raises InputError if too much accuracy is lost."""
    loss = before.accuracy - after.accuracy
    if loss > LARGE_LOSS:
        raise InputError(
            f"--quantize int8: validation accuracy falls from {before.accuracy:.4f} to {after.accuracy:.4f}; a loss of "
            f"at most {LARGE_LOSS} is allowed. No file was written: export without --quantize"
        )
    return {
        "type": "int8, static, QDQ",
        "calibration_images": n_calibration,
        "validation_images": len(before.predicted),
        "accuracy": {"float32": round(before.accuracy, 6), "int8": round(after.accuracy, 6)},
        "agreement": round(float((before.predicted == after.predicted).float().mean()), 6),
        "largest_difference": round(float((before.probabilities - after.probabilities).abs().max()), 4),
        "latency_ms": {"float32": round(before.latency, 3), "int8": round(after.latency, 3)},
        "threads": threads,
    }
