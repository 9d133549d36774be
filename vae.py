"""The Wan2.2 causal video VAE: videos to normalised latents and back, as a stream over time.

Network and parameter names are those of the official wan/modules/vae2_2.py, checkpoint
Wan2.2_VAE.pth.

Time. The first frame becomes a latent frame by itself; then every `temporal_factor` frames become
one. So a video has factor * k + 1 frames. It goes through the network in chunks: the first chunk is
the first frame, and each later one is one or more latent frames (`chunk`) with their frames.

Memory of the stream. All layers work on single frames, but for the convolutions over time, which
look back at up to two frames before the chunk. A `Cache` holds these for each of them; it is an
empty dict when a stream starts, and each chunk reads and replaces its entries. It is handed down as
an argument and not kept on the model, so streams cannot disturb each other. The size of the chunks
does not change the result.

Shapes: B batch, C channels; T H W frames, height, width of a video or activation; t h w of latents.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# For each convolution over time: the last frames of its input (B, C, history, H, W).
Cache = dict[nn.Module, Tensor]


@dataclass(frozen=True)
class VAEConfig:
    dim: int  # width of the encoder's first stage
    dec_dim: int  # width of the decoder's last stage
    z_dim: int  # latent channels
    dim_mult: tuple[int, ...]  # widths of the encoder's stages, times dim; the decoder's in reverse
    num_res_blocks: int  # residual blocks in an encoder stage; a decoder stage has one more
    # Which stages halve time besides space? The last stage halves neither and has no entry.
    temporal_downsample: tuple[bool, ...]
    latents_mean: tuple[float, ...] = ()  # of each latent channel over real videos; empty: 0
    latents_std: tuple[float, ...] = ()  # their deviations; empty: 1
    patch_size: int = 2  # patch_size x patch_size pixels become channels before the first layer

    def __post_init__(self) -> None:
        for name in ("dim_mult", "temporal_downsample", "latents_mean", "latents_std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON has only lists
        if len(self.temporal_downsample) != len(self.dim_mult) - 1:
            raise ValueError("temporal_downsample must have one entry fewer than dim_mult")

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent, in height and in width."""
        return self.patch_size * 2 ** len(self.temporal_downsample)

    @property
    def temporal_factor(self) -> int:
        """Frames per latent frame, after the first."""
        return 2 ** sum(self.temporal_downsample)


# --- Rearranging pixels ---------------------------------------------------------------------------


def split_time(x: Tensor, size: int) -> Iterator[Tensor]:
    """Yield the first frame, then chunks of `size` frames, the last perhaps shorter."""
    yield x[:, :, :1]
    for start in range(1, x.shape[2], size):
        yield x[:, :, start : start + size]


def patchify(x: Tensor, patch: int) -> Tensor:
    """(B, C, T, H, W) -> (B, C * patch², T, H / patch, W / patch), channels as (C, column, row)."""
    # pixel_unshuffle orders them as (C, row, column), so rows and columns change places around it.
    x = x.permute(0, 2, 1, 4, 3)  # (B, T, C, W, H)
    return F.pixel_unshuffle(x, patch).permute(0, 2, 1, 4, 3)


def unpatchify(x: Tensor, patch: int) -> Tensor:
    """The inverse of `patchify`."""
    x = x.permute(0, 2, 1, 4, 3)  # (B, T, C * patch², W / patch, H / patch)
    return F.pixel_shuffle(x, patch).permute(0, 2, 1, 4, 3)


def average_down(x: Tensor, channels: int, factor_t: int, factor_s: int) -> Tensor:
    """Shortcut of an encoder stage (official AvgDown3D): merge pixels, average channels.

    (B, C, T, H, W) -> (B, channels, T / factor_t, H / factor_s, W / factor_s). Where time is
    halved, the first frame is merged with an empty frame before it.
    """
    if x.shape[2] % factor_t:
        x = F.pad(x, (0, 0, 0, 0, factor_t - 1, 0))
    x = x.unflatten(4, (-1, factor_s))
    x = x.unflatten(3, (-1, factor_s))
    x = x.unflatten(2, (-1, factor_t))  # (B, C, T, factor_t, H, factor_s, W, factor_s)
    x = x.permute(0, 1, 3, 5, 7, 2, 4, 6)  # (B, C, factor_t, factor_s, factor_s, T, H, W)
    x = x.flatten(1, 4)  # (B, C * factor_t * factor_s², T, H, W)
    return x.unflatten(1, (channels, -1)).mean(2)


