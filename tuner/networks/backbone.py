"""A network cut in two: a frozen part that runs once per image, and a trained part that runs in every step.

A *block* is a stage of the network, and the *cut* is the block where the frozen part ends. Blocks have the names that
torchvision or timm gives them (`layer3`, `features.6`). VGG and AlexNet are plain lists of layers without named stages;
their blocks are block1, block2, ... as in the VGG paper, and each ends with its max pooling. The network is traced on
the meta device, so blocks and shapes are checked before any weights are read.
"""

import copy
import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from torch import fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from tuner import InputError
from tuner.device import batch_size
from tuner.networks.architectures import check_name, create, library_version
from tuner.networks.blocks import Blocks, JoinedPools, Pool, Preprocess
from tuner.networks.weights import resolve
from tuner.rules import Rule, or_null, shown, whole

# Children of a torchvision network that are plain lists of its stages.
STAGE_LISTS = ("features", "layers", "trunk_output", "blocks", "stages")
# What may follow a stage and still belongs to it: norms, activations, and changes of layout in Swin and ViT
TRAILING_MODULES = (nn.BatchNorm2d, nn.LayerNorm, nn.ReLU, torchvision.ops.Permute)
TRAILING_FUNCTIONS = (F.relu, torch.relu, operator.getitem)


LARGEST = 4096  # pixels of a side


class Block(NamedTuple):
    """Where a block ends in the traced graph, and the shape of its output for one image."""

    node: fx.Node
    shape: tuple[int, ...]  # [C, H, W], or [C] for a vector; [H, W, C] inside Swin, [tokens, C] inside timm's ViT
    channels_last: bool


