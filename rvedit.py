"""RVEDiT, the method of the paper: a diffusion transformer that edits videos by implicit reasoning.

What the paper adds to a Wan DiT and the Qwen2.5-VL that conditions it is the first function below,
`route_context` (§4.2, Eq. 3): which tokens each block may read. The other half of the method, what
the attention features are trained to resemble (§4.3, Eq. 4-6), is in `losses.py`.

    clip v, instruction ℓ ─> EditEncoder ─> X_e, X_v, X_ℓ ─> route_context ─> C^(1) ... C^(L) ─┐
    clip v ─> WanVAE.encode ─> source latents ─────────────────────────────────────────────────┤
    noise z_1 ─────────────────────────────────────────────────────────────────────────────────┤
    edited clip <─ WanVAE.decode <─ z_0 <─ ... <─ z_t, t from 1 to 0 (sample.py) <─── WanDiT <─┘

The README has a table of all departures from the paper, with their reasons. One of them concerns
this file: the depth L is the checkpoint's (30 in the public Wan2.2-TI2V-5B), and L_s is L/2.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

import convert
import weights
from mllm import Condition, EditEncoder
from model import DiTConfig, WanDiT
from qwen import Qwen2_5_VL, QwenConfig, VisionConfig, add_lora
from vae import WAN2_2_VAE, VAEConfig, WanVAE

TOY = Path(__file__).parent / "assets" / "toy"  # the built-in checkpoint

# --- The method -----------------------------------------------------------------------------------


def route_context(
    condition: Condition, block: int, routing_depth: int
) -> tuple[Tensor, Tensor | None]:
    """Eq. 3: the context C^(l) that block l may read, (B, N, d), and its mask, (B, N) or None.

    block is l, from 1 to L; routing_depth is L_s. Shallow blocks read the editing tokens alone and
    so commit to a global intent. Deep blocks read the native visual and textual tokens as well and
    ground the intent in them. L_s = L is Kiwi-Edit's conditioning (the paper's "w/o GRTC"). L_s = 0
    shows all tokens to all blocks, which §1 argues against.
    """
    if block <= routing_depth:
        return condition.editing, None  # X_e: without its mask, because it is never padded
    # The editing tokens stay in front, as the anchor that the deep blocks refine (§4.2).
    tokens = (condition.editing, condition.visual, condition.textual)
    context = torch.cat(tokens, dim=1)  # [X_e; X_v; X_ℓ], (B, K + N_v + N_ℓ, d)
    if condition.visual_mask is None:
        return context, None
    editing_mask = condition.visual_mask.new_ones(condition.editing.shape[:2])  # never padded
    masks = (editing_mask, condition.visual_mask, condition.textual_mask)
    return context, torch.cat(masks, dim=1)


class RVEDiT(nn.Module):
    """The editor: f_θ, the DiT, and g_φ, the MLLM that conditions it. The frozen VAE stays outside.

    tokenizer: Qwen's. It may be None where nothing is tokenized, such as on the meta device.
    """

    def __init__(self, config: RVEDiTConfig, tokenizer: Tokenizer | None = None):
        super().__init__()
        self.config = config
        qwen = Qwen2_5_VL(config.qwen)
        if config.lora_rank:  # before the weights come, so that a checkpoint can hold the LoRA
            add_lora(qwen, config.lora_rank, alpha=config.lora_rank)
        self.encoder = EditEncoder(qwen, tokenizer, config)
        self.dit = WanDiT(config.dit)

    def contexts(self, condition: Condition) -> list[tuple[Tensor, Tensor | None]]:
        """C^(1) ... C^(L) of Eq. 3, for the DiT."""
        L, L_s = self.config.dit.num_blocks, self.config.routing_depth
        # All blocks up to L_s read the same, and all beyond it, so two contexts are enough.
        first = route_context(condition, 1, L_s)
        last = route_context(condition, L, L_s)
        return [first] * L_s + [last] * (L - L_s)


# --- Configuration --------------------------------------------------------------------------------


@dataclass(frozen=True)
class RVEDiTConfig:
    """All sizes of the system. The defaults are the paper's, or Kiwi-Edit's where it has none."""

    dit: DiTConfig
    vae: VAEConfig
    qwen: QwenConfig
    # L_s of Eq. 3: blocks 1 ... L_s read only the editing tokens. No default: it depends on L.
    routing_depth: int
    num_editing_tokens: int = 512  # K for clips
    # K for stills, which have queries of their own: as many as clips, to begin with their values.
    # Kiwi-Edit has 256. 0: stills are read as clips.
    num_image_tokens: int = 512
    align_weight: float = 0.75  # λ_align of Eq. 6
    temperature: float = 0.07  # τ of Eq. 5
    # LoRA of the language tower (§5), on q, k, v, o as in Kiwi-Edit. Its alpha is the rank, so that
    # its scale is 1.
    lora_rank: int = 64
    # The MLLM sees at most this many frames of a clip, evenly spaced, each resized to these limits.
    max_mllm_frames: int = 16
    min_mllm_pixels: int = 128 * 28**2
    max_mllm_pixels: int = 512**2
    # The VAE and the DiT work on frames of at most this many pixels. The edit is resized back.
    max_pixels: int = 704 * 1280
    min_pixels: int = 0  # smaller frames are scaled up for them
    max_frames: int = 81  # in one pass of the DiT; a longer clip is edited in overlapping windows
    sampling_steps: int = 50  # of Euler's method, by default

    def __post_init__(self):
        for name, kind in (("dit", DiTConfig), ("vae", VAEConfig), ("qwen", QwenConfig)):
            value = getattr(self, name)
            if isinstance(value, dict):  # as it comes from JSON
                # The usual assignment is refused, because the dataclass is frozen.
                object.__setattr__(self, name, kind(**value))
        if not 0 <= self.routing_depth <= self.dit.num_blocks:
            raise ValueError(
                f"routing depth {self.routing_depth} is not between 0 and the "
                f"{self.dit.num_blocks} blocks"
            )

    @property
    def native_trained(self) -> bool:
        """Whether some block reads X_v and X_ℓ, so that their connectors get gradients.

        Not with L_s = L, as in Kiwi-Edit: a model so trained knows editing tokens alone.
        """
        return self.routing_depth < self.dit.num_blocks

    @property
    def spatial_factor(self) -> int:
        """Both sides of a frame are multiples of this many pixels: 32 for the full model."""
        return self.vae.spatial_factor * max(self.dit.patch_size[1:])


def preset(name: str) -> RVEDiTConfig:
    """The paper's system, "wan2.2-ti2v-5b", or "toy", the same system at a laptop's size.

    Raises ValueError for other names.
    """
    if name == "wan2.2-ti2v-5b":
        return RVEDiTConfig(
            dit=DiTConfig(
                dim=3072,
                ffn_dim=14336,
                num_heads=24,
                num_blocks=30,
                in_channels=48,
                out_channels=48,
                patch_size=(1, 2, 2),
            ),
            vae=WAN2_2_VAE,
            qwen=QwenConfig(),  # the defaults are Qwen2.5-VL-3B's
            # L/2. §5 has 17 of 34 blocks, but Tables 2c and 3 have 15, which is half of this L.
            routing_depth=15,
        )
    if name == "toy":
        # A token is a single latent. With patches of 2 x 2, as in the full model, most tokens would
        # show more than one shape, and the model takes twice as many clips to learn its words.
        return RVEDiTConfig(
            dit=DiTConfig(
                dim=256,
                ffn_dim=768,
                num_heads=8,
                num_blocks=6,
                in_channels=24,
                out_channels=24,
                patch_size=(1, 1, 1),
            ),
            vae=VAEConfig(
                dim=8,
                dec_dim=12,
                z_dim=24,
                dim_mult=(1, 4, 4),
                num_res_blocks=1,
                temporal_downsample=(True, True),
            ),
            qwen=QwenConfig(
                vision=VisionConfig(
                    depth=2,
                    hidden_size=96,
                    intermediate_size=192,
                    num_heads=4,
                    patch_size=8,
                    window_size=64,
                    fullatt_block_indexes=(1,),
                ),
                vocab_size=768,
                hidden_size=128,
                intermediate_size=352,
                num_hidden_layers=5,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=1024,
                mrope_section=(4, 6, 6),
                image_token_id=12,
                video_token_id=13,
                query_token_id=3,
            ),
            routing_depth=3,
            num_editing_tokens=16,
            num_image_tokens=0,  # the built-in checkpoint learned stills as clips of one frame
            align_weight=0.005,  # with more, it edits fewer clips: RESULTS.md
            lora_rank=0,  # there is no pretrained Qwen to adapt: the MLLM trains whole
            max_mllm_frames=4,
            min_mllm_pixels=4 * 16**2,
            max_mllm_pixels=128**2,
            max_pixels=128**2,
            max_frames=17,  # it was trained on 9; on 33 it edits far fewer clips
            # Few steps end near the mean of all edits that it holds possible, many steps at one of
            # them. The README has the numbers.
            sampling_steps=2,
        )
    raise ValueError(f"no preset is called {name!r}: there are 'wan2.2-ti2v-5b' and 'toy'")


# --- Initial weights ------------------------------------------------------------------------------


@torch.no_grad()
def initialise(module: nn.Module, seed: int = 0, names: Iterable[str] | None = None) -> None:
    """Draw parameters from (seed, parameter name), whatever the device and the sharding.

    No training starts from other values: networks are built on the meta device, where constructors
    set none. names: which parameters; None draws all of them.
    """
    parameters = dict(module.named_parameters())
    names = list(parameters if names is None else names)
    # Wan's first layer is in every checkpoint of it. If it is drawn, nothing comes pretrained.
    from_scratch = any(name.endswith("patch_embedding.weight") for name in names)
    for name in names:
        noise = _noise(seed, name, parameters[name].shape)
        weights.assign(parameters[name], _initial_value(name, noise, from_scratch))


def _noise(seed: int, name: str, shape: torch.Size) -> Tensor:
    """Standard normal noise from (seed, name). It is drawn on the CPU, the same for all devices."""
    name = name.replace("image_queries", "queries")  # those for stills begin as those for clips
    # A hash of the name, so that adding a parameter does not change the others.
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def _initial_value(name: str, noise: Tensor, from_scratch: bool) -> Tensor:
    """A parameter's initial value by its name. from_scratch: no part of the model was trained."""
    if name.endswith(".bias") or _starts_silent(name, from_scratch):
        return torch.zeros_like(noise)
    if re.search(r"gamma$|(norm\w*|ln_q)\.weight$", name):  # the scale of a norm
        return torch.ones_like(noise)
    if name.endswith("modulation"):  # Wan's scale
        return noise / noise.shape[-1] ** 0.5
    if name.endswith("queries"):  # Kiwi-Edit's scale
        return 0.02 * noise
    # Words start large beside what the layers of the language model add to them, so that a model
    # from scratch sooner learns to read. Output projections are small for the same reason.
    if name.endswith("embed_tokens.weight"):
        return noise
    fan_in = noise[0].numel()
    if name.endswith(("o_proj.weight", "down_proj.weight", "attn.proj.weight")):
        return 0.3 * noise / fan_in**0.5
    return noise / fan_in**0.5  # keeps the scale of activations


