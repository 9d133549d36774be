"""The training losses: reference-anchored alignment (Eq. 4-5) and flow matching (Eq. 6).

Eq. 6 itself, L = L_fm + λ·L_align, is line 19 of Algorithm 1 and stands in `train.training_step`.

Departures from the paper:
1. L_fm is the mean of the squared error, not its sum. With a sum, the meaning of λ would depend on
   the clip's size.
2. Eq. 4 is an expectation over depths. As §4.3 says, each step draws one depth: the caller draws it
   and passes that block's features.

Shape letters: B batch, S DiT tokens (the positions of Eq. 5), d width, R rows of one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

# --- Eq. 4: the alignment loss --------------------------------------------------------------------


def alignment_loss(a: Tensor, a_ref: Tensor, temperature: float = 0.07) -> Tensor:
    """L_align of Eq. 4 for the depth drawn at this step: minus Î of Eq. 5, a scalar >= 0.

    a = A^(l)(v, ℓ) and a_ref = A^(l)(v*, ℓ*): the cross-attention features of block l in the
    editing and in the reference branch, (B, S, d) each. Gradients reach `a` only.
    """
    return -symmetric_info_nce(a, a_ref, temperature)


# --- Eq. 5, as it is printed ----------------------------------------------------------------------


def info_nce_as_printed(a: Tensor, a_ref: Tensor, temperature: float = 0.07) -> Tensor:
    """Î(A; A*) of Eq. 5, line by line, for the features (S, d) of one sample; a scalar <= 0.

    Training uses `symmetric_info_nce`, which computes the same in less memory. A test compares
    their values and gradients.
    """
    a_ref = a_ref.detach()  # "the reference branch is detached" (§4.3)
    a = F.normalize(a, dim=-1)  # ã_i: row i, of length 1
    a_ref = F.normalize(a_ref, dim=-1)  # ã*_j
    similarity = torch.exp(a @ a_ref.mT / temperature)  # (S, S): exp(ã_iᵀ ã*_j / τ)
    positive = similarity.diagonal()  # (S,): exp(ã_iᵀ ã*_i / τ), the same position in both
    among_references = positive / similarity.sum(dim=1)  # ã_i against all ã*_j
    among_edits = positive / similarity.sum(dim=0)  # ã*_i against all ã_j
    S = len(positive)
    return (among_references.log() + among_edits.log()).sum() / (2 * S)


# --- Eq. 5 in chunks, which training uses ---------------------------------------------------------

# At the paper's size, S = 18,480, one S x S matrix of Eq. 5 takes 1.4 GB, and autograd would keep
# several of them. Here a chunk of its rows exists at a time, and the backward pass computes the
# chunks again. The gradient has a closed form. Let p be the softmax of the logits ã_iᵀ ã*_j / τ
# over j, q their softmax over i, and I the identity matrix:
#
#     dÎ/dã_i  =  1 / (2 S τ)  *  sum_j (2 I_ij - p_ij - q_ij) ã*_j


def symmetric_info_nce(
    a: Tensor, a_ref: Tensor, temperature: float = 0.07, chunk: int = 512
) -> Tensor:
    """Î(A; A*) of Eq. 5, averaged over the batch; a scalar <= 0.

    Î + log S is a lower bound on the mutual information of the two branches.

    a, a_ref: (B, S, d) or (S, d), features of the editing and of the reference branch. The
        negatives of a position are the other positions of its own sample.
    temperature: τ.
    chunk: how many rows of the S x S logits are held at a time.

    Gradients reach `a` only. Lower precisions are computed in float32: logits go up to 1/τ = 14,
    which bfloat16 rounds by up to 0.03, so the softmax would be off by 3 %.
    Raises ValueError if the shapes differ.
    """
    if a.shape != a_ref.shape or a.ndim not in (2, 3):
        shapes = f"{tuple(a.shape)} and {tuple(a_ref.shape)}"
        raise ValueError(f"a and a_ref must have the same shape, (B, S, d) or (S, d), got {shapes}")
    if a.ndim == 2:
        a, a_ref = a.unsqueeze(0), a_ref.unsqueeze(0)  # (1, S, d)
    a = _normalized(a)
    a_ref = _normalized(a_ref.detach())  # "the reference branch is detached" (§4.3)
    return _SymmetricInfoNCE.apply(a, a_ref, temperature, chunk)


class _SymmetricInfoNCE(torch.autograd.Function):
    """Eq. 5 for normalised features (B, S, d), and its gradient by the formula above."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, a: Tensor, a_ref: Tensor, temperature: float, chunk: int
    ) -> Tensor:
        B, S, _ = a.shape
        positive = a.new_empty(B, S)  # ã_iᵀ ã*_i / τ
        row_lse = a.new_empty(B, S)  # log of the first denominator of Eq. 5, for each i
        col_lse = a.new_full((B, S), -torch.inf)  # log of the second one
        for rows, logits in _logits_by_rows(a, a_ref, temperature, chunk):
            # Taken from the logits, so that rounding cannot put a positive above its log-sum-exp.
            positive[:, rows] = _positives(logits, rows)
            row_lse[:, rows] = logits.logsumexp(dim=2)
            # A row is complete within its chunk. A column is complete after the last chunk only.
            col_lse = torch.logaddexp(col_lse, logits.logsumexp(dim=1))
        ctx.save_for_backward(a, a_ref, row_lse, col_lse)
        ctx.temperature = temperature
        ctx.chunk = chunk
        return (positive - (row_lse + col_lse) / 2).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        a, a_ref, row_lse, col_lse = ctx.saved_tensors
        B, S, _ = a.shape
        grad = torch.empty_like(a)
        for rows, logits in _logits_by_rows(a, a_ref, ctx.temperature, ctx.chunk):
            # p + q - 2 I, (B, R, S): in place, because nothing else here is as large.
            coefficients = (logits - row_lse[:, rows, None]).exp_()  # p
            coefficients += logits.sub_(col_lse[:, None]).exp_()  # q
            _positives(coefficients, rows).sub_(2)  # 2 I
            grad[:, rows] = coefficients @ a_ref  # (B, R, d)
        scale = -grad_output / (2 * B * S * ctx.temperature)
        return grad.mul_(scale), None, None, None


