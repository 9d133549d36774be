"""Muon against singular value decompositions, and against AdamW where it is that."""

import math

import pytest
import torch
from helpers import relative_error

from muon import Muon, orthogonalize


def by_decomposition(matrix):
    """The same iteration on the singular values alone: U p(p(p(p(p(S / |S|))))) Vᵀ in float64."""
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ vt, s


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)])
def test_orthogonalizing_is_a_polynomial_of_the_singular_values(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected, values = by_decomposition(matrix)
    assert (
        relative_error(orthogonalize(torch.stack((matrix, -2 * matrix)))[0], expected.float())
        < 1e-5
    )
    assert values.min() > 0.6 and values.max() < 1.25


def test_steps_equal_the_definition():
    """Orthogonalized Nesterov momentum for matrices and kernels, AdamW for the rest."""
    generator = torch.Generator().manual_seed(1)
    shapes = (6, 9), (4, 2, 3), (5,)
    matrix, kernel, vector = (
        torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes
    )
    optimizer = Muon(
        [matrix, kernel, vector], {matrix: 3.0, kernel: 1.5}, lr=0.01, weight_decay=0.1
    )
    plain = torch.nn.Parameter(vector.detach().clone())
    adamw = torch.optim.AdamW([plain], lr=0.01, weight_decay=0.1)
    expected = {p: (p.detach().flatten(1).double(), 0.0) for p in (matrix, kernel)}
    lr = {matrix: 0.03, kernel: 0.015}
    for _ in range(3):
        for p in (matrix, kernel, vector):
            p.grad = torch.randn(p.shape, generator=generator)
        plain.grad = vector.grad.clone()
        for p, (weight, momentum) in expected.items():
            gradient = p.grad.flatten(1).double()
            momentum = 0.95 * momentum + 0.05 * gradient
            update = (
                by_decomposition(0.05 * gradient + 0.95 * momentum)[0]
                * 0.2
                * math.sqrt(max(weight.shape))
            )
            expected[p] = weight * (1 - lr[p] * 0.1) - lr[p] * update, momentum
        optimizer.step()
        adamw.step()
    for p, (weight, _) in expected.items():
        assert relative_error(p.detach().flatten(1), weight.float()) < 1e-5
    assert torch.equal(vector, plain)


def test_a_zero_gradient_changes_nothing():
    matrix = torch.nn.Parameter(torch.ones(3, 5))
    matrix.grad = torch.zeros_like(matrix)
    Muon([matrix], {matrix: 1.0}, lr=0.1, weight_decay=0).step()
    assert torch.equal(matrix, torch.ones(3, 5))
