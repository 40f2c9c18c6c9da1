"""Parameter groups and the optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import nn

from vitscale.config.schema import OptimConfig

# Decayed by the reference are kernels alone (big_vision's mask '.*/kernel$'); these are matrices but no kernels.
NEVER_DECAYED = ("pos_embed", "cls_token", "reg_token", "mask_token", "latent")
HEAD_KERNEL = "head.weight"


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Named groups: ``decay``, ``no_decay`` and, where its decay differs, ``head``. Every parameter is in one."""
    decays = {"decay": config.weight_decay, "no_decay": 0.0}
    if config.head_weight_decay is not None:
        decays["head"] = config.head_weight_decay
    members: dict[str, list[nn.Parameter]] = {name: [] for name in decays}
    for name, parameter in model.named_parameters():
        members[_group_of(name, parameter, decays)].append(parameter)
    return [
        {"name": name, "params": parameters, "weight_decay": decays[name]}
        for name, parameters in members.items()
        if parameters
    ]


def _group_of(name: str, parameter: nn.Parameter, decays: dict[str, float]) -> str:
    if parameter.ndim < 2 or any(word in name for word in NEVER_DECAYED):
        return "no_decay"
    return "head" if name == HEAD_KERNEL and "head" in decays else "decay"


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """torch's AdamW, whose decoupled decay is multiplied by the learning rate, or its SGD with momentum."""
    groups = parameter_groups(model, config)
    if config.kind == "sgd":
        return CountingSgd(groups, lr=config.lr, momentum=config.momentum)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=0.0)


class CountingSgd(torch.optim.SGD):
    """torch's SGD, which besides counts its updates as AdamW does: ``step`` in the state of each parameter."""

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient."""
        loss: float | None = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    state["step"] = state.get("step", 0) + 1
        return loss