def _logits_by_rows(
    a: Tensor, a_ref: Tensor, temperature: float, chunk: int
) -> Iterator[tuple[slice, Tensor]]:
    """Yield the logits ã_iᵀ ã*_j / τ in chunks: which rows i, and their logits (B, R, S)."""
    for start in range(0, a.shape[1], chunk):
        rows = slice(start, start + chunk)
        yield rows, (a[:, rows] / temperature) @ a_ref.mT


def _positives(matrix: Tensor, rows: slice) -> Tensor:
    """Of some rows of S x S matrices, (B, R, S): the entries i = j, (B, R), as a view."""
    return matrix.diagonal(offset=rows.start, dim1=1, dim2=2)


def _normalized(x: Tensor) -> Tensor:
    # New connectors are zero, so at first all features may be zero. eps bounds their gradient.
    return F.normalize(_at_least_float32(x), dim=-1, eps=1e-6)


# --- Eq. 6, first term: flow matching -------------------------------------------------------------


def flow_matching_loss(velocity: Tensor, noise: Tensor, target_latents: Tensor) -> Tensor:
    """L_fm of Eq. 6 (Alg. 1, line 14): the mean over all elements of |û - u*|², a scalar.

    velocity = û, noise = ε and target_latents = VAE(v*) have one shape; u* is ε - VAE(v*). Any
    precision will do: the difference and the mean are computed in float32 or better.
    Raises ValueError if the shapes differ, because broadcasting would hide the mistake.
    """
    if not velocity.shape == noise.shape == target_latents.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (velocity, noise, target_latents))
        raise ValueError(
            f"velocity, noise and target_latents must have the same shape, got {shapes}"
        )
    target_velocity = _at_least_float32(noise) - _at_least_float32(target_latents)  # u*
    return F.mse_loss(_at_least_float32(velocity), target_velocity)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