class Backbone:
    """A network, its cut and its weights. The constructor reads no weights.

    name: a classification network of torchvision, or timm/NAME.
    weights: see tuner.networks.weights.resolve.   seed: of random weights.
    image_size: images are resized to a square with this side, in pixels.
    last_block: the block whose output the head gets; or a list of blocks, whose features are normalised and joined.
    frozen: the last block that is not trained; None trains all. With a list, all blocks are frozen.
    pool: average-pool the map of each used block to pool x pool; None keeps it.
    mean, std: per channel, for pixels in 0..1; None uses those of the weights (ImageNet's for a file).
    Raises InputError for an unknown network, weights or block, for blocks in the wrong order, and for an invalid size
    or pool.
    """

    def __init__(
        self,
        name: str,
        *,
        weights: str | None,
        image_size: int,
        last_block: str | Sequence[str],
        frozen: str | Sequence[str] | None,
        pool: int | None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        seed: int = 0,
    ):
        check_name(name)
        self.name, self.image_size, self.pool = name, image_size, pool
        text = f"a whole number of pixels, at least 1 and at most {LARGEST:,}"
        Rule(whole(1, LARGEST).holds, text).check("model.image_size", image_size)
        Rule(or_null(whole(1)).holds, f"{whole(1).text}, or null for the whole map").check("model.pool", pool)
        self._net = _build(name)
        self._graph, self._limit = _trace(self._net, name, image_size)
        self.blocks = _blocks(self._net, self._graph)
        self.used = self._in_order("last_block", last_block)
        self.last_block = self.used[-1]
        self.frozen = self._cut(frozen)
        self.feature_size = sum(self.size_of(block, pool) for block in self.used)
        self.weights = resolve(name, weights, seed)
        self.mean = _per_channel("mean", self.weights.mean if mean is None else mean)
        self.std = _per_channel("std", self.weights.std if std is None else std)

    def _in_order(self, key: str, given: str | Sequence[str]) -> list[str]:
        """The blocks that a key names, one or a list, in the network's order. Raises InputError for anything else."""
        names = list(given) if _is_list(given) else [given]
        for name in names:
            self._check_block(key, name)
        if not names or len(set(names)) < len(names):
            raise InputError(f"model.{key}={shown(given)} must be a block, or a list of different blocks")
        return [name for name in self.blocks if name in names]

    def _cut(self, frozen: str | Sequence[str] | None) -> str | None:
        """The last block that is not trained. Raises InputError if model.frozen can't be used."""
        if len(self.used) > 1 or _is_list(frozen):
            if frozen is None or self._in_order("frozen", frozen) not in (self.used, [self.last_block]):
                raise InputError(
                    f"model.frozen={shown(frozen)} must be null or one block, at most model.last_block; where that is "
                    "a list, no block is trained: leave model.frozen at its default"
                )
            return self.last_block
        if frozen is None:
            return None
        self._check_block("frozen", frozen)
        block, names = str(frozen), list(self.blocks)
        if names.index(block) > names.index(self.last_block):
            raise InputError(
                f"model.frozen={frozen} comes after model.last_block={self.last_block}, the last block that is "
                f"used; the order is {', '.join(names)}"
            )
        return block

    def _check_block(self, key: str, block: Any) -> None:
        names = list(self.blocks)
        if block in names:
            return
        if not names and not self._limit:
            raise InputError(
                f"model.name={self.name} can't be cut: there is no stage after which everything depends on that "
                "stage's output alone; use another network"
            )
        known_blocks = ", ".join(names) or "none"
        if self._limit:
            raise InputError(
                f"model.{key}={shown(block)} is not a block of {self.name} at model.image_size={self.image_size}; "
                f"known: {known_blocks}; later ones fail ({self._limit}): use the size that the network is made for, "
                "224 for most"
            )
        raise InputError(f"model.{key}={shown(block)} is not a block of {self.name}; known: {known_blocks}")

    def size_of(self, name: str, pool: int | None) -> int:
        """The number of features of a block. Raises InputError if the pool does not fit its output."""
        block = self.blocks[name]
        if len(block.shape) == 2 and pool is not None:
            if pool > 1:
                raise InputError(
                    f"model.pool={pool} does not fit {name}'s {block.shape[0]} tokens; use 1, their "
                    "mean, or null for all of them"
                )
            return block.shape[1]
        channels, *sides = (block.shape[-1], *block.shape[:-1]) if block.channels_last else block.shape
        if pool is None or not sides:
            return channels * math.prod(sides)
        if pool > min(sides):
            raise InputError(
                f"model.pool={pool} does not fit {name}'s map of {sides[0]} x {sides[1]} at "
                f"model.image_size={self.image_size}; use 1 to {min(sides)}, null for the whole map, or larger images"
            )
        return channels * pool**2

    @property
    def key(self) -> dict[str, Any]:
        """Everything that determines the output of the frozen part for given images."""
        return {
            "network": self.name,
            "weights": self.weights.key,
            "block": "+".join(self.used) if self.frozen == self.last_block else self.frozen,
            "pool": self.pool if self.frozen == self.last_block else None,
            "image_size": self.image_size,
            "mean": self.mean,
            "std": self.std,
            **library_version(self.name),
        }

    @property
    def cached_shape(self) -> tuple[int, ...]:
        """Shape of the frozen part's output for one image: [F] if only a head is trained, else the map at the cut."""
        assert self.frozen is not None
        return (self.feature_size,) if self.frozen == self.last_block else self.blocks[self.frozen].shape

    def frozen_part(self, dtype: torch.dtype) -> nn.Sequential:
        """Images uint8 [B, 1 or 3, H, W] -> `dtype` [B, *cached_shape]; eval mode, no gradients. Reads the weights.

        Raises InputError if the weights cannot be read or belong to another network.
        """
        assert self.frozen is not None
        preprocess = Preprocess(self.image_size, self.mean, self.std, dtype)
        used = self.used if self.frozen == self.last_block else [self.frozen]
        [layers] = self._loaded([self._part(None, *(self.blocks[name].node for name in used))])
        pools = [Pool(self.pool, self.blocks[name].channels_last) for name in used]
        pool = [] if self.frozen != self.last_block else pools if len(used) == 1 else [JoinedPools(pools)]
        return nn.Sequential(preprocess, layers.to(dtype), *pool).eval().requires_grad_(False)

    def trained_part(self) -> Blocks | None:
        """The blocks between the cut and the head, float32; reads the weights. None if only a head is trained."""
        if self.frozen == self.last_block:
            return None
        names = list(self.blocks)
        first = 0 if self.frozen is None else names.index(self.frozen) + 1
        ends = [block.node for block in self.blocks.values()]
        indices = range(first, names.index(self.last_block) + 1)
        blocks = self._loaded([self._part(ends[i - 1] if i else None, ends[i]) for i in indices])
        preprocess = Preprocess(self.image_size, self.mean, self.std, torch.float32) if self.frozen is None else None
        pool = Pool(self.pool, self.blocks[self.last_block].channels_last)
        return Blocks(preprocess, blocks, pool)

    def trained_parameters(self) -> int:
        """The number of parameters in trained_part()."""
        if self.frozen == self.last_block:
            return 0
        start = None if self.frozen is None else self.blocks[self.frozen].node
        return sum(p.numel() for p in self._part(start, self.blocks[self.last_block].node).parameters())

    def macs(self, block: str | None = None) -> int:
        """Multiply-adds per image, up to a block; None: up to last_block."""
        with FlopCounterMode(display=False) as counter:
            self._run_on_meta(block or self.last_block)
        return int(counter.get_total_flops()) // 2

    def batch_size(self, device: torch.device) -> int:
        """Images per batch in inference; a batch takes about the same memory for every network and image size."""
        sizes = [3 * self.image_size**2]

        def note(_layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            sizes.append(sum(t.numel() for t in (*inputs, output) if isinstance(t, torch.Tensor)))

        layers = [layer for layer in self._net.modules() if not any(True for _ in layer.children())]
        hooks = [layer.register_forward_hook(note) for layer in layers]
        self._run_on_meta(self.last_block)
        for hook in hooks:
            hook.remove()
        return batch_size(device, max(sizes))

    def _run_on_meta(self, block: str) -> None:
        """Run one image up to a block on the meta device, which computes only shapes."""
        with torch.no_grad():
            image = torch.zeros(1, 3, self.image_size, self.image_size, device="meta")
            self._part(None, self.blocks[block].node)(image)

    def _part(self, start: fx.Node | None, *ends: fx.Node) -> fx.GraphModule:
        """The network after `start` (None: from the images) up to the last of `ends`, on the meta device.

        Its output is that of the end; a tuple for several, which are in order.
        """
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        inside = False
        for node in self._graph.nodes:
            if node is start or (start is None and node.op == "placeholder"):
                copies[node], inside = graph.placeholder("x"), True
            elif inside:
                copies[node] = graph.node_copy(node, lambda n: copies[n])
            if node is ends[-1]:
                break
        outputs = tuple(copies[end] for end in ends)
        graph.output(outputs if len(outputs) > 1 else outputs[0])
        return fx.GraphModule(self._net, graph)

    def _loaded(self, parts: Sequence[nn.Module]) -> list[nn.Module]:
        """Copies of these parts with their weights. The weights are read once."""
        parts = [copy.deepcopy(part) for part in parts]
        expected = {k: v.shape for part in parts for k, v in part.state_dict().items()}
        state = self.weights.load()
        for counter in (k for k in expected if k.endswith("num_batches_tracked")):
            state.setdefault(counter, torch.tensor(0))  # of BatchNorm: absent in old files, unused here
        problems = [f"{k} is missing" for k in expected if k not in state]
        problems += [
            f"{k} is {list(state[k].shape)} where {list(shape)} is expected"
            for k, shape in expected.items()
            if k in state and state[k].shape != shape
        ]
        if problems:
            raise InputError(
                f"model.weights: {self.weights.name} do not fit {self.name}: {problems[0]} "
                f"({len(problems)} of {len(expected)} tensors are wrong); choose the model that they belong to"
            )
        for part in parts:
            part.load_state_dict({k: state[k] for k in part.state_dict()}, assign=True)
            part.to(memory_format=torch.channels_last)
        constants = [(part, name) for part in parts for name, buffer in part.named_buffers() if buffer.is_meta]
        if constants:  # Swin's masks, for example: no weights file holds them, the constructor computes them
            with torch.random.fork_rng(devices=[]):
                buffers = dict(create(self.name, init=False).named_buffers())
            for part, name in constants:
                owner, _, attribute = name.rpartition(".")
                setattr(part.get_submodule(owner), attribute, buffers[name].clone())
        return parts


def block_shapes(name: str, image_size: int) -> dict[str, tuple[int, ...]]:
    """The blocks of a network in order, and the shape of their output for an image: [C, H, W], [tokens, C] or [C].

    Raises InputError for an unknown network, and for one that can't be cut.
    """
    check_name(name)
    net = _build(name)
    blocks = _blocks(net, _trace(net, name, image_size)[0])
    return {
        name: (block.shape[-1], *block.shape[:-1]) if block.channels_last else block.shape
        for name, block in blocks.items()
    }


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _per_channel(key: str, values: Sequence[float]) -> tuple[float, ...]:
    least, rule = (0.0, " above 0") if key == "std" else (-math.inf, "")
    numbers = isinstance(values, Sequence) and all(isinstance(v, int | float) and least < v < math.inf for v in values)
    if not numbers or len(values) != 3:
        raise InputError(f"model.{key}={values} must be three numbers{rule}: red, green and blue, of pixels in 0..1")
    return tuple(float(v) for v in values)


class _NoStorage(TorchFunctionMode):
    """torch.empty, which allocates weights, gives meta tensors. Other tensors are real: RegNet computes its widths."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **{**(kwargs or {}), **({"device": "meta"} if func is torch.empty else {})})


def _build(name: str) -> nn.Module:
    """The network on the meta device, in eval mode."""
    try:
        with _NoStorage():
            return create(name, init=False).eval().to("meta")
    except RuntimeError as error:  # the constructor runs the network to find shapes
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"model.name={name} can't be cut: it can't be created without weights ({reason}); use another network"
        ) from error


def _stages(net: nn.Module) -> list[str]:
    """Names of the modules that tracing treats as single operations."""
    names = []
    for name, child in net.named_children():
        names += [f"{name}.{k}" for k, _ in child.named_children()] if name in STAGE_LISTS else [name]
    return names


class _Tracer(fx.Tracer):
    def __init__(self, leaves: list[str]):
        super().__init__()
        self.leaves = leaves

    def create_args_for_root(
        self,
        root_fn: Any,
        is_module: bool,  # noqa: ARG002 - torch's signature
        concrete_args: Any = None,  # noqa: ARG002 - torch's signature
    ) -> tuple[Any, list[Any]]:
        """Trace the images only; other arguments of the network keep their defaults."""
        return root_fn, [self.root, self.create_proxy("placeholder", "x", (), {})]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: ARG002 - torch's signature
        return module_qualified_name in self.leaves


class _Shapes(fx.Interpreter):
    """Runs a graph and records the output shape of each node."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        n.meta["shape"] = tuple(getattr(result, "shape", ()))[1:]
        return result


def _trace(net: nn.Module, name: str, image_size: int) -> tuple[fx.Graph, str]:
    """The network's graph, with the output shape of each node that runs, and the error of the first node that fails."""
    try:
        graph = _Tracer(_stages(net)).trace(net)
    except Exception as error:  # the network's code can raise anything on a stand-in for images
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"model.name={name} can't be cut: its steps depend on the images ({reason}); use another network"
        ) from error
    try:
        with torch.no_grad():  # some modules of timm store results, which must be copyable
            _Shapes(fx.GraphModule(net, graph)).run(torch.zeros(2, 3, image_size, image_size, device="meta"))
    except (RuntimeError, AssertionError, ValueError) as error:
        return graph, str(error).partition("\n")[0].partition(" but got Proxy")[0]  # a Proxy means nothing to a user
    return graph, ""


