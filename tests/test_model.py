"""The DiT against diffusers' Wan transformer on the same weights, and what Eq. 3, 4 ask of it."""

import copy
import dataclasses
import functools

import peers
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import randomise, relative_error
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import rvedit
from model import Block, DiTConfig, WanDiT, apply_rope, modulate, rope_table

CONFIG = DiTConfig(
    dim=48,
    ffn_dim=80,
    num_heads=2,
    num_blocks=3,
    in_channels=6,
    out_channels=6,
    patch_size=(1, 2, 2),
    freq_dim=32,
)


def build_pair(dtype=torch.float32):
    """Diffusers' transformer and ours with the same random weights, through our own key map."""
    ours = randomise(WanDiT(CONFIG)).to(dtype).eval()
    return peers.wan_transformer(ours), ours


SHAPES = {  # (B, C, T', H', W'), context tokens
    "one frame": ((1, 6, 1, 4, 6), 5),
    "portrait": ((1, 6, 3, 10, 4), 1),
    "landscape, batch 3": ((3, 6, 2, 4, 14), 9),
    "odd grid": ((2, 6, 5, 6, 10), 7),
}


@torch.no_grad()
def compare(dtype, shape, tokens):
    peer, ours = build_pair(dtype)
    z_t = torch.randn(shape, dtype=dtype)
    t = torch.rand(shape[0])
    context = torch.randn(shape[0], tokens, CONFIG.dim, dtype=dtype)
    expected = peer(z_t, 1000 * t, context, return_dict=False)[0]
    return relative_error(ours(z_t, t, [context] * CONFIG.num_blocks), expected)


@pytest.mark.parametrize("shape, tokens", SHAPES.values(), ids=SHAPES)
def test_float32_equals_diffusers(shape, tokens):
    """The same weights give the same velocity as diffusers.WanTransformer3DModel."""
    assert compare(torch.float32, shape, tokens) < 1e-5


@pytest.mark.parametrize("shape, tokens", SHAPES.values(), ids=SHAPES)
def test_bfloat16_equals_diffusers(shape, tokens):
    """In bf16 too, up to bf16's rounding."""
    assert compare(torch.bfloat16, shape, tokens) < 2e-2


def official_attention(attention, x, context, rope=None):
    """As in wan/modules/model.py: queries and keys are float32 from the norms to the product."""

    def norm(layer, y):
        return F.rms_norm(y.float(), y.shape[-1:], eps=layer.eps).type_as(y) * layer.weight

    heads = (attention.num_heads, -1)
    q = norm(attention.norm_q, attention.q(x)).unflatten(-1, heads)
    k = norm(attention.norm_k, attention.k(context)).unflatten(-1, heads)
    v = attention.v(context).unflatten(-1, heads)
    if rope is not None:
        q, k = apply_rope(q, rope), apply_rope(k, rope)
    q, k, v = (y.bfloat16().transpose(1, 2) for y in (q, k, v))
    return attention.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@torch.autocast("cpu", dtype=torch.bfloat16)
