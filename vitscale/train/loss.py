"""Softmax and sigmoid cross-entropy on labels padded with -1, and softmax on the colours of masked patches.

B micro-batch, M labels per image, K classes, N patches per image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitscale.config.schema import LossConfig
from vitscale.models.masked_patches import UNTOUCHED, MaskedPatches
from vitscale.train.mixup import partners


def training_loss(outputs: Tensor | MaskedPatches, labels: Tensor, config: LossConfig, share: float = 1.0) -> Tensor:
    """Mean over the batch, computed in fp32.

    Args:
        outputs: logits [B, K]; or those of patches, which come with labels of their own.
        labels: int64 [B, M].
        config: of the loss.
        share: of an image's own labels in its target; the rest is of its partner's, see :mod:`vitscale.train.mixup`.
    """
    if isinstance(outputs, MaskedPatches):
        return masked_patch_loss(outputs)
    loss = _class_loss(outputs.float(), labels, config)
    # Both losses are linear in the targets, so this is the loss on blended targets.
    return loss if share == 1 else share * loss + (1 - share) * _class_loss(outputs.float(), partners(labels), config)


def _class_loss(logits: Tensor, labels: Tensor, config: LossConfig) -> Tensor:
    if config.kind == "softmax":
        return F.cross_entropy(logits, labels[:, 0], label_smoothing=config.label_smoothing)
    # Summed over classes: a mean would scale the gradient by 1/K (Scaling ViT, section 3.3, after BiT and ViT).
    # torch's own function cancels where logits are far below 0: it is 1% off at the initial head bias of -10.
    return (F.softplus(logits) - multi_hot(labels, logits.shape[1]) * logits).sum(dim=1).mean()


def masked_patch_loss(outputs: MaskedPatches) -> Tensor:
    """Mean over the corrupted patches. logits [B, N, K], labels int64 [B, N]; computed in fp32."""
    logits = outputs.logits.float().flatten(0, 1)  # [B*N, K]
    return F.cross_entropy(logits, outputs.labels.flatten(), ignore_index=UNTOUCHED)


def multi_hot(labels: Tensor, num_classes: int) -> Tensor:
    """labels int64 [B, M] padded with -1 to targets fp32 [B, K]."""
    targets = torch.zeros(len(labels), num_classes + 1, device=labels.device)
    # Padding lands in one extra column, which is then cut off.
    targets.scatter_(1, torch.where(labels < 0, num_classes, labels), 1.0)
    return targets[:, :num_classes]
