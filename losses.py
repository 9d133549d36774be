"""The training losses: flow matching (first term of Eq. 6) and reference-anchored alignment (§4.3, Eq. 4-5).

Eq. 6 itself, their weighted sum, is a line of Algorithm 1 in `train.py`. Departures from the paper:
1. L_fm is the mean of the squared error, not its sum: λ_align would else depend on the clip's size.
2. Eq. 4's expectation over the depth is one draw a step, as §4.3 says; the caller draws and passes features.

At the paper's size (S = 18,480) the S x S similarities of Eq. 5 take 1.4 GB, and autograd would keep several
such matrices. Here they exist a few rows at a time and are computed again in the backward pass, whose formula
is short: with p the softmax of the logits along each row, q along each column, and I the identity,

    dÎ/dã_i  =  1 / (2 S τ)  *  sum_j (2 I_ij - p_ij - q_ij) ã*_j

Shape letters: B batch, S DiT tokens, d width, R rows of one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def flow_matching_loss(velocity: Tensor, noise: Tensor, target_latents: Tensor) -> Tensor:
    """L_fm: the mean over all elements of |velocity - (noise - target_latents)|², a scalar.

    The three tensors have one shape and any precision; difference and mean are taken in at least float32.
    Raises ValueError if the shapes differ: broadcasting would hide the mistake.
    """
    if not velocity.shape == noise.shape == target_latents.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (velocity, noise, target_latents))
        raise ValueError(
            f"velocity, noise and target_latents must have the same shape, got {shapes}"
        )
    target_velocity = _at_least_float32(noise) - _at_least_float32(target_latents)
    return F.mse_loss(_at_least_float32(velocity), target_velocity)


def _logits_by_rows(
    a: Tensor, a_ref: Tensor, temperature: float, chunk: int
) -> Iterator[tuple[slice, Tensor]]:
    """Yields at most `chunk` rows at a time of the logits ã ã*ᵀ / τ: (which rows, logits (B, R, S))."""
    for start in range(0, a.shape[1], chunk):
        rows = slice(start, start + chunk)
        yield rows, (a[:, rows] / temperature) @ a_ref.mT


def _positives(matrix: Tensor, rows: slice) -> Tensor:
    """The entries i = j of an S x S matrix of which these rows are given, (B, R, S): a view, (B, R)."""
    return matrix.diagonal(offset=rows.start, dim1=1, dim2=2)


class _SymmetricInfoNCE(torch.autograd.Function):
    """Eq. 5 for normalised features, averaged over the batch; keeps a log-sum-exp for each row and column."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, a: Tensor, a_ref: Tensor, temperature: float, chunk: int
    ) -> Tensor:
        B, S, _ = a.shape
        positive, row_lse = a.new_empty(B, S), a.new_empty(B, S)
        col_lse = a.new_full((B, S), -torch.inf)
        for rows, logits in _logits_by_rows(a, a_ref, temperature, chunk):
            # Read off the logits, so that no rounding puts a positive above its log-sum-exp.
            positive[:, rows] = _positives(logits, rows)
            # A row is complete within its chunk, a column only after the last one.
            row_lse[:, rows] = logits.logsumexp(dim=2)
            col_lse = torch.logaddexp(col_lse, logits.logsumexp(dim=1))
        ctx.save_for_backward(a, a_ref, row_lse, col_lse)
        ctx.temperature, ctx.chunk = temperature, chunk
        return (positive - (row_lse + col_lse) / 2).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        a, a_ref, row_lse, col_lse = ctx.saved_tensors
        grad = torch.empty_like(a)
        for rows, logits in _logits_by_rows(a, a_ref, ctx.temperature, ctx.chunk):
            # p + q - 2 I, in place because nothing else here is as large.
            weights = (logits - row_lse[:, rows, None]).exp_()  # p: (B, R, S)
            weights += logits.sub_(col_lse[:, None]).exp_()  # q
            _positives(weights, rows).sub_(2)
            grad[:, rows] = weights @ a_ref  # (B, R, d)
        return grad.mul_(-grad_output / (2 * row_lse.numel() * ctx.temperature)), None, None, None


def symmetric_info_nce(
    a: Tensor, a_ref: Tensor, temperature: float = 0.07, chunk: int = 512
) -> Tensor:
    """Î(A; A*) of Eq. 5, a scalar <= 0 (a lower bound on mutual information, less its constant log S).

    a, a_ref: (B, S, d) or (S, d), features of the editing and of the reference branch at the same positions.
    The negatives of a position are the other positions of its own sample; the B estimates are averaged.
    temperature: τ. chunk: rows of the S x S logits held at a time, which take B * chunk * S numbers.

    Gradients reach `a` only. All is computed in float32 whatever the inputs (float64 stays float64): logits
    of 1/τ = 14 rounded to bfloat16 are off by up to 0.03, the softmax by 3 %, while three float32 products
    of 2 S² d operations are small next to a training step. Raises ValueError if the shapes differ.
    """
    if a.shape != a_ref.shape or a.ndim not in (2, 3):
        shapes = f"{tuple(a.shape)} and {tuple(a_ref.shape)}"
        raise ValueError(f"a and a_ref must have the same shape, (B, S, d) or (S, d), got {shapes}")
    a_ref = a_ref.detach()  # "the reference branch is detached" (§4.3)
    a, a_ref = (x.reshape(-1, *x.shape[-2:]) for x in (a, a_ref))  # (B, S, d)
    # Zero-initialised connectors can make all features zero at first: eps bounds the gradient of such rows.
    a, a_ref = (F.normalize(_at_least_float32(x), dim=-1, eps=1e-6) for x in (a, a_ref))
    return _SymmetricInfoNCE.apply(a, a_ref, temperature, chunk)


def alignment_loss(a: Tensor, a_ref: Tensor, temperature: float = 0.07) -> Tensor:
    """L_align of Eq. 4 for the one depth drawn at this step: minus `symmetric_info_nce`, a scalar >= 0."""
    return -symmetric_info_nce(a, a_ref, temperature)