def official_bf16(dit, z_t, t, context):
    """A float32 model as the official code runs it in bf16: by autocast, with float32 regions."""

    def modulated(x, shift, scale):
        return F.layer_norm(x.float(), x.shape[-1:], eps=dit.config.eps) * (1 + scale) + shift

    with torch.autocast("cpu", enabled=False):
        time, block_time = dit._embed_time(t)
    x = dit.patch_embedding(z_t)
    rope = rope_table(tuple(x.shape[2:]), dit.config.dim // dit.config.num_heads, x.device)
    x = x.flatten(2).transpose(1, 2)
    for block in dit.blocks:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = (block.modulation + block_time).chunk(
            6, dim=1
        )
        y = modulated(x, shift_1, scale_1)
        x = x + official_attention(block.self_attn, y, y, rope) * gate_1
        x = x + official_attention(block.cross_attn, block.norm3(x), context)
        x = x + block.ffn(modulated(x, shift_2, scale_2)) * gate_2
    with torch.autocast("cpu", enabled=False):
        return dit._unpatchify(dit.head(x, time), z_t.shape)


@torch.no_grad()
def test_bfloat16_loses_no_more_than_the_official_recipe():
    """30 blocks, 384 wide: the error against float32 is at most that of the official autocast.

    Their ratio differs from model to model, with a standard deviation of 0.09 around 0.94, so it is
    a mean of four. With a residual stream in bf16 it was 2.5 to 3.
    """
    config = dataclasses.replace(CONFIG, dim=384, ffn_dim=768, num_heads=4, num_blocks=30)
    ratios = []
    for seed in range(4):
        torch.manual_seed(seed)
        dit = randomise(WanDiT(config)).bfloat16().float().eval()  # weights that bf16 can hold
        z_t, t = torch.randn(1, 6, 2, 4, 4), torch.tensor([0.7])
        context = torch.randn(1, 4, config.dim).bfloat16().float()
        exact = dit(z_t, t, [context] * 30)
        official_error = (official_bf16(dit, z_t, t, context) - exact).norm()
        error = (dit.bfloat16()(z_t, t, [context.bfloat16()] * 30) - exact).norm()
        assert error > 1e-3 * exact.norm()
        ratios.append((error / official_error).item())
    assert sum(ratios) / len(ratios) < 1.1


def test_the_stream_stays_float32_under_fsdp2_and_checkpointing():
    """Blocks with gathered bf16 weights that are recomputed give what a bf16 model gives."""
    inputs = torch.randn(1, 6, 2, 4, 6), torch.tensor([0.7]), [torch.randn(1, 4, CONFIG.dim)] * 3
    dit = randomise(WanDiT(CONFIG))
    in_bf16 = copy.deepcopy(dit).bfloat16()
    expected = in_bf16(*inputs)
    expected.square().sum().backward()

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=False)
        dtypes = []
        for block in dit.blocks:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
            fully_shard(block, mesh=init_device_mesh("cpu", (1,)), mp_policy=policy)
            block.register_forward_hook(lambda _, __, out: dtypes.append(out[0].dtype))
        fully_shard(dit, mesh=init_device_mesh("cpu", (1,)), mp_policy=policy)
        velocity = dit(*inputs)
        velocity.square().sum().backward()
        gradient = dit.blocks[0].ffn[0].weight.grad.full_tensor()
    finally:
        dist.destroy_process_group()
    assert dtypes == [torch.float32] * 3
    assert torch.equal(velocity, expected)
    assert relative_error(gradient, in_bf16.blocks[0].ffn[0].weight.grad) < 1e-2


class ElementwiseBytes(TorchDispatchMode):
    """Bytes that operations read and write, without views, products and attention."""

    VIEWS = "view _unsafe_view t transpose permute unsqueeze expand split slice select alias detach"
    UNCOUNTED = {*VIEWS.split(), "unbind", "empty_like", "mm", "addmm", "bmm"}

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if operation.overloadpacket.__name__ not in self.UNCOUNTED:
            tensors = [x for x in tree_leaves((args, kwargs, result)) if torch.is_tensor(x)]
            self.total += sum(x.nbytes for x in tensors)
        return result


@torch.no_grad()
def test_a_full_size_block_passes_over_9_gb_of_activations(monkeypatch):
    """At 81 x 704 x 1280 in bf16; with casts around norms and AdaLN after them it was 15.2 GB."""

    def fused_norm(x, shape, weight, eps):  # one kernel on GPUs; the meta device takes it apart
        passes.total += 2 * x.nbytes
        return torch.empty_like(x)

    def fused_attention(q, k, v, attn_mask):
        return torch.empty_like(q.transpose(1, 2)).transpose(1, 2)

    monkeypatch.setattr(F, "rms_norm", fused_norm)
    monkeypatch.setattr(F, "scaled_dot_product_attention", fused_attention)
    config = rvedit.preset("wan2.2-ti2v-5b").dit
    with torch.device("meta"):
        block = Block(config).bfloat16()
        x, time = torch.empty(1, 18_480, config.dim), torch.empty(1, 6, config.dim)
        rope = torch.empty(18_480, 1, 128), torch.empty(18_480, 1, 128)
        context = torch.empty(1, 512, config.dim, dtype=torch.bfloat16)
        with ElementwiseBytes() as passes:
            block(x, time, rope, context)
    assert 8e9 < passes.total < 9e9


