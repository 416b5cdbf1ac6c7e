"""Muon for the matrices of a transformer's blocks: momentum made orthogonal before each step.

Keller Jordan's optimizer (https://kellerjordan.github.io/posts/muon), with updates scaled to AdamW's size
(https://arxiv.org/abs/2502.16982). torch.optim.Muon computes the same one matrix at a time; matrices of one
shape go together here, which small ones need.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic that draws singular values towards 1
ITERATIONS = 5
ADAM_SIZE = 0.2  # the root mean square of AdamW's updates


class Muon(torch.optim.Optimizer):
    """parameters: matrices. learning_rate: as for AdamW."""

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        learning_rate: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
    ):
        super().__init__(parameters, dict(lr=learning_rate, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:  # of what the last block does to the text, which nothing reads
                    continue
                by_shape.setdefault(parameter.shape, []).append(parameter)
            for parameters in by_shape.values():
                self._step_together(parameters, group)

    def _step_together(self, parameters: list[torch.nn.Parameter], group: dict[str, float]) -> None:
        """parameters: matrices of one shape."""
        buffers = []
        for parameter in parameters:
            state = self.state[parameter]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(parameter)
            buffers.append(state["momentum"])
        gradients = [parameter.grad for parameter in parameters]
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        updates = orthogonal(torch.stack(torch._foreach_lerp(gradients, buffers, group["momentum"])))
        size = ADAM_SIZE * max(parameters[0].shape) ** 0.5
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, list(updates.to(parameters[0].dtype)), alpha=-group["lr"] * size)


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """(n, rows, columns) with singular values near 1, BF16."""
    first, second, third = COEFFICIENTS
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(ITERATIONS):
        product = x @ x.mT
        product = torch.baddbmm(product, product, product, beta=second, alpha=third)
        x = torch.baddbmm(x, product, x, beta=first)
    return x.mT if tall else x
