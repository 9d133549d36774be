"""Muon (arXiv 2502.16982), by which the toy preset learns in about half the steps; the paper's run is AdamW's."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def orthogonalize(matrix: Tensor) -> Tensor:
    """U Vᵀ of the singular value decomposition U S Vᵀ, roughly: S between 0.7 and 1.2 in its place, (m, n).

    Five steps of a Newton-Schulz iteration, whose coefficients are Muon's. In float32, unlike torch.optim.Muon's
    bfloat16: that is many times slower on CPUs without bfloat16 units.
    """
    x = matrix.float() if len(matrix) <= matrix.shape[1] else matrix.float().mT
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return x if len(matrix) <= matrix.shape[1] else x.mT


class Muon(torch.optim.AdamW):
    """AdamW, but for the matrices in `rates` momentum made orthogonal, as large as AdamW's updates are (rms 0.2).

    rates: their learning rates, in units of that of the other parameters. A parameter of more than two dimensions is a
    matrix with its first as rows. Sharded matrices are gathered one at a time, and every rank does the same work.
    """

    def __init__(self, parameters: list[Tensor], rates: dict[Tensor, float], **options: Any) -> None:
        super().__init__(parameters, foreach=True, **options)
        self.rates = rates
        for p in parameters:  # as AdamW's first step would do it: a checkpoint must have something to be loaded into
            moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
            self.state[p] = {"step": torch.tensor(0.0)} | moments

    @torch.no_grad()
    def step(self) -> None:
        """The gradients of the matrices are used up; parameters without one stay as they are."""
        group = self.param_groups[0]
        for p, rate in self.rates.items():
            if p.grad is None:
                continue
            momentum = self.state[p]["exp_avg"].lerp_(p.grad, 0.05)
            update = p.grad.lerp(momentum, 0.95)
            full = update.full_tensor() if isinstance(update, DTensor) else update
            full = orthogonalize(full.flatten(1)).view_as(full) * (0.2 * math.sqrt(max(full.flatten(1).shape)))
            if isinstance(p, DTensor):
                full = distribute_tensor(full, p.device_mesh, p.placements, src_data_rank=None)
            p.mul_(1 - rate * group["lr"] * group["weight_decay"]).sub_(full, alpha=rate * group["lr"])
            p.grad = None
        super().step()
