"""Softmax and sigmoid cross-entropy on labels padded with -1.

B micro-batch, M labels per image, K classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitscale.config.schema import LossConfig


def training_loss(logits: Tensor, labels: Tensor, config: LossConfig) -> Tensor:
    """Mean over the batch. logits [B, K], labels int64 [B, M]; computed in fp32."""
    logits = logits.float()
    if config.kind == "softmax":
        return F.cross_entropy(logits, labels[:, 0], label_smoothing=config.label_smoothing)
    # Summed over classes: a mean would scale the gradient by 1/K (Scaling ViT, section 3.3, after BiT and ViT).
    # torch's own function cancels where logits are far below 0: it is 1% off at the initial head bias of -10.
    return (F.softplus(logits) - multi_hot(labels, logits.shape[1]) * logits).sum(dim=1).mean()


def multi_hot(labels: Tensor, num_classes: int) -> Tensor:
    """labels int64 [B, M] padded with -1 to targets fp32 [B, K]."""
    targets = torch.zeros(len(labels), num_classes + 1, device=labels.device)
    # Padding lands in one extra column, which is then cut off.
    targets.scatter_(1, torch.where(labels < 0, num_classes, labels), 1.0)
    return targets[:, :num_classes]
