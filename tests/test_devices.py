"""Networks on another device than the clips, on machines that have only one.

The meta device stands for the other one: a tensor of `Elsewhere` says that it is there, and has
values all the same. What would mix a GPU and a CPU fails. (`FakeTensorMode`, which is made for
this, cannot slice tensors of a device that PyTorch was built without.)
"""

import functools

import pytest
import torch
from helpers import make_batch, make_clip, relative_error, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import sample
import train
from model import rope_table
from qwen import patch_layout

ELSEWHERE = torch.device("meta")
COPIES = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)


class Elsewhere(torch.Tensor):
    @staticmethod
    def __new__(cls, value):
        layout = (value.shape, value.stride(), value.storage_offset(), None, value.dtype)
        return torch.Tensor._make_wrapper_subclass(cls, *layout, device=ELSEWHERE)

    def __init__(self, value):
        self.value = value

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})


class TwoDevices(TorchDispatchMode):
    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})


def compute(operation, args, kwargs):
    """Run an operation on the CPU; what it makes is where its inputs are, or where it says."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    elsewhere = [x for x in tensors if isinstance(x, Elsewhere)]
    on_cpu = [x for x in tensors if not isinstance(x, Elsewhere) and x.ndim > 0]
    if elsewhere and on_cpu and operation not in COPIES:
        raise AssertionError(f"{operation} of tensors on two devices")
    stays = bool(elsewhere)
    if kwargs.get("device") is not None:
        stays = kwargs["device"].type == ELSEWHERE.type
        kwargs = kwargs | {"device": "cpu"}

    def value(x):
        return x.value if isinstance(x, Elsewhere) else x

    def place(x):
        if not isinstance(x, torch.Tensor) or not stays:
            return x
        changed = [given for given in elsewhere if given.value is x]  # in place
        return changed[0] if changed else Elsewhere(x)

    return tree_map(place, operation(*tree_map(value, args), **tree_map(value, kwargs)))


@pytest.fixture
def two_devices(monkeypatch):
    make = torch.tensor  # which makes no use of the mode

    def tensor(*values, device="cpu", **options):
        return make(*values, **options).to(device)

    monkeypatch.setattr(torch, "tensor", tensor)
    with TwoDevices():
        yield
    for cached in (rope_table, patch_layout):
        cached.cache_clear()


@pytest.mark.parametrize("num_frames", (1, 13))
@pytest.mark.parametrize("offload", (False, True))
def test_an_edit_is_the_same_on_another_device(two_devices, num_frames, offload):
    """Of a still, and in windows of 9 frames."""
    model, vae = tiny_model(max_frames=9)
    options = dict(frames=make_clip(num_frames, 40, 30), instruction="add snow", steps=2)
    edit = functools.partial(sample.edit_video, model, vae, keep_source=True, **options)
    expected = edit()
    if offload:
        frames = edit(device=ELSEWHERE)
        assert {p.device.type for p in (*model.parameters(), *vae.parameters())} == {"cpu"}
    else:
        model.to(ELSEWHERE)
        vae.to(ELSEWHERE)
        frames = edit()
    assert (frames.int() - expected.int()).abs().max() <= 1


def test_a_training_step_is_the_same_on_another_device(two_devices):
    model, vae = tiny_model()
    batch = make_batch(model, vae)
    losses, gradients = [], []
    for device in (torch.device("cpu"), ELSEWHERE):
        model.to(device)
        vae.to(device)
        loss, *_ = train.training_step(model, vae, train.to_device(batch, device), depth=2)
        loss.backward()
        losses.append(loss.item())
        gradients.append(model.dit.blocks[0].self_attn.q.weight.grad.cpu())
        model.zero_grad()
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert relative_error(*gradients) < 1e-4
