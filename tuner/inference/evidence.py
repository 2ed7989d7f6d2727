"""Evidence maps: where in an image the evidence for a class lies."""

import logging

import torch
import torch.nn.functional as F

from tuner.inference.model import Model
from tuner.networks.blocks import Pool

log = logging.getLogger("tuner.inference.evidence")

WINDOWS = 8  # occlusion: positions of the square along each side
GRAY = 128


class Explainer:
    """Evidence maps of a model: Grad-CAM on its last used block or, if that block outputs no map, occlusion.

    method: which of them, for a caption.
    """

    def __init__(self, model: Model):
        self.model = model
        self.pools = [module for module in model.modules() if isinstance(module, Pool)]  # one a used block
        shapes: list[torch.Size] = []
        handles = [
            pool.register_forward_pre_hook(lambda _module, args: shapes.append(args[0].shape)) for pool in self.pools
        ]
        with torch.inference_mode():
            model(torch.zeros(1, *model.input_shape, dtype=torch.uint8, device=model.device))
        for handle in handles:
            handle.remove()
        shape = list(shapes[-1][1:])
        sides = [] if len(shape) < 3 else shape[:2] if self.pools[-1].channels_last else shape[1:]
        self.occludes = len(sides) < 2 or max(sides) < 2
        self.method = "Occlusion map" if self.occludes else f"Grad-CAM on a map of {sides[0]} x {sides[1]}"
        if self.occludes:
            what = "a vector" if len(sides) < 2 else "a map of 1 x 1"
            log.info("maps: occlusion, as the last used block outputs %s and Grad-CAM needs a larger map", what)

    def __call__(self, image: torch.Tensor, label: int) -> torch.Tensor:
        """uint8 [C, H, W] -> the evidence for class `label`, float32 [H, W] from 0 to 1, on the CPU."""
        heat = (self._occlusion if self.occludes else self._grad_cam)(image[None].to(self.model.device), label)
        return (heat / heat.max().clamp(min=1e-12)).clamp(min=0).cpu()

    def _grad_cam(self, image: torch.Tensor, label: int) -> torch.Tensor:
        """Selvaraju et al., arXiv:1610.02391: a block's channels, weighted by the mean gradient of the logit.

        The maps of several blocks are added, each times its number of positions: a sum is a block's share of the logit.
        """
        kept: list[torch.Tensor] = []

        def keep(_module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
            kept.append(args[0].detach().float().requires_grad_())
            return (kept[-1],)

        handles = [pool.register_forward_pre_hook(keep) for pool in self.pools]
        try:
            with torch.enable_grad():
                gradients = torch.autograd.grad(self.model.logits(image)[0, label], kept)
        finally:
            for handle in handles:
                handle.remove()
        heat = torch.zeros(image.shape[2:], device=image.device)
        for pool, block, gradient in zip(self.pools, kept, gradients, strict=True):
            channels, across = (3, (1, 2)) if pool.channels_last else (1, (2, 3))
            weights = gradient.mean(across, keepdim=True)
            cam = (weights * block.detach()).sum(channels).relu()[None]  # [1, 1, h, w]
            cam = cam * cam.numel()
            heat += F.interpolate(cam, image.shape[2:], mode="bilinear", align_corners=False)[0, 0]
        return heat

    @torch.inference_mode()
    def _occlusion(self, image: torch.Tensor, label: int) -> torch.Tensor:
        """Zeiler and Fergus, arXiv:1311.2901: how much the class loses if a gray square covers a part of the image.

        The loss is that of the log-odds. Theirs is of the probability, which hardly changes if a model is confident.
        """
        height, width = image.shape[2:]
        side = max(1, max(height, width) // 4)
        tops = torch.linspace(0, max(0, height - side), WINDOWS).round().int().unique().tolist()
        lefts = torch.linspace(0, max(0, width - side), WINDOWS).round().int().unique().tolist()
        covers = torch.zeros(len(tops) * len(lefts), height, width, dtype=torch.bool, device=image.device)
        for place, (top, left) in enumerate((top, left) for top in tops for left in lefts):
            covers[place, top : top + side, left : left + side] = True
        before = self._log_odds(image, label)
        batches = covers.split(self.model.batch_size)
        after = torch.cat([self._log_odds(image.masked_fill(cover[:, None], GRAY), label) for cover in batches])
        loss = (before - after)[:, None, None] * covers  # each pixel gets the mean of the windows over it
        return (loss.sum(0) / covers.sum(0).clamp(min=1)).relu()

    def _log_odds(self, images: torch.Tensor, label: int) -> torch.Tensor:
        logits = self.model.logits(images)
        others = torch.arange(logits.shape[1], device=logits.device) != label
        return logits[:, label] - logits[:, others].logsumexp(1)
