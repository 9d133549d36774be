"""Eq. 4-5 and the flow matching loss, against their definitions, closed forms and plain autograd.

Shape letters: B batch, S DiT tokens, d width.
"""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error
from torch import Tensor

from losses import alignment_loss, flow_matching_loss, symmetric_info_nce

TAU = 0.07


def make_features(
    *shape: int, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Two related but different sets of features; the first one wants a gradient."""
    generator = torch.Generator().manual_seed(seed)
    a_ref = torch.randn(shape, generator=generator, dtype=torch.float64)
    a = 0.5 * a_ref + torch.randn(shape, generator=generator, dtype=torch.float64)
    return a.to(dtype).requires_grad_(), a_ref.to(dtype)


def double_loop_info_nce(a: Tensor, a_ref: Tensor, temperature: float) -> float:
    """Eq. 5 as printed, in Python floats."""

    def normalize(row: list[float]) -> list[float]:
        norm = math.sqrt(sum(x * x for x in row))
        return [x / norm for x in row]

    rows, refs = [normalize(r) for r in a.tolist()], [normalize(r) for r in a_ref.tolist()]
    S = len(rows)

    def similarity(i: int, j: int) -> float:
        return math.exp(sum(x * y for x, y in zip(rows[i], refs[j], strict=True)) / temperature)

    total = 0.0
    for i in range(S):
        total += math.log(similarity(i, i) / sum(similarity(i, j) for j in range(S)))
        total += math.log(similarity(i, i) / sum(similarity(j, i) for j in range(S)))
    return total / (2 * S)


def naive_info_nce(a: Tensor, a_ref: Tensor, temperature: float) -> Tensor:
    """Eq. 5 of (S, d) features as two cross-entropies over the whole matrix, for autograd."""
    logits = F.normalize(a, dim=-1) @ F.normalize(a_ref, dim=-1).T / temperature
    labels = torch.arange(len(a))
    return -(F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def value_and_gradient(function, a: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
    value = function(a, *args, **kwargs)
    return value.detach(), torch.autograd.grad(value, a)[0]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_info_nce_equals_the_double_loop_of_eq_5(dtype, tolerance):
    """The chunked estimate is Eq. 5 as printed, for a size that no chunk divides."""
    a, a_ref = make_features(37, 6)
    expected = double_loop_info_nce(a, a_ref, TAU)
    value = symmetric_info_nce(a.to(dtype), a_ref.to(dtype), TAU, chunk=8)
    assert value.dtype == dtype and value.shape == ()
    assert abs(value.item() - expected) < tolerance * abs(expected)


def test_gradient_passes_finite_differences():
    """The analytic backward pass agrees with finite differences, over a batch and uneven chunks."""
    a, a_ref = make_features(2, 5, 3)
    assert torch.autograd.gradcheck(lambda x: symmetric_info_nce(x, a_ref, 0.3, chunk=2), a)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_gradient_equals_naive_autograd(dtype, tolerance):
    """The gradient is that of autograd through the whole S x S matrix in float64."""
    a, a_ref = make_features(150, 16)
    value, gradient = value_and_gradient(naive_info_nce, a, a_ref, TAU)
    ours, our_gradient = value_and_gradient(
        symmetric_info_nce, a.to(dtype), a_ref.to(dtype), TAU, chunk=64
    )
    assert relative_error(ours, value) < tolerance
    assert relative_error(our_gradient, gradient) < tolerance


@pytest.mark.parametrize("chunk", [1, 4, 5, 12, 13, 100])
def test_result_does_not_depend_on_the_chunk(chunk):
    """Value and gradient are the same for every chunk size, whether it divides S or exceeds it."""
    a, a_ref = make_features(2, 13, 4)
    value, gradient = value_and_gradient(symmetric_info_nce, a, a_ref, TAU)
    ours, our_gradient = value_and_gradient(symmetric_info_nce, a, a_ref, TAU, chunk=chunk)
    assert relative_error(ours, value) < 1e-12
    assert relative_error(our_gradient, gradient) < 1e-12


def test_reference_gets_no_gradient():
    """Gradients flow through the editing branch only, also where both branches come from the same weights."""
    a, a_ref = make_features(9, 4)
    a_ref.requires_grad_()
    alignment_loss(a, a_ref, TAU).backward()
    assert a_ref.grad is None and a.grad.abs().max() > 0

    weight = torch.eye(4, dtype=torch.float64).requires_grad_()
    shared = value_and_gradient(
        lambda w: alignment_loss(a.detach() @ w, a_ref.detach() @ w, TAU), weight
    )[1]
    fixed = value_and_gradient(
        lambda w: alignment_loss(a.detach() @ w, a_ref.detach(), TAU), weight
    )[1]
    assert fixed.abs().max() > 0 and torch.equal(shared, fixed)


@pytest.mark.parametrize("tau", [0.07, 0.5])
def test_matched_orthonormal_features_have_the_closed_form(tau):
    """For matched orthonormal features the loss is log(1 + (S - 1) e^(-1/τ))."""
    S = 24
    basis = torch.linalg.qr(make_features(S, S)[0].detach())[0]
    assert (
        abs(alignment_loss(basis, basis, tau).item() - math.log1p((S - 1) * math.exp(-1 / tau)))
        < 1e-12
    )


def test_identical_rows_give_log_s():
    """If no position can be told from another the loss is log S: nothing is known about the match."""
    row = make_features(1, 8)[1]
    assert (
        abs(alignment_loss(row.expand(50, 8), 3 * row.expand(50, 8), TAU).item() - math.log(50))
        < 1e-12
    )


def test_swapping_the_branches_leaves_the_value():
    """Eq. 5 is symmetric in its arguments."""
    a, a_ref = make_features(3, 21, 5)
    forward, swapped = (symmetric_info_nce(x, y, TAU, chunk=4) for x, y in ((a, a_ref), (a_ref, a)))
    assert relative_error(swapped, forward) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_one_position_gives_exactly_zero(dtype):
    """With no negatives (S = 1) value and gradient are 0 to the last bit."""
    for seed in range(20):
        a, a_ref = make_features(3, 1, 33, dtype=dtype, seed=seed)
        value, gradient = value_and_gradient(
            symmetric_info_nce, a.detach().requires_grad_(), a_ref, TAU
        )
        assert value.item() == 0 and not gradient.any()


def test_scale_of_features_does_not_matter():
    """Each row enters by its direction: positive factors, one for each row, leave the value."""
    a, a_ref = make_features(17, 5)
    factors = torch.logspace(-4, 4, 17, dtype=torch.float64)[:, None]
    scaled = symmetric_info_nce(a * factors, a_ref * factors.flip(0), TAU)
    assert relative_error(scaled, symmetric_info_nce(a, a_ref, TAU)) < 1e-12


def test_samples_of_a_batch_are_contrasted_on_their_own():
    """A batch gives the mean of its samples' estimates, and their gradients over B."""
    a, a_ref = make_features(3, 11, 4)
    value, gradient = value_and_gradient(symmetric_info_nce, a, a_ref, TAU, chunk=4)
    singles = [value_and_gradient(symmetric_info_nce, a[i], a_ref[i], TAU) for i in range(3)]
    assert relative_error(value, torch.stack([v for v, _ in singles]).mean()) < 1e-12
    assert relative_error(gradient, torch.stack([g for _, g in singles]) / 3) < 1e-12


def test_bfloat16_features_are_computed_in_float32():
    """bfloat16 features give bit for bit the float32 value of the same numbers, and a bfloat16 gradient."""
    a, a_ref = make_features(2, 40, 8, dtype=torch.bfloat16)
    value, gradient = value_and_gradient(symmetric_info_nce, a, a_ref, TAU)
    wide, wide_gradient = value_and_gradient(symmetric_info_nce, a.float(), a_ref.float(), TAU)
    assert value.dtype == torch.float32 and torch.equal(value, wide)
    assert gradient.dtype == torch.bfloat16 and torch.equal(gradient, wide_gradient.bfloat16())


def test_extreme_temperature_neither_overflows_nor_underflows():
    """At τ = 0.001, where e^(1/τ) overflows, matched and opposed features give the float64 result."""
    a, noise = make_features(64, 8)
    for a_ref in (a.detach() + 0.2 * noise, -a.detach() + 0.2 * noise):
        value, gradient = value_and_gradient(naive_info_nce, a, a_ref, 0.001)
        ours, our_gradient = value_and_gradient(
            symmetric_info_nce, a.float(), a_ref.float(), 0.001, chunk=10
        )
        # float32 resolves logits near 1000 to 6e-5; the matched have no gradient left, the opposed have.
        assert abs(ours - value) < 1e-3
        torch.testing.assert_close(our_gradient.double(), gradient, rtol=1e-3, atol=1e-4)


def test_all_zero_features_are_harmless():
    """Features of zero-initialised layers give log S and a finite gradient."""
    a = torch.zeros(10, 4, requires_grad=True)
    for a_ref in (torch.zeros(10, 4), make_features(10, 4, dtype=torch.float32)[1]):
        loss, gradient = value_and_gradient(alignment_loss, a, a_ref, TAU)
        assert abs(loss.item() - math.log(10)) < 1e-6 and gradient.abs().max() < 1e7


def test_alignment_loss_is_the_negative_estimate_and_falls():
    """Eq. 4: L_align = -Î >= 0; following its gradient matches the branches."""
    a, a_ref = make_features(2, 30, 8)
    assert torch.equal(alignment_loss(a, a_ref, TAU), -symmetric_info_nce(a, a_ref, TAU))
    losses = []
    for _ in range(50):
        loss, gradient = value_and_gradient(alignment_loss, a, a_ref, TAU)
        losses.append(loss.item())
        a = (a - 5 * gradient).detach().requires_grad_()
    assert 0 <= losses[-1] < losses[0] / 2


def test_mismatched_shapes_are_refused():
    """Shapes that would broadcast, or pair positions wrongly, are a ValueError."""
    with pytest.raises(ValueError, match=r"same shape.*\(3, 4\) and \(5, 4\)"):
        symmetric_info_nce(torch.ones(3, 4), torch.ones(5, 4))
    with pytest.raises(ValueError, match="same shape"):
        flow_matching_loss(torch.ones(2, 4, 3), torch.ones(2, 4, 3), torch.ones(1, 4, 3))


def test_flow_matching_loss_is_the_mean_squared_error_of_the_velocity():
    """L_fm and its gradient equal the plain sum over elements, divided by their number."""
    generator = torch.Generator().manual_seed(0)
    velocity, noise, target = (torch.randn(2, 4, 3, 6, 5, generator=generator) for _ in range(3))
    value, gradient = value_and_gradient(
        flow_matching_loss, velocity.requires_grad_(), noise, target
    )
    triples = zip(*(x.flatten().tolist() for x in (velocity, noise, target)), strict=True)
    expected = sum((v - (n - z)) ** 2 for v, n, z in triples) / velocity.numel()
    assert abs(value.item() - expected) < 1e-6 * expected
    assert relative_error(gradient, 2 * (velocity - (noise - target)) / velocity.numel()) < 1e-6
    assert flow_matching_loss(noise - target, noise, target) == 0


def test_flow_matching_loss_of_bfloat16_is_a_float32_scalar():
    """Neither the target velocity nor the mean is rounded to bfloat16."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 4, 500, generator=generator).bfloat16() for _ in range(3)]
    value = flow_matching_loss(*inputs)
    assert value.dtype == torch.float32 and value.shape == ()
    assert torch.equal(value, flow_matching_loss(*(x.float() for x in inputs)))


MEMORY_SCRIPT = """
import sys, torch
from losses import alignment_loss
def kilobytes(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))
S, d = int(sys.argv[1]), int(sys.argv[2])
generator = torch.Generator().manual_seed(0)
a, a_ref = (torch.randn(S, d, generator=generator) for _ in range(2))
a.requires_grad_()
a.grad = torch.zeros_like(a)
alignment_loss(a[:64], a_ref[:64]).backward()  # loads the libraries
before = kilobytes("VmRSS")
alignment_loss(a, a_ref).backward()
print(kilobytes("VmHWM") - before)  # not ru_maxrss, which a child process inherits from its parent
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize(
    ("S", "d", "limit"),
    [(8192, 64, 230e6), pytest.param(18480, 256, 400e6, marks=pytest.mark.slow)],
)
def test_memory_stays_below_one_matrix_of_similarities(S, d, limit):
    """Forward and backward at the paper's S = 18,480 add under 400 MB, where one S x S matrix has 1,366."""
    assert limit < 4 * S * S
    run = [sys.executable, "-c", MEMORY_SCRIPT, str(S), str(d)]
    root = Path(__file__).resolve().parent.parent
    extra = (
        int(subprocess.run(run, cwd=root, check=True, capture_output=True, text=True).stdout) * 1024
    )
    assert (
        2 * (4 * S * d) < extra < limit
    )  # two normalised copies at least: it shows that the measure works