def add_duplicates(y: Tensor, x: Tensor, factor_t: int, factor_s: int) -> Tensor:
    """Add to y the shortcut of a decoder stage (official DupUp3D): repeated channels become pixels.

    x (B, C, T, H, W), y (B, C', T * factor_t, H * factor_s, W * factor_s). y is changed in place,
    and the repeated x is only a view. In the first chunk y has not grown in time and takes the last
    of the factor_t frames.
    """
    batch, channels, *size = x.shape
    repeats = y.shape[1] * factor_t * factor_s**2 // channels
    x = x.unsqueeze(2).expand(-1, -1, repeats, -1, -1, -1)  # (B, C, repeats, T, H, W)
    x = x.reshape(batch, -1, factor_t, factor_s, factor_s, *size)
    x = x.permute(0, 1, 5, 2, 6, 3, 7, 4)  # (B, C', T, factor_t, H, factor_s, W, factor_s)
    grown = y.shape[2] // size[0]  # factor_t, or 1 in the first chunk
    x = x[:, :, :, -grown:]
    y.view(x.shape).add_(x)
    return y


# --- Layers ---------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """Divide each pixel by the root mean square of its channels, then scale channels by gamma.

    silu: apply SiLU to the result. The two are one module so that `parallel.compile_norms` can make
    one pass over the activations of them.
    """

    def __init__(self, dim: int, grid_dims: int = 3, silu: bool = False) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *(1,) * grid_dims))
        self.silu = silu

    def forward(self, x: Tensor) -> Tensor:
        # Squares and their sums (B, 1, T, H, W) are in float32: float16 ends at 65504.
        if x.is_cpu and x.dtype == torch.float32:  # with few channels 8 times faster than the norm
            squares = x.square().sum(1, keepdim=True)
        else:
            norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)
            squares = norm.square()
        scale = (x.shape[1] / squares.clamp_min(1e-24)).sqrt()
        # In place, so that a half-precision x meets the float32 scale without a float32 copy of x.
        x = (x * self.gamma.to(x.dtype)).mul_(scale)
        return F.silu(x, inplace=True) if self.silu else x


class Streaming(nn.Module):
    """A layer that looks back in time: forward(x, cache). All others are called as forward(x)."""


class CausalConv3d(Streaming, nn.Conv3d):
    """A convolution over time that looks back and never ahead.

    Its input is `extend(x, cache)`, the chunk behind the frames that the cache holds for this
    layer. Nothing in the network is larger than this input. That is why extending is a step of its
    own: the caller can let go of the short x before the convolution runs. See `run`.
    """

    def __init__(self, in_dim: int, out_dim: int, kernel_s: int = 3, stride_t: int = 1) -> None:
        super().__init__(
            in_dim,
            out_dim,
            kernel_size=(3, kernel_s, kernel_s),
            stride=(stride_t, 1, 1),
            padding=(0, kernel_s // 2, kernel_s // 2),
        )
        self.history = 3 - stride_t  # frames before the chunk that the first output needs

    def extend(self, x: Tensor, cache: Cache) -> Tensor:
        """Put the cached frames in front of the chunk x: (B, C, history + T, H, W).

        The first frame of a stream has only zeros before it. It stays alone, and `forward` skips
        the products with zeros.
        """
        if self not in cache:
            return x
        return torch.cat((cache.pop(self), x), dim=2)

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        weight = self.weight
        if x.shape[2] == 1:  # the first frame
            cache[self] = F.pad(x, (0, 0, 0, 0, self.history - 1, 0))  # zeros before it
            weight = weight[:, :, -1:]  # the only part of the kernel that meets no zeros
        else:  # a clone: a view of two frames would keep all frames alive until the next chunk
            cache[self] = x[:, :, -self.history :].clone()
        if x.is_cpu and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
            # For small clips F.conv3d takes a path that is 5 times slower and writes x 27 times.
            return torch.mkldnn_convolution(
                x, weight, self.bias, self.padding, self.stride, self.dilation, self.groups
            )
        return F.conv3d(x, weight, self.bias, self.stride, self.padding)


def run(layers: Iterable[nn.Module], x: Tensor, cache: Cache) -> Tensor:
    """Apply the layers in turn; those that look back in time get the cache."""
    for layer in layers:
        if isinstance(layer, CausalConv3d):
            x = layer.extend(x, cache)  # from here on nothing holds the short x
        x = layer(x, cache) if isinstance(layer, Streaming) else layer(x)
    return x


class ResidualBlock(Streaming):
    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            RMSNorm(in_dim, silu=True),
            nn.Identity(),  # the official SiLU's place: parameters are named by position
            CausalConv3d(in_dim, out_dim),
            RMSNorm(out_dim, silu=True),
            nn.Identity(),
            nn.Identity(),  # the official dropout's place
            CausalConv3d(out_dim, out_dim),
        )
        self.shortcut = nn.Conv3d(in_dim, out_dim, 1) if in_dim != out_dim else nn.Identity()

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        return run(self.residual, x, cache) + self.shortcut(x)


class AttentionBlock(nn.Module):
    """Self-attention with one head between the pixels of a frame."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = RMSNorm(dim, grid_dims=2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)
        nn.init.zeros_(self.proj.weight)  # as in the official code: adds only a bias at first

    def forward(self, x: Tensor) -> Tensor:
        frames = self.norm(x.transpose(1, 2).flatten(0, 1))  # (B * T, C, H, W)
        qkv = self.to_qkv(frames).flatten(2)  # (B * T, 3 * C, H * W)
        qkv = qkv.transpose(1, 2).contiguous()  # (B * T, H * W, 3 * C)
        q, k, v = qkv.unsqueeze(1).chunk(3, dim=-1)  # (B * T, 1, H * W, C)
        out = F.scaled_dot_product_attention(q, k, v)
        out = out.squeeze(1).transpose(1, 2).reshape(frames.shape)  # (B * T, C, H, W)
        out = self.proj(out)
        return x + out.unflatten(0, (x.shape[0], -1)).transpose(1, 2)


