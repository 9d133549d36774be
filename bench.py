"""How fast, and in how much memory: each part of the system beside its FLOPs, counted from shapes.

    python bench.py                                                             # the toy preset, on any machine
    python bench.py --preset wan2.2-ti2v-5b --peer                              # full size on a GPU, beside its peers
    python bench.py --preset wan2.2-ti2v-5b --growth --parts dit decode         # 17 to 81 frames at 480p and 720p
    python bench.py --preset wan2.2-ti2v-5b --shrink 4 --size 9 128 160 --peer  # its proportions, for a CPU

Weights and clips are random, which changes no amount of work. What is compared runs in turn, so that whatever else the
machine does meets both, and ratios are taken round by round. Printed are medians, with the quartiles in brackets.

FLOPs: 2·m·k·n for a product of (m, k) and (k, n), likewise for convolutions; causal attention in full; a backward pass
as two forward passes; what is recomputed does not count. "Of peak" is their rate over that of the fastest large matrix
product in this dtype on this machine, which is called MFU. Memory is the peak, weights included: on a GPU what the
allocator gave out, else what Linux had resident of the process (VmHWM).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from tqdm import tqdm

import rvedit
import train
import video
from losses import symmetric_info_nce
from mllm import QwenConfig, VisionConfig
from model import DiTConfig
from rvedit import RVEDiT, RVEDiTConfig
from sample import Parser, device_of, edit_video, fail, number
from vae import VAEConfig, WanVAE

Size = tuple[int, int, int]  # T, H, W
Runs = dict[str, Callable[[], Tensor]]  # "ours", and perhaps another that does the same
PARTS = ("dit", "step", "info_nce", "encode", "decode", "mllm", "edit")
GROWTH = [(frames, *sides) for sides in ((480, 832), (704, 1280)) for frames in (17, 33, 49, 81)]

# --- FLOPs ------------------------------------------------------------------------------------------------------------


def dit_flops(config: DiTConfig, tokens: int, contexts: list[int], source: bool = True, head: bool = True) -> int:
    """A pass over S tokens through as many blocks as there are contexts, of N tokens each."""
    d, patch = config.dim, math.prod(config.patch_size)
    embeddings = 2 * tokens * d * patch * config.in_channels * (1 + source) + 2 * d * (config.freq_dim + 7 * d)
    # Of a token q, k, v, o, cross-attention's q and o, and the feed-forward; of a context token k and v.
    linear = sum(2 * tokens * d * (6 * d + 2 * config.ffn_dim) + 4 * n * d * d for n in contexts)
    attention = sum(4 * tokens * (tokens + n) * d for n in contexts)
    return embeddings + linear + attention + head * 2 * tokens * d * patch * config.out_channels


def vae_flops(config: VAEConfig, size: Size) -> tuple[int, int]:
    """Encoding and decoding; the first frame, a chunk by itself, takes no part in resampling time."""

    def conv(grid: Size, inside: int, outside: int, kernel: int = 27) -> int:
        return 2 * math.prod(grid) * inside * outside * kernel

    def residuals(grid: Size, inside: int, outside: int, number: int) -> int:
        first = conv(grid, inside, outside) + (inside != outside) * conv(grid, inside, outside, 1)
        return first + (2 * number - 1) * conv(grid, outside, outside)

    def middle(grid: Size, dim: int) -> int:
        attention = 4 * math.prod(grid) * grid[1] * grid[2] * dim
        return residuals(grid, dim, dim, 2) + conv(grid, dim, 4 * dim, 1) + attention

    pixels, z, temporal = 3 * config.patch_size**2, config.z_dim, config.temporal_downsample
    grids = [(size[0], size[1] // config.patch_size, size[2] // config.patch_size)]  # of each stage of the encoder
    for halve in temporal:
        t, h, w = grids[-1]
        grids.append(((t - 1) // (1 + halve) + 1, h // 2, w // 2))
    dims, last = [config.dim * m for m in (1, *config.dim_mult)], grids[-1]
    encode = conv(grids[0], pixels, dims[0]) + middle(last, dims[-1])
    encode += conv(last, dims[-1], 2 * z) + conv(last, 2 * z, 2 * z, 1)
    encode += sum(map(residuals, grids, dims, dims[1:], [config.num_res_blocks] * len(grids)))
    for (t, _, _), (shorter, h, w), dim, halve in zip(grids, grids[1:], dims[1:], temporal, strict=False):
        encode += conv((t, h, w), dim, dim, 9) + halve * conv((shorter - 1, h, w), dim, dim, 3)

    grids, dims = grids[::-1], [config.dec_dim * m for m in (config.dim_mult[-1], *config.dim_mult[::-1])]
    decode = conv(last, z, z, 1) + conv(last, z, dims[0]) + middle(last, dims[0]) + conv(grids[-1], dims[-1], pixels)
    decode += sum(map(residuals, grids, dims, dims[1:], [config.num_res_blocks + 1] * len(grids)))
    for (t, h, w), larger, dim, double in zip(grids, grids[1:], dims[1:], temporal[::-1], strict=False):
        decode += double * conv((t - 1, h, w), dim, 2 * dim, 3) + conv(larger, dim, dim, 9)
    return encode, decode


def vision_flops(config: VisionConfig, out_dim: int, grid: Size) -> int:
    """The MLLM's vision tower over a (t, h, w) grid of patches, which attend within a frame or a window of it."""
    (t, h, w), d, merge = grid, config.hidden_size, config.spatial_merge_size
    side = config.window_size // (config.patch_size * merge) * merge  # of a window, in patches
    squares = [n // side * side**2 + (n % side) ** 2 for n in (h, w)]
    full = sum(block < config.depth for block in config.fullatt_block_indexes)
    pairs = full * (h * w) ** 2 + (config.depth - full) * math.prod(squares)
    patch = 3 * config.temporal_patch_size * config.patch_size**2
    linear = config.depth * (4 * d * d + 3 * d * config.intermediate_size) + patch * d
    return 2 * t * h * w * (linear + d * (merge**2 * d + out_dim)) + 4 * t * pairs * d


def language_flops(config: QwenConfig, tokens: int, rank: int) -> tuple[int, int]:
    """The language tower: products with its own weights; attention and a LoRA of that rank."""
    d, kv = config.hidden_size, config.hidden_size * config.num_key_value_heads // config.num_attention_heads
    own = 2 * tokens * (2 * d * d + 2 * d * kv + 3 * d * config.intermediate_size)
    lora = 2 * tokens * rank * (6 * d + 2 * kv)
    return config.num_hidden_layers * own, config.num_hidden_layers * (4 * tokens**2 * d + lora)


def flops(config: RVEDiTConfig, size: Size, inputs: tuple[Any, ...], steps: int) -> dict[str, int]:
    """Of each part, for a clip and what the MLLM reads of it (`EditEncoder.prepare`)."""
    K, L, D, d = config.num_editing_tokens, config.dit.num_blocks, config.qwen.hidden_size, config.dit.dim
    S = ((size[0] - 1) // config.vae.temporal_factor + 1) * size[1] * size[2] // config.spatial_factor**2
    (_, N), grid, (spans,) = inputs[0].shape, inputs[2][0].tolist(), inputs[4]
    everything = K + sum(span.stop - span.start for span in spans)  # editing, visual and textual tokens
    contexts = [K] * config.routing_depth + [everything] * (L - config.routing_depth)
    dit, (encode, decode) = dit_flops(config.dit, S, contexts), vae_flops(config.vae, size)
    vision, (own, rest) = vision_flops(config.qwen.vision, D, grid), language_flops(config.qwen, N, config.lora_rank)
    rest += 2 * everything * (D * d + d * d)  # connectors
    mllm, info_nce = vision + own + rest, 2 * 2 * S * S * d
    work = dict(dit=dit, info_nce=info_nce, encode=encode, decode=decode, mllm=mllm)
    # With LoRA the vision tower and the weights under it get no gradient; the toy trains whole.
    backward = own + 2 * rest if config.lora_rank else 2 * mllm
    work["literal step"] = 2 * encode + 2 * mllm + backward + 4 * dit + info_nce
    work["step"] = work["literal step"] - dit + dit_flops(config.dit, S, contexts[: (L + 1) // 2], head=False)
    work["dit as Wan's"] = dit_flops(config.dit, S, [K] * L, source=False)
    work["mllm as Qwen's"] = vision + sum(language_flops(config.qwen, N, 0))
    return work | {"edit": encode + mllm + steps * dit + decode}


# --- Algorithm 1 to the letter, which `train.training_step` is measured against ---------------------------------------


def literal_info_nce(a: Tensor, a_ref: Tensor, temperature: float) -> Tensor:
    """Î of Eq. 5 from all S x S similarities at once, for features (B, S, d)."""
    logits = F.normalize(a.float(), dim=-1) @ F.normalize(a_ref.detach().float(), dim=-1).mT / temperature
    return (logits.log_softmax(1) + logits.log_softmax(2)).diagonal(dim1=1, dim2=2).mean() / 2


def literal_step(model: RVEDiT, vae: WanVAE, batch: train.Batch, depth: int) -> Tensor:
    """The loss of lines 4-19 as printed: two whole passes, which record every block's features; then one is read."""
    with torch.no_grad():
        source, target = (vae.encode(video.to_float(clip)) for clip in (batch.source, batch.target))
    t = batch.t.view(-1, 1, 1, 1, 1)
    z_t = (1 - t) * target + t * batch.noise
    features: list[Tensor] = []  # of all blocks, in the editing branch, then in the reference branch
    hooks = [block.register_forward_hook(lambda _, __, out: features.append(out[1])) for block in model.dit.blocks]
    velocity = model.dit(z_t, batch.t, model.contexts(model.encoder.encode(batch.edit_inputs)), source)
    with torch.no_grad():
        model.dit(z_t, batch.t, model.contexts(model.encoder.encode(batch.ref_inputs)), target)
    for hook in hooks:
        hook.remove()
    a, a_ref = features[depth - 1], features[len(hooks) + depth - 1]
    align = -literal_info_nce(a, a_ref, model.config.temperature)
    return F.mse_loss(velocity, batch.noise - target) + model.config.align_weight * align


# --- What is timed ----------------------------------------------------------------------------------------------------


def shrink(config: RVEDiTConfig, by: int) -> RVEDiTConfig:
    """Widths, heads and depths divided; the width of a head, the latents and the numbers of tokens stay."""
    names = "dim dec_dim ffn_dim hidden_size intermediate_size num_heads num_attention_heads num_key_value_heads "
    names += "num_blocks routing_depth depth num_hidden_layers"

    def divide(fields: dict[str, Any]) -> dict[str, Any]:
        divided = {name: -(-value // by) for name, value in fields.items() if name in names.split()}
        return fields | divided | {name: divide(value) for name, value in fields.items() if isinstance(value, dict)}

    return RVEDiTConfig(**divide(dataclasses.asdict(config)))


@torch.no_grad()
def random_networks(config: RVEDiTConfig, device: torch.device, dtype: torch.dtype) -> tuple[RVEDiT, WanVAE]:
    """In the dtypes of `rvedit.load`. Drawn in place: `rvedit.initialise` takes minutes for the full size."""
    ids = {"word": 0, "<|video_pad|>": config.qwen.video_token_id, "<|object_ref_start|>": config.qwen.query_token_id}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="word"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with torch.device("meta"):
        model, vae = RVEDiT(config, tokenizer), WanVAE(config.vae)
    for part in (model, vae.conv2, vae.decoder):
        part.to(dtype)
    for p in (*model.to_empty(device=device).parameters(), *vae.to_empty(device=device).parameters()):
        p.normal_(0.0, p[0].numel() ** -0.5) if p.ndim > 1 else p.uniform_(0.5, 1.5)
    for name, p in model.named_parameters():  # trained as in train.py
        p.requires_grad_(not config.lora_rank or "encoder.qwen" not in name or ".lora_" in name)
    return model.eval(), vae.eval().requires_grad_(False)


def parts(model: RVEDiT, vae: WanVAE, size: Size, args: argparse.Namespace) -> tuple[dict[str, Runs], dict[str, int]]:
    """What to run for each part, and its FLOPs."""
    factors, text, device = (vae.config.temporal_factor, model.config.spatial_factor), "make it snow", args.device
    if (size[0] - 1) % factors[0] or size[1] % factors[1] or size[2] % factors[1]:
        raise ValueError("--size {} {} {}: take {}k + 1 frames with sides in multiples of {}".format(*size, *factors))
    model.config = config = dataclasses.replace(model.config, max_frames=size[0], max_pixels=size[1] * size[2])
    clips = torch.randint(0, 256, (2, 1, *size, 3), dtype=torch.uint8)
    inputs = model.encoder.prepare([clips[0, 0]], [text])
    grid = (size[0] - 1) // factors[0] + 1, size[1] // vae.config.spatial_factor, size[2] // vae.config.spatial_factor
    z, noise = torch.randn(2, 1, vae.config.z_dim, *grid, device=device)
    t = torch.full((1,), 0.5, device=device)
    batch = train.Batch(*clips.to(device), t, noise, inputs, inputs, 0)
    films = video.to_float(batch.source)
    with torch.no_grad():
        contexts = model.contexts(model.encoder.encode(inputs))
        a_ref = model.dit.features(z, t, contexts, noise, 1)
    a = torch.randn_like(a_ref, requires_grad=True)

    def step(loss_of: Callable[..., Tensor]) -> Tensor:
        loss = loss_of(model, vae, batch, (config.dit.num_blocks + 1) // 2)  # the mean of the depths in Eq. 4
        loss.backward()
        model.zero_grad()
        return loss.detach()

    def info_nce(estimate: Callable[..., Tensor]) -> Tensor:
        return torch.autograd.grad(estimate(a, a_ref, config.temperature), a)[0]

    runs = {
        "dit": {"ours": lambda: model.dit(z, t, contexts, noise)},
        "step": {"ours": lambda: step(lambda *x: train.training_step(*x)[0]), "literal": lambda: step(literal_step)},
        "info_nce": {"ours": lambda: info_nce(symmetric_info_nce), "literal": lambda: info_nce(literal_info_nce)},
        "encode": {"ours": lambda: vae.encode(films)},
        "decode": {"ours": lambda: vae.decode(z)},
        "mllm": {"ours": lambda: model.encoder.encode(inputs)},
        "edit": {"ours": lambda: edit_video(model, vae, clips[0, 0], text, args.steps)},
    }
    if args.peer:
        from tests import peers  # which needs requirements-dev.txt

        runs |= peers.runs(model, vae, z, t, contexts[0][0], films, inputs, args.compile)
    return runs, flops(config, size, inputs, args.steps)


# --- Timing, and the command line -------------------------------------------------------------------------------------


def timed(run: Callable[[], Any], device: torch.device) -> tuple[float, int]:
    """Seconds, and the most bytes held meanwhile, 0 where nobody counts them."""
    cuda, clear = device.type == "cuda", Path("/proc/self/clear_refs")
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    elif clear.exists():
        clear.write_text("5")  # forget the former peak
    start = time.perf_counter()
    run()
    if cuda:
        torch.cuda.synchronize()
    took, status = time.perf_counter() - start, clear.with_name("status")
    if cuda:
        return took, torch.cuda.max_memory_allocated()
    return took, 1024 * int(status.read_text().partition("VmHWM:")[2].split()[0]) if status.exists() else 0


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of some square products."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    return 2 * n**3 / min(timed(lambda: a @ b, device)[0] for _ in range(20))


def measure(name: str, runs: Runs, rounds: int, device: torch.device) -> dict[str, Any]:
    """Seconds and bytes of each; with two of them also how far their results differ."""
    results = [run() for run in runs.values()]  # compiles, and fills caches
    row: dict[str, Any] = {"part": name, "seconds": {who: [] for who in runs}, "bytes": dict.fromkeys(runs, 0)}
    if len(results) > 1:
        row["difference"] = ((results[0] - results[1]).abs().max() / results[1].abs().max()).item()
    results.clear()
    for i in tqdm(range(rounds), desc=name, unit="round", disable=None, leave=False):
        for who in list(runs)[:: 1 if i % 2 else -1]:
            took, held = timed(runs[who], device)
            row["seconds"][who].append(took)
            row["bytes"][who] = max(held, row["bytes"][who])
    return row


def spread(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.3g} ({low:.3g}-{high:.3g})"


def line(row: dict[str, Any], peak: float) -> str:
    """Of the table."""
    (_, ours), *others = row["seconds"].items()
    rate, clip = row["flops"] / statistics.median(ours), "x".join(map(str, row["size"]))
    text = f"| {row['part']} | {clip} | {spread(ours)} | {row['flops'] / 1e12:.4g} | {rate / 1e12:.3g} "
    text += f"| {rate / peak:.0%} | {row['bytes']['ours'] / 1e9:.3g} |"
    for who, theirs in others:
        ratios = [their / our for our, their in zip(ours, theirs, strict=True)]
        text += f" {who} | {spread(ratios)}, counted {row['counted']:.3f} | {row['bytes'][who] / 1e9:.3g} "
        text += f"| {row['difference']:.0e} |"
    return text if others else text + " |" * 4


def bench(args: argparse.Namespace) -> None:
    config, dtype, cuda = rvedit.preset(args.preset), getattr(torch, args.dtype), args.device.type == "cuda"
    model, vae = random_networks(shrink(config, args.shrink), args.device, dtype)
    train.shard(model, None, train.RECIPES[args.preset]["recompute"] and "step" in args.parts, args.compile)
    peak, rows = matmul_peak(args.device, dtype), []
    machine = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} threads of {platform.machine()}"
    about = f"{machine}, torch {torch.__version__}, {args.dtype}{', compiled' * args.compile}"
    print(f"{about}; matrix products reach {peak / 1e12:.3g} TFLOP/s\n")
    print("| part | clip | seconds | TFLOP | TFLOP/s | of peak | GB | beside | takes times | GB | differs by |")
    print("|" + " --- |" * 11)
    for size in args.size:
        runs, work = parts(model, vae, size, args)
        for name, candidates in runs.items():
            if name.split()[0] in args.parts:
                candidates = candidates if args.peer else {"ours": candidates["ours"]}
                with torch.set_grad_enabled(name in ("step", "info_nce")):
                    row = measure(name, candidates, args.rounds, args.device) | dict(size=size, flops=work[name])
                row["counted"] = work.get(f"literal {name}", work[name]) / work[name]
                rows.append(row)
                print(line(row, peak), flush=True)
                partial = args.out.with_name(f".{args.out.name}.partial")
                partial.write_text(json.dumps(dict(about=about, matmul=peak, rows=rows), indent=1), encoding="utf-8")
                partial.replace(args.out)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description="Time each part of the system beside its FLOPs.", allow_abbrev=False)
    add, cuda = parser.add_argument, torch.cuda.is_available()
    add("--preset", choices=train.RECIPES, default="toy", help="default: toy")
    add("--shrink", type=int, choices=(1, 2, 4), default=1, help="divide all widths and depths by this, for a CPU")
    add("--size", type=number(int, 1), nargs=3, action="append", metavar=("T", "H", "W"), help="of a clip; repeatable")
    add("--growth", dest="size", action="store_const", const=GROWTH, help="17 to 81 frames at 480p and 720p")
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    add("--peer", action="store_true", help="beside diffusers, transformers and Algorithm 1 to the letter")
    add("--compile", action="store_true", help="the blocks of DiT and MLLM, on both sides")
    add("--rounds", type=number(int, 2), default=7, help="default: 7")
    add("--steps", type=number(int, 1), default=50, help="of the edit (default 50)")
    add("--device", type=device_of, default="cuda" if cuda else "cpu", help="default: a GPU if there is one")
    add("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, else float32")
    add("--out", type=Path, default=Path("bench.json"), help="the measurements as JSON (default bench.json)")
    args = parser.parse_args(argv)
    args.dtype = args.dtype or ("bfloat16" if args.device.type == "cuda" else "float32")
    args.size = args.size or [train.RECIPES[args.preset]["size"]]
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    try:
        bench(args)
    except torch.OutOfMemoryError:
        fail(f"out of memory on {args.device}: take fewer --parts, a smaller --size, or --shrink")
    except ImportError as error:
        fail(f"--peer needs requirements-dev.txt: {error}")
    except (ValueError, OSError) as error:
        fail(error)


if __name__ == "__main__":
    main()