def _starts_silent(name: str, from_scratch: bool) -> bool:
    """Whether a layer is zero at first, so that it changes nothing until it is trained."""
    if name.endswith("lora_B"):
        return True  # each layer starts as it was before its LoRA
    if "head.head." in name:
        return True  # the last layer of the DiT: a new model's velocity is zero
    if from_scratch:
        return False  # nothing can be disturbed, and it learns sooner to keep the source
    # Kiwi-Edit's choice: the DiT starts as Wan's, which knows no source clip, and its context is
    # zero. The last layer of each connector sees to that.
    return "connector.2." in name or "source_embedding." in name


# --- Loading and saving ---------------------------------------------------------------------------

# The names of the files of our checkpoints.
FILES = r"(config|tokenizer)\.json|model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"


def load(
    path: str | Path | None = None,
    wan: str | Path | None = None,
    qwen: str | Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    shard: Callable[[RVEDiT], None] | None = None,
    decoder_dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[RVEDiT, WanVAE]:
    """The model and its VAE from what the user has; the README has a table of the possibilities.

    path: our checkpoint or Kiwi-Edit's release, which are folders, or Kiwi-Edit's training state, a
        file that needs wan and qwen as well. None, with no wan and qwen either: the built-in toy.
    wan, qwen: the folders of Wan2.2-TI2V-5B and of Qwen2.5-VL-3B-Instruct. Without a path they give
        a start for training, with random queries and LoRA and with connectors that are zero.
    dtype: of the model. decoder_dtype: of the VAE's decoder, float32 as in the official code. The
        VAE's encoder has float32 weights; `WanVAE.encoder_dtype` says in what it computes.
    shard: called with the model while it is on the meta device, before its weights are read.
    seed: of what is random at such a start.

    Raises ValueError for anything that does not fit, before any weights are read.
    """
    for wanted in (dtype, decoder_dtype):
        if wanted not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{wanted} is not supported: take float32, bfloat16 or float16")
    opened = _open(path, wan, qwen)
    config = _config(opened)
    # On the meta device a model has shapes and no memory: 8 billion parameters cost nothing there,
    # and FSDP can split them before any rank has to hold them all.
    with torch.device("meta"):
        model = RVEDiT(config, opened.tokenizer)
    if shard is not None:
        shard(model)
    tensors, vae_tensors = weights.split(opened.tensors, "vae.")
    weights.match(model, tensors, opened.source, opened.may_lack)  # before the VAE's are read

    vae = _filled_vae(config, vae_tensors, opened.source, device)
    vae.conv2.to(decoder_dtype)  # the decoder's first layer, although it stands beside it
    vae.decoder.to(decoder_dtype)
    fresh = weights.fill(model, tensors, opened.source, device, dtype, opened.may_lack)
    initialise(model, seed, fresh)  # such as queries or a LoRA; our checkpoints lack nothing
    return model.eval(), vae


def load_vae(
    path: str | Path | None = None,
    wan: str | Path | None = None,
    qwen: str | Path | None = None,
    device: torch.device | str = "cpu",
) -> tuple[RVEDiTConfig, WanVAE]:
    """Only the configuration and the VAE, in float32, of what `load` takes."""
    opened = _open(path, wan, qwen)
    config = _config(opened)
    _, vae_tensors = weights.split(opened.tensors, "vae.")
    return config, _filled_vae(config, vae_tensors, opened.source, device)


def _config(opened: weights.Opened) -> RVEDiTConfig:
    """The configuration of what was opened, checked. Raises ValueError, which names its file."""
    config = RVEDiTConfig(**opened.fields)
    weights.check_together(config, opened.tokenizer, opened.config_file, opened.part_files)
    return config


def _filled_vae(
    config: RVEDiTConfig,
    tensors: dict[str, weights.Stored],
    source: Path | str,
    device: torch.device | str,
) -> WanVAE:
    """The frozen VAE, in float32."""
    with torch.device("meta"):
        vae = WanVAE(config.vae)
    weights.fill(vae, tensors, f"the VAE of {source}", device)
    return vae.eval().requires_grad_(False)


def _open(
    path: str | Path | None, wan: str | Path | None, qwen: str | Path | None
) -> weights.Opened:
    """What `load` was given: names and shapes of its tensors, its configuration and tokenizer."""
    if path is None and wan is None and qwen is None:
        path = TOY
    path, wan, qwen = (None if given is None else Path(given) for given in (path, wan, qwen))
    for folder in (wan, qwen):
        if folder is not None and not folder.is_dir():
            raise ValueError(f"{folder} is not a folder")
    kind = "start" if path is None else layout(path)
    if kind in ("rvedit", "kiwi-edit"):
        if wan is not None or qwen is not None:
            raise ValueError(f"{path} holds its own Wan and Qwen: leave out --wan and --qwen")
        return _open_ours(path) if kind == "rvedit" else convert.open_kiwi_release(path)
    trained = None if path is None else convert.open_kiwi_training(path)
    if wan is None or qwen is None:
        what = f"{path} (Kiwi-Edit's training state)" if path else "a start without a checkpoint"
        raise ValueError(f"{what} needs both --wan DIR and --qwen DIR")
    if trained is None:
        return convert.open_wan_and_qwen(wan, qwen)
    return convert.over_wan_and_qwen(trained, path, wan, qwen)


def _open_ours(folder: Path) -> weights.Opened:
    file = folder / "config.json"
    fields = weights.read_json(file)
    fields.pop("model_type")  # by which `layout` knows our checkpoints; no field of ours
    tensors = weights.open_folder(folder, "model")
    fields.setdefault("num_image_tokens", 0)  # older checkpoints read stills as clips of one frame
    config = weights.build_config(RVEDiTConfig, fields, file)
    tokenizer = weights.read_tokenizer(folder)
    return weights.Opened(folder, vars(config), file, tokenizer, tensors)


def layout(path: str | Path) -> str:
    """What is stored at `path`: "rvedit", "kiwi-edit" or "kiwi-edit-training".

    Raises ValueError for anything else.
    """
    path = Path(path)
    if path.is_file():
        if re.fullmatch(FILES, path.name) and _is_ours(path.parent):
            raise ValueError(f"{path} is a file of our checkpoint: give its folder {path.parent}")
        return "kiwi-edit-training"
    if not path.is_dir():
        raise ValueError(
            f"checkpoint {path} does not exist: name a folder on this machine (see the README)"
        )
    if (path / "mllm_encoder").is_dir() and (path / "transformer").is_dir():
        return "kiwi-edit"
    if _is_ours(path):
        return "rvedit"
    if (path / "model" / "config.json").is_file():
        raise ValueError(f"{path} is the folder of a training: its checkpoint is {path / 'model'}")
    raise ValueError(
        f"{path} is neither a checkpoint of ours nor Kiwi-Edit's release: "
        f"it holds {weights.contents(path)}"
    )


def _is_ours(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and weights.read_json(config).get("model_type") == "rvedit"


def preset_of(path: str | Path) -> str:
    """The preset whose recipe trains a checkpoint: "toy" if it has no LoRA, else the full model's.

    Raises ValueError for anything that is no checkpoint.
    """
    if layout(path) != "rvedit":
        return "wan2.2-ti2v-5b"  # Kiwi-Edit's
    fields = weights.read_json(Path(path) / "config.json")
    return "wan2.2-ti2v-5b" if fields.get("lora_rank") else "toy"


def save(
    path: str | Path,
    model: RVEDiT,
    vae: WanVAE,
    tensors: Iterable[tuple[str, Tensor]] | None = None,
) -> None:
    """Write a self-contained checkpoint (unmerged LoRA, VAE, tokenizer), complete or not at all.

    tensors: names and tensors of the model's state dict. A sharded model gives them one at a time.
    A former checkpoint at `path` is replaced. Raises ValueError if anything else is there.
    """
    path = Path(path)
    check_replaceable(path)
    config = {"model_type": "rvedit"} | dataclasses.asdict(model.config)
    texts = {
        "config.json": json.dumps(config, indent=2),
        "tokenizer.json": model.encoder.tokenizer.to_str(pretty=True),
    }
    if tensors is None:
        tensors = model.state_dict().items()
    # The same files hold model and VAE, told apart by this prefix.
    vae_tensors = ((f"vae.{key}", value) for key, value in vae.state_dict().items())
    weights.write_checkpoint(path, itertools.chain(tensors, vae_tensors), texts)


def check_replaceable(path: str | Path) -> None:
    """Raise ValueError if something is at `path` that is not a checkpoint of ours."""
    path = Path(path)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if layout(path) != "rvedit":
        raise ValueError(
            f"{path} is not a checkpoint of ours, so it will not be replaced: choose another name"
        )
    for entry in sorted(path.iterdir()):
        if not re.fullmatch(FILES, entry.name) and entry.name != ".DS_Store":  # a Mac's own
            raise ValueError(f"{entry} would be lost with the checkpoint beside it: move it away")


def scratch(
    seed: int, device: torch.device | str = "cpu", shard: Callable[[RVEDiT], None] | None = None
) -> tuple[RVEDiT, WanVAE]:
    """The toy preset with random weights, and the tokenizer and VAE of the built-in checkpoint."""
    built_in, vae = load_vae(TOY, device=device)
    config = dataclasses.replace(preset("toy"), vae=built_in.vae)
    with torch.device("meta"):
        model = RVEDiT(config, weights.read_tokenizer(TOY))
    if shard is not None:
        shard(model)
    weights.allocate(model, device, torch.float32)
    initialise(model, seed)
    return model.eval(), vae