class Downsample(Streaming):
    """Halve height and width, then, if temporal, time.

    The first frame of a stream stays, and becomes what the convolution over time looks back at.
    """

    def __init__(self, dim: int, temporal: bool) -> None:
        super().__init__()
        # Strides of 2 start at the first pixel, so only right and bottom need zeros.
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        self.time_conv = CausalConv3d(dim, dim, kernel_s=1, stride_t=2) if temporal else None

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        frames = self.resample(x.transpose(1, 2).flatten(0, 1))  # (B * T, C, H / 2, W / 2)
        x = frames.unflatten(0, (x.shape[0], -1)).transpose(1, 2)  # (B, C, T, H / 2, W / 2)
        if self.time_conv is None:
            return x
        if self.time_conv not in cache:  # the first frame: one alone cannot be halved
            cache[self.time_conv] = x
            return x
        return run([self.time_conv], x, cache)  # (B, C, T / 2, H / 2, W / 2)


class Upsample(Streaming):
    """Double time, if temporal, then height and width.

    The first frame of a stream stays, and the convolution over time does not look back at it.
    """

    def __init__(self, dim: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2), nn.Conv2d(dim, dim, 3, padding=1)
        )
        self.time_conv = CausalConv3d(dim, 2 * dim, kernel_s=1) if temporal else None

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        batch, channels, _, height, width = x.shape
        conv = self.time_conv
        if conv is not None and conv in cache:
            x = run([conv], x, cache)  # (B, 2 * C, T, H, W): the channels of two frames
            x = x.unflatten(1, (2, channels))
            frames = x.permute(0, 3, 1, 2, 4, 5).flatten(0, 2)  # (B * T * 2, C, H, W)
        else:
            if conv is not None:  # the first frame
                cache[conv] = x.new_zeros(batch, channels, conv.history, height, width)
            frames = x.transpose(1, 2).flatten(0, 1)  # (B * T, C, H, W)
        frames = self.resample(frames)
        return frames.unflatten(0, (batch, -1)).transpose(1, 2)  # (B, C, T or T * 2, H * 2, W * 2)


# --- Encoder and decoder --------------------------------------------------------------------------


class DownStage(Streaming):
    """Residual blocks and `Downsample`, beside the shortcut `average_down`."""

    def __init__(
        self, in_dim: int, out_dim: int, num_blocks: int, factor_t: int, factor_s: int
    ) -> None:
        super().__init__()
        self.out_dim, self.factor_t, self.factor_s = out_dim, factor_t, factor_s
        dims = [in_dim] + [out_dim] * (num_blocks - 1)
        self.downsamples = nn.ModuleList(ResidualBlock(dim, out_dim) for dim in dims)
        if factor_s > 1:
            self.downsamples.append(Downsample(out_dim, temporal=factor_t > 1))

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        y = run(self.downsamples, x, cache)
        return y + average_down(x, self.out_dim, self.factor_t, self.factor_s)