def test_scale_and_shift_inside_the_norm_are_those_after_it():
    """B = 1 folds AdaLN into the norm: each sample comes out as in a minibatch, gradients too."""
    x = torch.randn(2, 7, 48, requires_grad=True)
    shift, scale = torch.randn(2, 2, 1, 48, requires_grad=True)
    together = modulate(x, shift, scale, eps=1e-6)
    singly = [modulate(x[i : i + 1], shift[i : i + 1], scale[i : i + 1], eps=1e-6) for i in (0, 1)]
    singly = torch.cat(singly)
    assert relative_error(singly, together) < 1e-6
    gradients = [torch.autograd.grad(y.pow(3).sum(), (x, shift, scale)) for y in (singly, together)]
    for actual, expected in zip(*gradients, strict=True):
        assert relative_error(actual, expected) < 1e-5


def test_pytorchs_norms_compute_in_float32_on_their_own():
    """RMS norm of bf16 is the rounded float32 one, which is why it stands without casts."""
    x = torch.randn(64, 384).bfloat16() * 3
    weight = 1 + torch.randn(384).bfloat16() / 3
    exact = F.rms_norm(x.float(), (384,), weight.float(), 1e-6)
    assert torch.equal(F.rms_norm(x, (384,), weight, 1e-6), exact.bfloat16())


def random_dit():
    dit = WanDiT(CONFIG).eval()
    randomise(dit)
    return dit


def random_inputs(batch=2, tokens=(4, 7, 7)):
    z_t, source = torch.randn(2, batch, 6, 2, 4, 6)
    return z_t, torch.rand(batch), [torch.randn(batch, n, CONFIG.dim) for n in tokens], source


@torch.no_grad()
def test_each_block_reads_its_own_context():
    """Ours with three contexts gives what diffusers' blocks give when hooks feed them those."""
    peer, ours = build_pair()
    z_t, t, contexts, _ = random_inputs()
    for block, context in zip(peer.blocks, contexts, strict=True):
        block.register_forward_pre_hook(
            lambda _, args, context=context: (args[0], context, *args[2:])
        )
    expected = peer(z_t, 1000 * t, contexts[0], return_dict=False)[0]
    assert relative_error(ours(z_t, t, contexts), expected) < 1e-5


def test_positions_are_spread_over_the_home_grid():
    """At home tokens count 0, 1, 2, ...; on half as many each stands in the middle of two."""
    cpu = torch.device("cpu")
    at_home = rope_table((2, 4, 6), 32, cpu, home_grid=(4, 6))
    for spread, counted in zip(at_home, rope_table((2, 4, 6), 32, cpu), strict=True):
        assert torch.equal(spread, counted)
    cos, _ = rope_table((2, 2, 3), 32, cpu, home_grid=(4, 6))
    cos = cos.view(2, 2, 3, 32)
    # Of 16 pairs of channels 6 turn with time, 5 with the row and 5 with the column; the first of
    # each by one radian a position.
    time, row, column = cos[..., 0], cos[..., 12], cos[..., 22]
    assert torch.allclose(time[:, 0, 0], torch.tensor([0.0, 1.0]).cos())
    assert torch.allclose(row[0, :, 0], torch.tensor([0.5, 2.5]).cos())
    assert torch.allclose(column[0, 0], torch.tensor([0.5, 2.5, 4.5]).cos())


@torch.no_grad()
def test_the_home_grid_reaches_the_dit():
    """A DiT with a home grid is another function at other sizes, and the same at home."""
    dit, (z_t, t, contexts, source) = random_dit(), random_inputs()
    spread = WanDiT(dataclasses.replace(CONFIG, home_grid=(99, 99)))
    spread.load_state_dict(dit.state_dict())
    counted = dit(z_t, t, contexts, source)
    assert relative_error(spread(z_t, t, contexts, source), counted) > 1e-3
    grid = [side // CONFIG.patch_size[1] for side in z_t.shape[3:]]
    spread.config = dataclasses.replace(CONFIG, home_grid=grid)
    assert torch.equal(spread(z_t, t, contexts, source), counted)


def test_rope_is_the_same_when_compiled():
    """Compiled, RoPE gives the same, gradients included."""
    rope = rope_table((2, 3, 4), 24, torch.device("cpu"))
    x = torch.randn(2, 24, 3, 24, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(apply_rope, backend="eager", fullgraph=True)
    results = [rotate(x, rope) for rotate in (compiled, apply_rope)]
    gradients = [torch.autograd.grad(y.pow(3).sum(), x)[0] for y in results]
    assert relative_error(*results) < 1e-6 and relative_error(*gradients) < 1e-6


@torch.no_grad()
def test_masked_tokens_do_not_exist():
    """A context with masked rows gives what the shorter context gives, in each row of a batch."""
    dit, (z_t, t, _, source) = random_dit(), random_inputs()
    context = torch.randn(2, 7, CONFIG.dim)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [0, 1, 0, 1, 1, 0, 1]], dtype=torch.bool)
    together = dit(z_t, t, [(context, mask)] * 3, source)
    for i in range(2):
        alone = dit(
            z_t[i : i + 1], t[i : i + 1], [context[i : i + 1, mask[i]]] * 3, source[i : i + 1]
        )
        assert relative_error(together[i : i + 1], alone) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("block", [1, 2, 3])
