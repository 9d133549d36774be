"""The DiT against diffusers' Wan transformer on the same weights, and what Eq. 3, 4 ask of it."""

import peers
import pytest
import torch
from helpers import randomise, relative_error

from model import DiTConfig, WanDiT, apply_rope, rope_table

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


def random_dit():
    dit = WanDiT(CONFIG).eval()
    randomise(dit)  # source_embedding included, which starts at zero
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
def test_a_new_source_embedding_changes_nothing():
    """Before training, the backbone with a source clip is the backbone without one."""
    dit, (z_t, t, contexts, source) = WanDiT(CONFIG), random_inputs()
    assert torch.equal(dit(z_t, t, contexts, source), dit(z_t, t, contexts))


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
