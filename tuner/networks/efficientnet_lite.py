"""EfficientNet-Lite0 (Tan and Le, arXiv:1905.11946; the Lite variant by Google), as timm's tf_efficientnet_lite0.

No squeeze-and-excitation, ReLU6 in place of Swish, and TensorFlow's "same" padding, which depends on the image's size.
"""

import re

import torch
import torch.nn.functional as F
from torch import nn

STAGES = (  # kernel, stride of the first layer, expansion, channels, layers
    *((3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3)),
    *((5, 1, 6, 112, 3), (5, 2, 6, 192, 4), (3, 1, 6, 320, 1)),
)
STEM, TOP = 32, 1280  # channels before and after them
EPS = 1e-3  # of batch normalisation, as TensorFlow has it
MEAN = STD = (0.5, 0.5, 0.5)  # pixels in 0..1 become -1..1
TIMM_NAMES = {  # timm's names of layers -> ours, which are those of torchvision's EfficientNets
    r"^conv_stem\.": "features.0.conv.",
    r"^bn1\.": "features.0.bn.",
    r"^conv_head\.": f"features.{len(STAGES) + 1}.conv.",
    r"^bn2\.": f"features.{len(STAGES) + 1}.bn.",
}


class ConvSame(nn.Conv2d):
    """A convolution whose output has ceil(H / stride) rows; odd padding has one more at the bottom and right."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, out, ceil(H / stride), ceil(W / stride)]"""
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        high, wide = (max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in x.shape[-2:])
        return super().forward(F.pad(x, [wide // 2, wide - wide // 2, high // 2, high - high // 2]))


class ConvNorm(nn.Module):
    """Convolution, batch normalisation and, unless it is linear, ReLU6."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1):
        super().__init__()
        self.conv = ConvSame(inputs, outputs, kernel, stride, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=EPS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, inputs, H, W] -> [B, outputs, H / stride, W / stride]"""
        return F.relu6(self.bn(self.conv(x)))


class Layer(nn.Module):
    """An inverted residual: expand, filter each channel, project. Names of its layers are timm's."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        inner = inputs * expansion
        self.expands, self.adds = expansion > 1, stride == 1 and inputs == outputs
        if self.expands:
            self.conv_pw = ConvSame(inputs, inner, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(inner, eps=EPS)
            self.conv_dw = ConvSame(inner, inner, kernel, stride, groups=inner, bias=False)
            self.bn2 = nn.BatchNorm2d(inner, eps=EPS)
            self.conv_pwl = ConvSame(inner, outputs, 1, bias=False)
            self.bn3 = nn.BatchNorm2d(outputs, eps=EPS)
        else:
            self.conv_dw = ConvSame(inner, inner, kernel, stride, groups=inner, bias=False)
            self.bn1 = nn.BatchNorm2d(inner, eps=EPS)
            self.conv_pw = ConvSame(inner, outputs, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(outputs, eps=EPS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, inputs, H, W] -> [B, outputs, H / stride, W / stride]"""
        if self.expands:
            y = F.relu6(self.bn1(self.conv_pw(x)))
            y = self.bn3(self.conv_pwl(F.relu6(self.bn2(self.conv_dw(y)))))
        else:
            y = self.bn2(self.conv_pw(F.relu6(self.bn1(self.conv_dw(x)))))
        return x + y if self.adds else y


class EfficientNetLite0(nn.Module):
    """Images [B, 3, H, W], normalised by MEAN and STD -> logits [B, 1000]. The blocks are features.0 to features.8."""

    def __init__(self) -> None:
        super().__init__()
        blocks: list[nn.Module] = [ConvNorm(3, STEM, 3, 2)]
        channels = STEM
        for kernel, stride, expansion, outputs, layers in STAGES:
            stage = []
            for k in range(layers):
                stage.append(Layer(channels, outputs, kernel, stride if k == 0 else 1, expansion))
                channels = outputs
            blocks.append(nn.Sequential(*stage))
        self.features = nn.Sequential(*blocks, ConvNorm(channels, TOP))
        self.classifier = nn.Linear(TOP, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] -> [B, 1000]"""
        logits: torch.Tensor = self.classifier(self.features(x).mean((2, 3)))
        return logits


def our_name(name: str) -> str:
    """Our name of a tensor that timm names."""
    for timms, ours in TIMM_NAMES.items():
        name = re.sub(timms, ours, name)
    return re.sub(r"^blocks\.(\d+)\.", lambda found: f"features.{int(found[1]) + 1}.", name)
