"""Muon (arXiv 2502.16982), by which the toy preset learns in about half the steps; the paper's run is AdamW's."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def orthogonalize(matrices: Tensor) -> Tensor:
    """U Vᵀ of the singular value decompositions U S Vᵀ, roughly: S between 0.7 and 1.2 in its place, (k, m, n).

    Five steps of a Newton-Schulz iteration, whose coefficients are Muon's: on GPUs in bfloat16, as in torch.optim.Muon,
    but on CPUs, where that can be many times slower, in float32.
    """
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    x = x.to(torch.bfloat16 if x.is_cuda else torch.float32)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(
            x, torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445
        )
    return (x if wide else x.mT).float()


class Muon(torch.optim.AdamW):
    """AdamW, but for the matrices in `rates` momentum made orthogonal, as large as AdamW's updates are (rms 0.2).

    rates: their learning rates, in units of that of the other parameters. A parameter of more than two dimensions is a
    matrix with its first as rows. Those alike go through one batched product; of sharded ones all are gathered for it,
    and every rank does the same work.
    """

    def __init__(
        self, parameters: list[Tensor], rates: dict[Tensor, float], **options: Any
    ) -> None:
        super().__init__(parameters, foreach=True, **options)
        self.rates = rates
        for p in (
            parameters
        ):  # as AdamW's first step would do it: a checkpoint must have something to be loaded into
            moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
            self.state[p] = {"step": torch.tensor(0.0)} | moments

    @torch.no_grad()
    def step(self) -> None:
        """The gradients of the matrices are used up; parameters without one stay as they are."""
        group, alike = self.param_groups[0], {}
        for p, rate in self.rates.items():
            if p.grad is not None:
                alike.setdefault((p.shape, rate), []).append(p)
        for (_, rate), matrices in alike.items():
            updates = []
            for p in matrices:
                momentum = self.state[p]["exp_avg"].lerp_(p.grad, 0.05)
                update = p.grad.lerp(momentum, 0.95)
                updates.append(update.full_tensor() if isinstance(update, DTensor) else update)
                p.grad = None
            updates = torch.stack(updates).flatten(2)  # (k, m, n)
            updates = orthogonalize(updates) * (0.2 * math.sqrt(max(updates.shape[1:])))
            for p, update in zip(matrices, updates, strict=True):
                update = update.view(p.shape)
                if isinstance(p, DTensor):
                    update = distribute_tensor(
                        update, p.device_mesh, p.placements, src_data_rank=None
                    )
                p.mul_(1 - rate * group["lr"] * group["weight_decay"]).sub_(
                    update, alpha=rate * group["lr"]
                )
        super().step()


def muon_rates(weights: dict[str, Tensor], rate: float) -> dict[Tensor, float]:
    """The matrices of an editor that Muon trains, in the MLLM at a quarter of the rate: `train.RECIPES`."""
    apart = (
        r"embed_tokens|queries|time_|head\.head"  # matrices by their shape only, or near the ends
    )
    matrices = {
        name: p for name, p in weights.items() if p.ndim == 2 and not re.search(apart, name)
    }
    return {p: rate / 4 if "encoder." in name else rate for name, p in matrices.items()}