def _blocks(net: nn.Module, graph: fx.Graph) -> dict[str, Block]:
    """The stages of a traced network by name, in order."""
    nodes = [n for n in graph.nodes if n.op != "output"]
    modules = {n: net.get_submodule(str(n.target)) for n in nodes if n.op == "call_module"}
    classifier = max(i for i, n in enumerate(nodes) if n in modules and any(True for _ in modules[n].parameters()))
    ends = {}  # index of a stage's node -> the stage's name
    for i, node in enumerate(nodes[:classifier]):
        if node in modules and _is_stage(modules[node]) and len(node.meta.get("shape", ())) > 1 and _is_cut(nodes, i):
            ends[i] = str(node.target)
    if all(isinstance(modules[nodes[i]], nn.MaxPool2d) for i in ends):  # a plain list of layers: VGG, AlexNet
        ends = {i: f"block{k}" for k, i in enumerate(ends, 1)}
    blocks = {}
    for i, name in ends.items():
        while i + 1 < classifier and _is_trailing(nodes[i + 1], modules):
            i += 1
        channels_last = hasattr(net, "permute") and str(nodes[i].target) != "permute"  # torchvision's Swin
        channels_last |= getattr(net, "output_fmt", "NCHW") == "NHWC"  # timm's networks
        blocks[name] = Block(nodes[i], nodes[i].meta["shape"], channels_last)
    return blocks


def _is_stage(module: nn.Module) -> bool:
    return isinstance(module, nn.MaxPool2d) or any(True for _ in module.children())


def _is_cut(nodes: list[fx.Node], i: int) -> bool:
    """Whether everything after node i depends on the images only through node i."""
    before = set(nodes[:i])
    return not any(before & set(n.all_input_nodes) for n in nodes[i + 1 :])


def _is_trailing(node: fx.Node, modules: dict[fx.Node, nn.Module]) -> bool:
    if node.op == "call_module":
        return isinstance(modules[node], TRAILING_MODULES)
    return node.op == "call_function" and node.target in TRAILING_FUNCTIONS
