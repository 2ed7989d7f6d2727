"""A convolution, its bias and the ReLU behind it as one operation, which cuDNN has."""

from collections import Counter
from typing import TypeGuard

import torch
from torch import fx, nn


class ConvReLU(nn.Module):
    """ReLU(conv(x)) on a CUDA device, without gradients: [B, C, H, W] -> [B, out_channels, H', W'].

    The result is rounded once, behind the ReLU; a convolution followed by a ReLU rounds before the bias, too.
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.conv = conv

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W], in the dtype of the weights."""
        conv = self.conv
        assert not isinstance(conv.padding, str)
        size = conv.stride, conv.padding, conv.dilation
        return torch.cudnn_convolution_relu(x, conv.weight, conv.bias, *size, conv.groups)


def fuse_relus(network: nn.Module) -> int:
    """Replace convolutions whose only reader is a ReLU by a ConvReLU, in place. Returns how many.

    network: its traced parts, fx.GraphModules, are changed; it must be in eval mode and on a CUDA device.
    """
    count = 0
    for part in [module for module in network.modules() if isinstance(module, fx.GraphModule)]:
        calls = [node for node in part.graph.nodes if node.op == "call_module"]
        uses = Counter(node.target for node in calls)
        for node in calls:
            conv = part.get_submodule(node.target)
            if not _is_fusible(conv) or len(node.users) != 1:
                continue
            [reader] = node.users
            if reader not in calls or uses[node.target] > 1 or uses[reader.target] > 1:
                continue
            if type(part.get_submodule(reader.target)) is nn.ReLU:
                part.set_submodule(node.target, ConvReLU(conv))
                part.set_submodule(reader.target, nn.Identity())
                count += 1
    return count


def _is_fusible(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    return type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str)
