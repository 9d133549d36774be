"""Muon (arXiv 2502.16982), with which the toy preset learns in half the steps of AdamW.

The paper's run uses torch.optim.AdamW. torch.optim.Muon exists, but it computes in bfloat16, which
is 180 times slower on CPUs without such instructions, and takes no convolution weights, of which
the toy's VAE consists.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

MOMENTUM = 0.95


def orthogonalize(matrices: Tensor) -> Tensor:
    """For matrices U S Vᵀ, roughly U Vᵀ: singular values between 0.7 and 1.2 in the place of S.

    (k, m, n) -> (k, m, n) in float32, by five steps of Muon's Newton-Schulz iteration
    x <- 3.4445 x - 4.775 (x xᵀ) x + 2.0315 (x xᵀ)² x. In bfloat16 on GPUs, in float32 on CPUs.
    Singular values of less than 0.15 % of the matrix's norm stay below 0.7.
    """
    is_wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if is_wide else matrices.mT  # x xᵀ is the smaller of the two products
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # singular values of at most 1
    x = x.to(torch.bfloat16 if x.is_cuda else torch.float32)
    for _ in range(5):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return (x if is_wide else x.mT).float()


class Muon(torch.optim.AdamW):
    """AdamW, except for the matrices in `rates`, whose update is their orthogonalized momentum.

    That update is scaled to the size of AdamW's, rms 0.2. rates: learning rates of the matrices, as
    multiples of AdamW's. A weight of more than two dimensions is a matrix with its first dimension
    as rows. Sharded matrices are gathered, and every rank computes the same update.
    """

    def __init__(
        self, parameters: list[Tensor], rates: dict[Tensor, float], **options: Any
    ) -> None:
        super().__init__(parameters, foreach=True, **options)
        self.rates = rates

    @torch.no_grad()
    def step(self) -> None:
        """Parameters without a gradient stay as they are. Uses up the gradients of the matrices."""
        # Matrices of one shape and rate go through one batched product.
        alike: dict[tuple[torch.Size, float], list[Tensor]] = {}
        for p, rate in self.rates.items():
            if p.grad is not None:
                alike.setdefault((p.shape, rate), []).append(p)
        for (_, rate), matrices in alike.items():
            self.step_matrices(matrices, rate)
        # AdamW passes over the matrices, which have no gradient any more.
        super().step()

    def step_matrices(self, matrices: list[Tensor], rate: float) -> None:
        group = self.param_groups[0]
        lr = rate * group["lr"]
        momenta = []
        for p in matrices:
            if not self.state[p]:
                self.state[p]["exp_avg"] = torch.zeros_like(p)  # AdamW's name for the momentum
            momentum = self.state[p]["exp_avg"].lerp_(p.grad, 1 - MOMENTUM)
            nesterov = p.grad.lerp(momentum, MOMENTUM)
            momenta.append(nesterov.full_tensor() if isinstance(p, DTensor) else nesterov)
            p.grad = None

        stacked = torch.stack(momenta).flatten(2)  # (k, m, n)
        # The rms of an orthogonal m x n matrix is 1 / sqrt(max(m, n)): it becomes 0.2, as AdamW's.
        scale = 0.2 * math.sqrt(max(stacked.shape[1:]))
        updates = orthogonalize(stacked) * scale
        for p, update in zip(matrices, updates, strict=True):
            update = update.view(p.shape)
            if isinstance(p, DTensor):
                # Every rank has the whole update and keeps its part: nothing is sent.
                update = distribute_tensor(update, p.device_mesh, p.placements, src_data_rank=None)
            p.mul_(1 - lr * group["weight_decay"])
            p.sub_(update, alpha=lr)


def muon_rates(weights: dict[str, Tensor], rate: float) -> dict[Tensor, float]:
    """Which weights of an editor Muon trains, each at which multiple of AdamW's rate.

    rate: the DiT's, `muon` in `train.RECIPES`. The MLLM learns at a quarter of it, so that the DiT
    can follow what it says.
    """
    # These are tables of vectors, such as words, or next to the model's input or output.
    left_to_adamw = re.compile(r"embed_tokens|queries|time_|head\.head")
    rates = {}
    for name, p in weights.items():
        if p.ndim == 2 and not left_to_adamw.search(name):
            rates[p] = rate / 4 if "encoder." in name else rate
    return rates
