"""The losses as numerics: chunks, batches, precisions, extreme inputs and memory.

What the paper says of them is tested in tests/paper/. Shape letters: B batch, S tokens, d width.
"""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import make_features, relative_error, value_and_gradient

from losses import alignment_loss, flow_matching_loss, symmetric_info_nce

TAU = 0.07


def cross_entropy_info_nce(a, a_ref, temperature):
    """Eq. 5 of (S, d) features as two cross-entropies over the whole matrix, for autograd."""
    logits = F.normalize(a, dim=-1) @ F.normalize(a_ref, dim=-1).T / temperature
    labels = torch.arange(len(a))
    return -(F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def test_gradient_passes_finite_differences():
    """Over a batch, and over chunks of which the last is shorter."""
    a, a_ref = make_features(2, 5, 3)
    assert torch.autograd.gradcheck(lambda x: symmetric_info_nce(x, a_ref, 0.3, chunk=2), a)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_value_and_gradient_equal_cross_entropies(dtype, tolerance):
    """Those of autograd through the whole S x S matrix in float64."""
    a, a_ref = make_features(150, 16)
    expected, expected_gradient = value_and_gradient(cross_entropy_info_nce, a, a_ref, TAU)
    value, gradient = value_and_gradient(
        symmetric_info_nce, a.to(dtype), a_ref.to(dtype), TAU, chunk=64
    )
    assert value.dtype == dtype and value.shape == ()
    assert relative_error(value, expected) < tolerance
    assert relative_error(gradient, expected_gradient) < tolerance


@pytest.mark.parametrize("chunk", [1, 4, 5, 12, 13, 100])
def test_result_does_not_depend_on_the_chunk(chunk):
    """Whether the chunk divides S, or does not, or exceeds it."""
    a, a_ref = make_features(2, 13, 4)
    expected, expected_gradient = value_and_gradient(symmetric_info_nce, a, a_ref, TAU)
    value, gradient = value_and_gradient(symmetric_info_nce, a, a_ref, TAU, chunk)
    assert relative_error(value, expected) < 1e-12
    assert relative_error(gradient, expected_gradient) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_one_position_gives_exactly_zero(dtype):
    """With no negatives (S = 1), to the last bit, for many features."""
    for seed in range(20):
        a, a_ref = make_features(3, 1, 33, dtype=dtype, seed=seed)
        a = a.detach().requires_grad_()
        value, gradient = value_and_gradient(symmetric_info_nce, a, a_ref, TAU)
        assert value.item() == 0
        assert not gradient.any()


def test_samples_of_a_batch_are_contrasted_on_their_own():
    """A batch gives the mean of its samples' estimates, and their gradients over B."""
    a, a_ref = make_features(3, 11, 4)
    value, gradient = value_and_gradient(symmetric_info_nce, a, a_ref, TAU, chunk=4)
    singles = [value_and_gradient(symmetric_info_nce, a[i], a_ref[i], TAU) for i in range(3)]
    values, gradients = zip(*singles, strict=True)
    assert relative_error(value, torch.stack(values).mean()) < 1e-12
    assert relative_error(gradient, torch.stack(gradients) / 3) < 1e-12


def test_bfloat16_features_are_computed_in_float32():
    """The value is bit for bit that of the same numbers in float32; the gradient is in bfloat16."""
    a, a_ref = make_features(2, 40, 8, dtype=torch.bfloat16)
    value, gradient = value_and_gradient(symmetric_info_nce, a, a_ref, TAU)
    wide, wide_gradient = value_and_gradient(symmetric_info_nce, a.float(), a_ref.float(), TAU)
    assert value.dtype == torch.float32 and torch.equal(value, wide)
    assert gradient.dtype == torch.bfloat16
    assert torch.equal(gradient, wide_gradient.bfloat16())


@pytest.mark.parametrize("sign", [1, -1], ids=["matched", "opposed"])
def test_extreme_temperature_neither_overflows_nor_underflows(sign):
    """At τ = 0.001, where e^(1/τ) overflows, float32 features give the float64 result."""
    a, noise = make_features(64, 8)
    a_ref = sign * a.detach() + 0.2 * noise
    expected, expected_gradient = value_and_gradient(cross_entropy_info_nce, a, a_ref, 0.001)
    value, gradient = value_and_gradient(
        symmetric_info_nce, a.float(), a_ref.float(), 0.001, chunk=10
    )
    # float32 resolves logits near 1000 to 6e-5. Matched features have hardly a gradient left.
    assert abs(value - expected) < 1e-3
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-3, atol=1e-4)


def test_all_zero_features_are_harmless():
    """Features of zero-initialised layers give log S and a finite gradient."""
    a = torch.zeros(10, 4, requires_grad=True)
    for a_ref in (torch.zeros(10, 4), make_features(10, 4, dtype=torch.float32)[1]):
        loss, gradient = value_and_gradient(alignment_loss, a, a_ref, TAU)
        assert abs(loss.item() - math.log(10)) < 1e-6
        assert gradient.abs().max() < 1e7


def test_mismatched_shapes_are_refused():
    """Shapes that would broadcast, or pair positions wrongly, are a ValueError."""
    with pytest.raises(ValueError, match=r"same shape.*\(3, 4\) and \(5, 4\)"):
        symmetric_info_nce(torch.ones(3, 4), torch.ones(5, 4))
    with pytest.raises(ValueError, match="same shape"):
        flow_matching_loss(torch.ones(2, 4, 3), torch.ones(2, 4, 3), torch.ones(1, 4, 3))


def test_gradient_of_the_flow_matching_loss_is_that_of_a_mean():
    generator = torch.Generator().manual_seed(0)
    velocity, noise, target = torch.randn(3, 2, 4, 3, 6, 5, generator=generator)
    _, gradient = value_and_gradient(flow_matching_loss, velocity.requires_grad_(), noise, target)
    assert relative_error(gradient, 2 * (velocity - (noise - target)) / velocity.numel()) < 1e-6


def test_flow_matching_loss_of_bfloat16_is_a_float32_scalar():
    """Neither the target velocity nor the mean is rounded to bfloat16."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3, 2, 4, 500, generator=generator).bfloat16()
    value = flow_matching_loss(*inputs)
    assert value.dtype == torch.float32 and value.shape == ()
    assert torch.equal(value, flow_matching_loss(*inputs.float()))


MEMORY_SCRIPT = """
import sys, torch
from losses import alignment_loss
def kilobytes(field):
    for line in open("/proc/self/status"):
        if line.startswith(field):
            return int(line.split()[1])
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
@pytest.mark.slow
def test_memory_stays_below_one_matrix_of_similarities(S, d, limit):
    """Forward and backward at the paper's S = 18,480 add under 400 MB, where one S x S matrix has
    1,366.
    """
    assert limit < 4 * S * S
    run = [sys.executable, "-c", MEMORY_SCRIPT, str(S), str(d)]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(run, cwd=root, check=True, capture_output=True, text=True)
    extra = int(done.stdout) * 1024
    two_normalised_copies = 2 * (4 * S * d)  # at least so much, or the measure does not work
    assert two_normalised_copies < extra < limit
