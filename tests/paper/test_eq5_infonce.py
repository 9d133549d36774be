"""§4.3, Eq. 4-5: the alignment loss is minus a symmetric InfoNCE between positions.

Shape letters: S positions, d width. Everything is in float64.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import make_features, relative_error, value_and_gradient

from losses import alignment_loss, info_nce_as_printed, symmetric_info_nce

TAU = 0.07


def test_the_printed_equation_is_what_a_double_loop_computes():
    a, a_ref = make_features(7, 5)
    rows = [row / row.norm() for row in a.detach()]  # ã_i
    refs = [row / row.norm() for row in a_ref]  # ã*_j

    def similarity(i, j):
        return math.exp(rows[i] @ refs[j] / TAU)

    total = 0.0
    for i in range(7):
        total += math.log(similarity(i, i) / sum(similarity(i, j) for j in range(7)))
        total += math.log(similarity(i, i) / sum(similarity(j, i) for j in range(7)))
    printed = info_nce_as_printed(a, a_ref, TAU)
    assert printed.item() == pytest.approx(total / (2 * 7), rel=1e-12)


@pytest.mark.parametrize("chunk", [1, 8, 50, 512])
def test_training_computes_the_equation_as_printed(chunk):
    """The form in chunks, with its own backward pass, has the same values and gradients."""
    a, a_ref = make_features(50, 16)
    value, gradient = value_and_gradient(symmetric_info_nce, a, a_ref, TAU, chunk)
    printed_value, printed_gradient = value_and_gradient(info_nce_as_printed, a, a_ref, TAU)
    assert relative_error(value, printed_value) < 1e-12
    assert relative_error(gradient, printed_gradient) < 1e-12


def test_the_alignment_loss_is_minus_the_estimate():
    """Eq. 4, for the one depth that is drawn."""
    a, a_ref = make_features(20, 8)
    assert torch.equal(alignment_loss(a, a_ref, TAU), -symmetric_info_nce(a, a_ref, TAU))


@pytest.mark.parametrize("tau", [0.07, 0.5])
def test_matched_orthonormal_features_have_a_closed_form(tau):
    """For them the loss is log(1 + (S - 1) e^(-1/τ))."""
    S = 24
    noise, _ = make_features(S, S)
    basis, _ = torch.linalg.qr(noise.detach())
    expected = math.log1p((S - 1) * math.exp(-1 / tau))
    assert alignment_loss(basis, basis, tau).item() == pytest.approx(expected, abs=1e-12)


def test_positions_that_look_alike_give_log_s():
    """Then nothing is known about which position matches which."""
    _, row = make_features(1, 8)
    loss = alignment_loss(row.expand(50, 8), 3 * row.expand(50, 8), TAU)
    assert loss.item() == pytest.approx(math.log(50), abs=1e-12)


def test_the_estimate_is_symmetric_in_its_arguments():
    a, a_ref = make_features(21, 5)
    swapped = symmetric_info_nce(a_ref, a, TAU)
    assert relative_error(swapped, symmetric_info_nce(a, a_ref, TAU)) < 1e-12


def test_a_single_position_has_nothing_to_align():
    """With no negatives (S = 1), the value and the gradient are exactly 0."""
    a, a_ref = make_features(1, 33)
    value, gradient = value_and_gradient(symmetric_info_nce, a, a_ref, TAU)
    assert value.item() == 0
    assert not gradient.any()


def test_features_count_by_their_direction():
    """Eq. 5 is on l2-normalised features: a scale for each position changes nothing."""
    a, a_ref = make_features(17, 5)
    scales = torch.logspace(-4, 4, 17, dtype=torch.float64)[:, None]
    scaled = symmetric_info_nce(a * scales, a_ref * scales.flip(0), TAU)
    assert relative_error(scaled, symmetric_info_nce(a, a_ref, TAU)) < 1e-12


def test_the_reference_branch_is_detached():
    """The reference features get no gradient, the editing features do."""
    a, a_ref = make_features(9, 4)
    a_ref.requires_grad_()
    alignment_loss(a, a_ref, TAU).backward()
    assert a_ref.grad is None
    assert a.grad.abs().max() > 0


def test_shared_weights_get_the_gradient_of_the_editing_branch_only():
    """Both branches come from the same weights, and the reference branch adds no gradient."""
    a, a_ref = (x.detach() for x in make_features(9, 4))
    weight = torch.eye(4, dtype=torch.float64).requires_grad_()
    _, shared = value_and_gradient(lambda w: alignment_loss(a @ w, a_ref @ w, TAU), weight)
    _, fixed = value_and_gradient(lambda w: alignment_loss(a @ w, a_ref, TAU), weight)
    assert fixed.abs().max() > 0
    assert torch.equal(shared, fixed)


def test_following_the_gradient_matches_each_position_to_its_own():
    """The loss falls, and in the end each position is nearest to its own reference."""
    a, a_ref = make_features(30, 8)
    first = alignment_loss(a, a_ref, TAU).item()
    for _ in range(50):
        last, gradient = value_and_gradient(alignment_loss, a, a_ref, TAU)
        a = (a - 5 * gradient).detach().requires_grad_()
    assert last.item() < first / 2
    similarity = F.normalize(a.detach(), dim=1) @ F.normalize(a_ref, dim=1).T  # (S, S)
    assert torch.equal(similarity.argmax(dim=1), torch.arange(30))