def test_features_are_the_cross_attention_output_bit_for_bit(block):
    """A^(l) is what cross_attn of block l returns, whether the pass stops there or goes on."""
    dit, (z_t, t, contexts, source) = random_dit(), random_inputs()
    seen = {}
    for number, module in enumerate(dit.blocks, start=1):
        module.cross_attn.register_forward_hook(
            lambda _, __, out, number=number: seen.update({number: out})
        )
    velocity, captured = dit(z_t, t, contexts, source, capture=block)
    assert torch.equal(captured, seen[block])
    seen.clear()
    assert torch.equal(dit.features(z_t, t, contexts, source, block), captured)
    assert max(seen) == block  # the pass really ended there
    assert torch.equal(dit(z_t, t, contexts, source), velocity)


@torch.no_grad()
def test_source_latents_enter_scaled_by_t():
    """patch_embed(z_t) + t · source_embed(v), written the naive way, token by token."""
    dit, (z_t, t, contexts, source) = random_dit(), random_inputs()
    received = []
    dit.blocks[0].register_forward_pre_hook(lambda _, args: received.append(args[0]))
    dit(z_t, t, contexts, source)
    embed, embed_source = dit.patch_embedding, dit.source_embedding
    # Sample, row and column of a token in the second latent frame.
    for b, i, j in [(0, 0, 0), (1, 1, 2)]:
        rows, columns = slice(2 * i, 2 * i + 2), slice(2 * j, 2 * j + 2)
        patch = z_t[b, :, 1, rows, columns].flatten()
        source_patch = source[b, :, 1, rows, columns].flatten()
        token = embed.weight.flatten(1) @ patch + embed.bias
        token += t[b] * (embed_source.weight.flatten(1) @ source_patch + embed_source.bias)
        assert relative_error(received[0][b, 6 + 3 * i + j], token) < 1e-5


@torch.no_grad()
def test_kiwi_edits_timestep_is_rounded_to_bfloat16():
    """With bf16_timestep, t = 0.7012 is embedded as 0.700: 1000·t becomes a multiple of 4.

    By default it is embedded as it is; and it always scales the source as it is.
    """
    dit, (z_t, _, contexts, source) = random_dit(), random_inputs()
    t, rounded = torch.full((2,), 0.7012), torch.full((2,), 0.700)
    rounding = WanDiT(dataclasses.replace(CONFIG, bf16_timestep=True)).eval()
    rounding.load_state_dict(dit.state_dict())
    assert torch.equal(rounding(z_t, t, contexts), dit(z_t, rounded, contexts))
    assert not torch.equal(dit(z_t, t, contexts), dit(z_t, rounded, contexts))

    tokens = [model._embed(z_t, t, source)[0] for model in (dit, rounding)]
    assert torch.equal(*tokens)


def test_a_sampling_pass_does_not_spoil_training():
    """RoPE tables first made under inference_mode can be differentiated through later."""
    dit, (z_t, t, contexts, _) = random_dit(), random_inputs()
    z_t = torch.cat((z_t, z_t), dim=3)  # a grid of its own, so that this test makes the table
    with torch.inference_mode():
        dit(z_t, t, contexts)
    dit(z_t, t, contexts).sum().backward()
    assert dit.blocks[0].self_attn.q.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(contexts=[torch.zeros(2, 1, 48)] * 2), "2 contexts for 3 blocks"),
        (dict(z_t=torch.zeros(2, 6, 2, 5, 6)), "do not divide into patches"),
        (dict(source_latents=torch.zeros(2, 6, 1, 4, 6)), "beside z_t"),
    ],
)
def test_wrong_shapes_are_named(change, message):
    z_t, t, contexts, source = random_inputs()
    arguments = dict(z_t=z_t, t=t, contexts=contexts, source_latents=source) | change
    with pytest.raises(ValueError, match=message):
        WanDiT(CONFIG)(**arguments)