class UpStage(Streaming):
    """Residual blocks and `Upsample`, beside the shortcut of `add_duplicates`."""

    def __init__(
        self, in_dim: int, out_dim: int, num_blocks: int, factor_t: int, factor_s: int
    ) -> None:
        super().__init__()
        self.factor_t, self.factor_s = factor_t, factor_s
        dims = [in_dim] + [out_dim] * (num_blocks - 1)
        self.upsamples = nn.ModuleList(ResidualBlock(dim, out_dim) for dim in dims)
        if factor_s > 1:
            self.upsamples.append(Upsample(out_dim, temporal=factor_t > 1))

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        y = run(self.upsamples, x, cache)
        if self.factor_s == 1:  # unlike the encoder's, this stage has no shortcut
            return y
        return add_duplicates(y, x, self.factor_t, self.factor_s)


def middle(dim: int) -> nn.Sequential:
    return nn.Sequential(ResidualBlock(dim, dim), AttentionBlock(dim), ResidualBlock(dim, dim))


class Encoder(Streaming):
    """Encode a chunk of the stream: (B, 3 * patch_size², T, H, W) -> (B, 2 * z_dim, t, h, w)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        dims = [config.dim] + [config.dim * factor for factor in config.dim_mult]  # widths
        self.conv1 = CausalConv3d(3 * config.patch_size**2, dims[0])
        self.downsamples = nn.ModuleList()
        for i, temporal in enumerate(config.temporal_downsample):
            factor_t = 2 if temporal else 1
            stage = DownStage(dims[i], dims[i + 1], config.num_res_blocks, factor_t, factor_s=2)
            self.downsamples.append(stage)
        last = DownStage(dims[-2], dims[-1], config.num_res_blocks, factor_t=1, factor_s=1)
        self.downsamples.append(last)
        self.middle = middle(dims[-1])
        self.head = nn.Sequential(
            RMSNorm(dims[-1], silu=True),
            nn.Identity(),  # the official SiLU's place
            CausalConv3d(dims[-1], 2 * config.z_dim),
        )

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        layers = (self.conv1, *self.downsamples, *self.middle, *self.head)
        return run(layers, x, cache)


class Decoder(Streaming):
    """Decode a chunk of the stream: (B, z_dim, t, h, w) -> (B, 3 * patch_size², T, H, W)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        # The encoder's stages in reverse. The first of them keeps its width.
        mult = config.dim_mult[::-1]
        dims = [config.dec_dim * factor for factor in (mult[0], *mult)]
        num_blocks = config.num_res_blocks + 1  # one more than in the encoder
        self.conv1 = CausalConv3d(config.z_dim, dims[0])
        self.middle = middle(dims[0])
        self.upsamples = nn.ModuleList()
        for i, temporal in enumerate(config.temporal_downsample[::-1]):
            factor_t = 2 if temporal else 1
            stage = UpStage(dims[i], dims[i + 1], num_blocks, factor_t, factor_s=2)
            self.upsamples.append(stage)
        last = UpStage(dims[-2], dims[-1], num_blocks, factor_t=1, factor_s=1)
        self.upsamples.append(last)
        self.head = nn.Sequential(
            RMSNorm(dims[-1], silu=True),
            nn.Identity(),  # the official SiLU's place
            CausalConv3d(dims[-1], 3 * config.patch_size**2),
        )

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        layers = (self.conv1, *self.middle, *self.upsamples, *self.head)
        return run(layers, x, cache)


# --- The VAE --------------------------------------------------------------------------------------


def computes_in_half(device: torch.device) -> bool:
    """Whether convolutions over time are fast in float16, as on GPUs.

    Those of cuDNN 9.8 to 9.14 are wrong. PyTorch has others in their place, which take many times
    as long and as much memory (pytorch/pytorch#166643).
    """
    broken = 90800 <= (torch.backends.cudnn.version() or 0) < 91500
    return device.type == "cuda" and not broken


