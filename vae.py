"""The Wan2.2 causal video VAE: between videos and normalised latents, as a stream over time.

Network and parameter names are those of the official wan/modules/vae2_2.py, checkpoint Wan2.2_VAE.pth. What
differs changes no result: the feature cache is a dict handed down as an argument, so that nothing of a stream
stays on the model; a stream advances by one or more latent frames (`chunk`); there are fewer copies.

How time works: the first frame becomes a latent frame by itself, then every `temporal_factor` frames become
one. So a video has factor * k + 1 frames, and the first is always a chunk of its own and stays one frame.

Shapes: B batch, C channels, T H W frames, height, width of a video or activation, t h w the latent grid.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Of each convolution over time, the last frames of its input. A stream starts with {}.
Cache = dict[nn.Module, Tensor]


@dataclass(frozen=True)
class VAEConfig:
    dim: int  # width of the encoder's first stage
    dec_dim: int  # width of the decoder's last stage
    z_dim: int  # latent channels
    dim_mult: tuple[
        int, ...
    ]  # widths of the encoder's stages in units of dim; the decoder runs backwards
    num_res_blocks: int  # residual blocks in an encoder stage; a decoder stage has one more
    temporal_downsample: tuple[
        bool, ...
    ]  # does a stage halve time besides space? The last halves neither
    latents_mean: tuple[float, ...] = ()  # of each latent channel over real videos; empty: 0
    latents_std: tuple[float, ...] = ()  # likewise; empty: 1
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


def split_time(x: Tensor, size: int) -> Iterator[Tensor]:
    """The first frame, then blocks of `size` frames, the last perhaps shorter."""
    yield x[:, :, :1]
    for start in range(1, x.shape[2], size):
        yield x[:, :, start : start + size]


def patchify(x: Tensor, patch: int) -> Tensor:
    """(B, C, T, H, W) -> (B, C * patch^2, T, H / patch, W / patch), channels as (C, column, row)."""
    return F.pixel_unshuffle(x.permute(0, 2, 1, 4, 3), patch).permute(0, 2, 1, 4, 3)


def unpatchify(x: Tensor, patch: int) -> Tensor:
    """The inverse of `patchify`."""
    return F.pixel_shuffle(x.permute(0, 2, 1, 4, 3), patch).permute(0, 2, 1, 4, 3)


def average_down(x: Tensor, channels: int, factor_t: int, factor_s: int) -> Tensor:
    """Shortcut of an encoder stage (official AvgDown3D): merged pixels become channels, in groups averaged.

    (B, C, T, H, W) -> (B, channels, T / factor_t, H / factor_s, W / factor_s). Where time is halved, the
    first frame is merged with an empty one before it.
    """
    if x.shape[2] % factor_t:
        x = F.pad(x, (0, 0, 0, 0, factor_t - 1, 0))
    x = x.unflatten(4, (-1, factor_s)).unflatten(3, (-1, factor_s)).unflatten(2, (-1, factor_t))
    x = x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)  # (B, C * factor_t * factor_s^2, T, H, W)
    return x.unflatten(1, (channels, -1)).mean(2)


def add_duplicates(y: Tensor, x: Tensor, factor_t: int, factor_s: int) -> Tensor:
    """y plus the shortcut of a decoder stage (official DupUp3D): repeated channels of x become pixels.

    x (B, C, T, H, W), y (B, C', T * factor_t, H * factor_s, W * factor_s), changed in place; the repeated x
    is only a view. The first frame's y has not grown in time and takes the last of the factor_t frames.
    """
    batch, channels, *size = x.shape
    repeats = y.shape[1] * factor_t * factor_s**2 // channels
    x = x.unsqueeze(2).expand(-1, -1, repeats, -1, -1, -1)
    x = x.reshape(batch, -1, factor_t, factor_s, factor_s, *size)
    x = x.permute(0, 1, 5, 2, 6, 3, 7, 4)  # (B, C', T, factor_t, H, factor_s, W, factor_s)
    x = x[:, :, :, -(y.shape[2] // size[0]) :]
    y.view(x.shape).add_(x)
    return y


class RMSNorm(nn.Module):
    """Divides each pixel by the root mean square of its channels, then scales channels by gamma."""

    def __init__(self, dim: int, grid_dims: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *(1,) * grid_dims))

    def forward(self, x: Tensor) -> Tensor:
        # On a CPU 20 times faster than vector_norm; under bf16 it is enough that the sum is in float32
        squares = x.square().sum(1, keepdim=True, dtype=torch.float32)  # (B, 1, T, H, W)
        # In place, so that a bf16 activation meets the float32 scale without a float32 copy of itself
        return (x * self.gamma).mul_((x.shape[1] / squares.clamp_min(1e-24)).sqrt())


class Streaming(nn.Module):
    """A layer with a past: forward(x, cache). All others see one pixel or frame at a time: forward(x)."""


class CausalConv3d(Streaming, nn.Conv3d):
    """A convolution that looks back in time and never ahead: `extend` the input, then call.

    Nothing in the network is larger than this input. In two steps the caller lets go of the short one
    before the convolution works on the longer copy: `x = conv.extend(x, cache)`, then `x = conv(x, cache)`.
    """

    def __init__(self, in_dim: int, out_dim: int, kernel_s: int = 3, stride_t: int = 1) -> None:
        kernel, stride, padding = (
            (3, kernel_s, kernel_s),
            (stride_t, 1, 1),
            (0, kernel_s // 2, kernel_s // 2),
        )
        super().__init__(in_dim, out_dim, kernel, stride, padding)
        self.history = 3 - stride_t

    def extend(self, x: Tensor, cache: Cache) -> Tensor:
        """x with the last `history` frames of the stream in front, (B, C, history + T, H, W).

        The first frame, before which all is zero, stays alone: there is nothing to multiply zeros for.
        """
        return torch.cat((cache.pop(self), x), dim=2) if self in cache else x

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        weight = self.weight
        if x.shape[2] == 1:
            cache[self], weight = F.pad(x, (0, 0, 0, 0, self.history - 1, 0)), weight[:, :, -1:]
        else:  # a clone, because a view of two frames would keep all frames alive until the next chunk
            cache[self] = x[:, :, -self.history :].clone()
        if x.is_cpu and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
            # For a small clip PyTorch would choose a way 5 times slower that writes x 27 times (im2col)
            args = self.padding, self.stride, self.dilation, self.groups
            return torch.mkldnn_convolution(x, weight, self.bias, *args)
        return F.conv3d(x, weight, self.bias, self.stride, self.padding)


def run(layers: Iterable[nn.Module], x: Tensor, cache: Cache) -> Tensor:
    """Applies the layers in turn, each with its past if it has one."""
    for layer in layers:
        if isinstance(layer, CausalConv3d):
            x = layer.extend(x, cache)
        x = layer(x, cache) if isinstance(layer, Streaming) else layer(x)
    return x


class ResidualBlock(Streaming):
    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            RMSNorm(in_dim),
            nn.SiLU(inplace=True),
            CausalConv3d(in_dim, out_dim),
            RMSNorm(out_dim),
            nn.SiLU(inplace=True),
            nn.Identity(),  # the official dropout, never used, counts in the parameters' names
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
        qkv = self.to_qkv(frames).flatten(2).transpose(1, 2).contiguous()  # (B * T, H * W, 3 * C)
        q, k, v = qkv.unsqueeze(1).chunk(3, dim=-1)  # (B * T, 1, H * W, C)
        attended = (
            F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2)
        )  # (B * T, C, H * W)
        attended = self.proj(attended.reshape(frames.shape))  # (B * T, C, H, W)
        return x + attended.unflatten(0, (x.shape[0], -1)).transpose(1, 2)


class Downsample(Streaming):
    """Halves height and width, then, if temporal, time; the first frame stays and becomes the past."""

    def __init__(self, dim: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        self.time_conv = CausalConv3d(dim, dim, kernel_s=1, stride_t=2) if temporal else None

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        frames = self.resample(x.transpose(1, 2).flatten(0, 1))  # (B * T, C, H / 2, W / 2)
        x = frames.unflatten(0, (x.shape[0], -1)).transpose(1, 2)  # (B, C, T, H / 2, W / 2)
        if self.time_conv is None:
            return x
        if self.time_conv in cache:
            return run([self.time_conv], x, cache)  # (B, C, T / 2, H / 2, W / 2)
        cache[self.time_conv] = x
        return x


class Upsample(Streaming):
    """If temporal, doubles time, then height and width; the first frame stays and is not part of the past."""

    def __init__(self, dim: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2), nn.Conv2d(dim, dim, 3, padding=1)
        )
        self.time_conv = CausalConv3d(dim, 2 * dim, kernel_s=1) if temporal else None

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        batch = x.shape[0]
        if self.time_conv in cache:
            x = run([self.time_conv], x, cache).unflatten(
                1, (2, -1)
            )  # (B, which of two frames, C, T, H, W)
            x = x.permute(0, 3, 1, 2, 4, 5).flatten(0, 2)  # (B * T * 2, C, H, W)
        else:
            if self.time_conv is not None:
                cache[self.time_conv] = x.new_zeros(
                    *x.shape[:2], self.time_conv.history, *x.shape[3:]
                )
            x = x.transpose(1, 2).flatten(0, 1)  # (B * T, C, H, W)
        return self.resample(x).unflatten(0, (batch, -1)).transpose(1, 2)


class DownStage(Streaming):
    def __init__(
        self, in_dim: int, out_dim: int, num_blocks: int, factor_t: int, factor_s: int
    ) -> None:
        super().__init__()
        self.out_dim, self.factor_t, self.factor_s = out_dim, factor_t, factor_s
        dims = [in_dim] + [out_dim] * (num_blocks - 1)
        self.downsamples = nn.ModuleList(ResidualBlock(d, out_dim) for d in dims)
        if factor_s > 1:
            self.downsamples.append(Downsample(out_dim, temporal=factor_t > 1))

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        return run(self.downsamples, x, cache) + average_down(
            x, self.out_dim, self.factor_t, self.factor_s
        )


class UpStage(Streaming):
    def __init__(
        self, in_dim: int, out_dim: int, num_blocks: int, factor_t: int, factor_s: int
    ) -> None:
        super().__init__()
        self.factor_t, self.factor_s = factor_t, factor_s
        dims = [in_dim] + [out_dim] * (num_blocks - 1)
        self.upsamples = nn.ModuleList(ResidualBlock(d, out_dim) for d in dims)
        if factor_s > 1:
            self.upsamples.append(Upsample(out_dim, temporal=factor_t > 1))

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        y = run(self.upsamples, x, cache)
        # The stage that keeps its size has no shortcut, unlike the encoder's
        return add_duplicates(y, x, self.factor_t, self.factor_s) if self.factor_s > 1 else y


def middle(dim: int) -> nn.Sequential:
    return nn.Sequential(ResidualBlock(dim, dim), AttentionBlock(dim), ResidualBlock(dim, dim))


class Encoder(Streaming):
    """A chunk of the stream: (B, 3 * patch_size^2, T, H, W) -> (B, 2 * z_dim, t, h, w)"""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        dims = [config.dim * m for m in (1, *config.dim_mult)]
        factors = [(1 + halve, 2) for halve in config.temporal_downsample] + [(1, 1)]
        stages = zip(dims[:-1], dims[1:], factors, strict=True)
        last = dims[-1]
        self.conv1 = CausalConv3d(3 * config.patch_size**2, dims[0])
        self.downsamples = nn.ModuleList(
            DownStage(i, o, config.num_res_blocks, *f) for i, o, f in stages
        )
        self.middle = middle(last)
        self.head = nn.Sequential(
            RMSNorm(last), nn.SiLU(inplace=True), CausalConv3d(last, 2 * config.z_dim)
        )

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        return run((self.conv1, *self.downsamples, *self.middle, *self.head), x, cache)


class Decoder(Streaming):
    """A chunk of the stream: (B, z_dim, t, h, w) -> (B, 3 * patch_size^2, T, H, W)"""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        dims = [config.dec_dim * m for m in (config.dim_mult[-1], *config.dim_mult[::-1])]
        factors = [(1 + double, 2) for double in config.temporal_downsample[::-1]] + [(1, 1)]
        stages = zip(dims[:-1], dims[1:], factors, strict=True)
        first, last, out_channels = dims[0], dims[-1], 3 * config.patch_size**2
        self.conv1 = CausalConv3d(config.z_dim, first)
        self.middle = middle(first)
        self.upsamples = nn.ModuleList(
            UpStage(i, o, config.num_res_blocks + 1, *f) for i, o, f in stages
        )
        self.head = nn.Sequential(
            RMSNorm(last), nn.SiLU(inplace=True), CausalConv3d(last, out_channels)
        )

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        return run((self.conv1, *self.middle, *self.upsamples, *self.head), x, cache)


class WanVAE(nn.Module):
    """Videos (B, 3, T, H, W) in [-1, 1] <-> normalised latents (B, z_dim, t, h, w).

    Inputs may be on any device and of any float dtype: each block is moved to the parameters' in its turn.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.conv1 = nn.Conv3d(2 * config.z_dim, 2 * config.z_dim, 1)
        self.conv2 = nn.Conv3d(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder(config)

    def encode(self, video: Tensor, chunk: int = 1) -> Tensor:
        """The normalised posterior mean in float32, of temporal_factor * k + 1 frames (otherwise ValueError).

        Goes by `chunk` latent frames at a time; a larger chunk takes more memory and gives the same result.
        """
        factor = self.config.temporal_factor
        if (video.shape[2] - 1) % factor:
            raise ValueError(
                f"the video has {video.shape[2]} frames, not {factor}k + 1: repeat its last one"
            )
        return torch.cat(list(self.encode_chunks(split_time(video, factor * chunk))), dim=2)

    def encode_chunks(self, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
        """`encode` for a stream of blocks, the first of 1 frame, others of multiples of temporal_factor."""
        space, factor = self.config.spatial_factor, self.config.temporal_factor
        mean, std = self.latent_statistics(self.conv1.weight.device)
        cache: Cache = {}
        for block in blocks:
            _, channels, frames, height, width = block.shape
            if frames % factor if cache else frames != 1:
                raise ValueError(
                    f"a block has {frames} frames; the first must have 1, others {factor}k"
                )
            if channels != 3 or height % space or width % space:
                raise ValueError(
                    f"a video of {channels} x {height}x{width} is not 3 x multiples of {space}"
                )
            x = patchify(block.to(mean.device, self.conv1.weight.dtype), self.config.patch_size)
            x = self.conv1(self.encoder(x, cache)).chunk(2, dim=1)[
                0
            ]  # the other half is the log-variance
            yield (x.float() - mean) / std

    def decode(self, latents: Tensor, chunk: int = 1) -> Tensor:
        """The video in float32, clamped to [-1, 1]. `chunk` as in `encode`."""
        return torch.cat(list(self.decode_chunks(latents, chunk)), dim=2)

    def decode_chunks(self, latents: Tensor, chunk: int = 1) -> Iterator[Tensor]:
        """`decode` as a stream of blocks, the first of 1 frame, the others of temporal_factor * chunk."""
        mean, std = self.latent_statistics(
            self.conv2.weight.device
        )  # the encoder may rest on another
        cache: Cache = {}
        for z in split_time(latents, chunk):
            z = z.to(mean.device).float() * std + mean
            x = self.decoder(self.conv2(z.to(self.conv2.weight.dtype)), cache)
            yield unpatchify(x, self.config.patch_size).float().clamp(-1, 1)

    def latent_statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents, each (z_dim, 1, 1, 1)."""
        z_dim = self.config.z_dim
        mean = torch.tensor(self.config.latents_mean or (0.0,) * z_dim, device=device)
        std = torch.tensor(self.config.latents_std or (1.0,) * z_dim, device=device)
        return mean.view(-1, 1, 1, 1), std.view(-1, 1, 1, 1)


# --- The configuration of Wan2.2_VAE.pth ----------------------------------------------------------

# Mean and standard deviation of each latent channel over Wan's training data: constants of the official code.
# fmt: off
WAN2_2_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.157, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.123, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.052, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)
WAN2_2_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.499, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.06, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
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