class WanVAE(nn.Module):
    """Videos (B, 3, T, H, W) in [-1, 1] <-> normalised latents (B, z_dim, t, h, w).

    Inputs may be on any device and of any float dtype: each chunk is moved to the parameters' when
    its turn comes. Encoder and decoder may be on different devices and of different dtypes.

    The decoder computes in the dtype of its parameters. The encoder, on which the edit is
    conditioned, has float32 parameters and computes in `encoder_dtype`, by default float16 on GPUs
    and float32 on CPUs. Should float16 overflow, the rest of that clip is encoded in float32.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder_dtype: torch.dtype | None = None  # None: the default for its device
        self.encoder = Encoder(config)
        self.conv1 = nn.Conv3d(2 * config.z_dim, 2 * config.z_dim, 1)  # after the encoder
        self.conv2 = nn.Conv3d(config.z_dim, config.z_dim, 1)  # before the decoder
        self.decoder = Decoder(config)

    def encode(self, video: Tensor, chunk: int = 1) -> Tensor:
        """Return the normalised posterior mean in float32 of temporal_factor * k + 1 frames.

        Goes by `chunk` latent frames at a time: more take more memory and give the same result.
        Raises ValueError for another number of frames.
        """
        factor = self.config.temporal_factor
        if (video.shape[2] - 1) % factor:
            raise ValueError(
                f"the video has {video.shape[2]} frames, not {factor}k + 1: repeat its last one"
            )
        blocks = split_time(video, factor * chunk)
        return torch.cat(list(self.encode_chunks(blocks)), dim=2)

    def encode_chunks(self, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
        """`encode` for a stream of blocks of frames: 1 frame, then multiples of temporal_factor.

        Yields each block's latents. Raises ValueError for a block of a wrong length or size.
        """
        space, factor = self.config.spatial_factor, self.config.temporal_factor
        device = self.conv1.weight.device
        default = torch.float16 if computes_in_half(device) else self.conv1.weight.dtype
        dtype = self.encoder_dtype or default
        mean, std = self.latent_statistics(device)
        cache: Cache = {}
        for block in blocks:
            _, channels, frames, height, width = block.shape
            is_first = not cache
            fits = frames == 1 if is_first else frames % factor == 0
            if not fits:
                raise ValueError(
                    f"a block has {frames} frames; the first must have 1, others {factor}k"
                )
            if channels != 3 or height % space or width % space:
                raise ValueError(
                    f"a video of {channels} x {height}x{width} is not 3 x multiples of {space}"
                )
            block = block.to(device)
            before = dict(cache) if dtype == torch.float16 else {}  # layers replace what it holds
            z = self._posterior_mean(block, cache, dtype)
            if dtype == torch.float16 and not z.isfinite().all():  # something exceeded 65504
                dtype = torch.float32
                cache = {layer: past.float() for layer, past in before.items()}
                z = self._posterior_mean(block, cache, dtype)
            yield (z - mean) / std

    def _posterior_mean(self, block: Tensor, cache: Cache, dtype: torch.dtype) -> Tensor:
        """Encode frames (B, 3, T, H, W) with products in `dtype` -> (B, z_dim, t, h, w) float32."""
        weight = self.conv1.weight
        mixed = contextlib.nullcontext()  # the meta device has no autocast
        if weight.dtype != dtype:
            mixed = torch.autocast(weight.device.type, dtype=dtype)
        x = patchify(block.to(dtype), self.config.patch_size)
        with mixed:
            x = self.conv1(self.encoder(x, cache))  # (B, 2 * z_dim, t, h, w)
        mean, _ = x.chunk(2, dim=1)  # the other half is the log-variance
        return mean.float()

    def decode(self, latents: Tensor, chunk: int = 1) -> Tensor:
        """Return the video in float32, clamped to [-1, 1]. `chunk`: see `encode`."""
        return torch.cat(list(self.decode_chunks(latents, chunk)), dim=2)

    def decode_chunks(self, latents: Tensor, chunk: int = 1) -> Iterator[Tensor]:
        """`decode` as a stream of blocks of frames: 1 frame, then temporal_factor * chunk each."""
        device, dtype = self.conv2.weight.device, self.conv2.weight.dtype
        mean, std = self.latent_statistics(device)
        cache: Cache = {}
        for z in split_time(latents, chunk):
            z = z.to(device).float() * std + mean
            z = self.conv2(z.to(dtype))
            x = self.decoder(z, cache)  # (B, 3 * patch_size², T, H, W)
            x = unpatchify(x, self.config.patch_size)  # (B, 3, T, H, W)
            yield x.float().clamp(-1, 1)

    def latent_statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents over real videos, (z_dim, 1, 1, 1) both."""
        z_dim = self.config.z_dim
        mean = torch.tensor(self.config.latents_mean or (0.0,) * z_dim, device=device)
        std = torch.tensor(self.config.latents_std or (1.0,) * z_dim, device=device)
        return mean.view(-1, 1, 1, 1), std.view(-1, 1, 1, 1)


# --- The configuration of Wan2.2_VAE.pth ----------------------------------------------------------

# Mean and standard deviation of each latent channel over Wan's training data: constants of the
# official code.
# fmt: off
WAN2_2_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
    -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
    -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
    -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
    0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)
WAN2_2_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
    0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
    0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
    0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
    0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)
# fmt: on

WAN2_2_VAE = VAEConfig(
    dim=160,
    dec_dim=256,
    z_dim=48,
    dim_mult=(1, 2, 4, 4),
    num_res_blocks=2,
    temporal_downsample=(False, True, True),
    latents_mean=WAN2_2_MEAN,
    latents_std=WAN2_2_STD,
)
