"""Checkpoint files: how they are opened, how a model is filled from them, and how ours are written.

Opening a checkpoint reads only the names and shapes of its tensors. `convert.py` gives the tensors
of public releases our names: those of the original Wan and of the hub's Qwen. Then a model gets its
weights tensor by tensor. So mistakes are found before any weights are read, and memory holds no
second copy. Nothing is unpickled, and nothing is fetched from the network. `rvedit.load` and
`rvedit.save` put the pieces together.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm

import cli

MAX_SHARD_BYTES = 5_000_000_000

# What may stand in the place of a file, by its first bytes in lower case.
INSTEAD = {
    b"version https://git-lfs": "it is a Git LFS pointer: run `git lfs pull`",
    b"<!doctype": "it is a web page: download it again",
    b"<html": "it is a web page: download it again",
    b"gguf": "it is GGUF, which is not supported",
    bytes(8): "it begins with zeros: download it again",
}

# The tokens of Qwen's chat text that stand for more than their letters.
CHAT_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


class Stored(NamedTuple):
    """A tensor on disk: where it is, its shape, and how to read it."""

    file: Path
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    key: str = ""  # its name there
    is_float: bool = True  # and not float8, which is quantised as integers are


class Opened(NamedTuple):
    """A checkpoint of any layout, opened and brought to our names."""

    source: Path | str  # what it is, for messages
    fields: dict[str, Any]  # of an RVEDiTConfig
    config_file: Path  # where they stand
    tokenizer: Tokenizer
    tensors: dict[str, Stored]  # the model's, and the VAE's under "vae."
    may_lack: str | None = None  # parameters that it may lack, as a regular expression
    part_files: dict[str, Path] = {}  # where the fields of "dit", "vae" or "qwen" stand instead


# --- Opening --------------------------------------------------------------------------------------


def open_file(path: Path) -> dict[str, Stored]:
    """The tensors of a .safetensors file, or of a PyTorch state dict."""
    download = path.with_name(f"{path.name}.aria2")
    if download.exists():  # such a file has its full length from the start
        raise ValueError(f"{path} is not downloaded to its end, says {download.name} beside it")
    open_it = _open_safetensors if path.suffix == ".safetensors" else _open_state_dict
    tensors = open_it(path)
    # Read without their scales, such weights would be noise, or worse than they should be.
    quantised = [key for key, x in tensors.items() if not x.is_float and len(x.shape) > 1]
    if quantised:
        raise ValueError(
            f"{path} is quantised, which is not supported: {len(quantised)} of its tensors are "
            f"integers or float8 ({few(quantised)}). Take the float32 or bfloat16 weights"
        )
    return tensors


def unique(named: Iterable[tuple[str, Stored]]) -> dict[str, Stored]:
    """Tensors by their names. Raises ValueError if two have the same, so that none is lost."""
    tensors = {}
    for name, tensor in named:
        other = tensors.setdefault(name, tensor)
        if other is not tensor:
            raise ValueError(
                f"{tensor.file.parent} has {name} twice, as {other.key} in {other.file.name} and "
                f"as {tensor.key} in {tensor.file.name}"
            )
    return tensors


def joined(*parts: dict[str, Stored]) -> dict[str, Stored]:
    """The tensors of several files or folders, no two of which may have the same name."""
    return unique(item for part in parts for item in part.items())


def _open_safetensors(path: Path) -> dict[str, Stored]:
    try:
        file = safe_open(path, framework="pt")
        slices = {key: file.get_slice(key) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        reason = what_it_is(path) or _first_line(error)
        raise ValueError(f"{path} is damaged or not a safetensors file: {reason}") from None
    tensors = {}
    for key, part in slices.items():
        shape = tuple(part.get_shape())
        is_float = part.get_dtype() in ("F64", "F32", "F16", "BF16")
        # key=key: without it, each of these functions would read the last key of the loop.
        tensors[key] = Stored(path, shape, lambda key=key: file.get_tensor(key), key, is_float)
    return tensors


def _open_state_dict(path: Path) -> dict[str, Stored]:
    """A .pth file. weights_only makes PyTorch unpickle tensors and nothing else."""
    try:
        with warnings.catch_warnings(action="ignore"):  # such as that it is a TorchScript file
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception:  # its message would be the advice to unpickle the file after all
        state = None
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and type(value) in (Tensor, nn.Parameter)
        for key, value in state.items()
    ):
        reason = what_it_is(path) or "or is damaged"
        raise ValueError(
            f"{path} is not a plain state dict of tensors (by PyTorch 1.6 or newer), {reason}"
        )
    tensors = {}
    for key, value in state.items():
        shape = tuple(value.shape)
        is_float = value.is_floating_point() and value.itemsize > 1
        tensors[key] = Stored(path, shape, lambda value=value: value, key, is_float)
    return tensors


def open_folder(folder: Path, stem: str) -> dict[str, Stored]:
    """The tensors of `stem`.safetensors in a folder, or of the shards that its index lists."""
    single = folder / f"{stem}.safetensors"
    index = folder / f"{stem}.safetensors.index.json"
    if not index.is_file():
        if single.is_file():
            return open_file(single)
        raise ValueError(
            f"{folder} has neither {single.name} nor {index.name}: it holds {contents(folder)}"
        )
    weight_map = _read_index(index)
    shards = sorted(set(weight_map.values()))
    absent = [shard for shard in shards if not shard.is_file()]
    if single.is_file() and absent == shards:
        return open_file(single)  # it has taken the place of former shards
    if single.is_file() and single not in shards:
        raise ValueError(
            f"{folder} has weights twice, in {single.name} and in the shards of {index.name}: "
            f"move the old ones away"
        )
    if absent:
        raise ValueError(f"{index} lists {absent[0].name}, which is not there: download it again")
    tensors = joined(*(open_file(shard) for shard in shards))
    # A download that was cut short, or shards of two versions in one folder, show here.
    stored = {key: tensor.file for key, tensor in tensors.items()}
    wrong = {key for key, _ in weight_map.items() ^ stored.items()}
    if wrong:
        raise ValueError(
            f"{index} and its shards disagree on {len(wrong)} tensors ({few(wrong)}): "
            f"download them again"
        )
    return tensors


def _read_index(index: Path) -> dict[str, Path]:
    """The file of each key."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(x, str) for x in weight_map.values()):
        raise ValueError(f"{index} has no weight_map of names and files: download it again")
    return {key: index.parent / name for key, name in weight_map.items()}


def contents(folder: Path) -> str:
    """The first names in a folder, for messages. A link that leads nowhere is not there."""
    names = sorted(path.name for path in folder.glob("[!.]*") if path.exists())
    return ", ".join(names[:5]) or "nothing"


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # the last for brackets by the thousand
        reason = what_it_is(path) or _first_line(error)
        raise ValueError(f"{path} cannot be read as JSON: {reason}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content


def read_tokenizer(folder: Path) -> Tokenizer:
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"{folder} has no tokenizer.json: download it again")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises a bare Exception
        reason = what_it_is(file) or _first_line(error)
        raise ValueError(f"{file} is not a tokenizer: {reason}") from None
    # Some files keep these settings of a former use: with truncation, long prompts would be cut.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # And some call these tokens ordinary ones, which an instruction could then contain.
    chat_tokens = [token for token in CHAT_TOKENS if tokenizer.token_to_id(token) is not None]
    tokenizer.add_special_tokens(chat_tokens)
    return tokenizer


# --- Configurations -------------------------------------------------------------------------------

# The smallest and the largest value of the numbers that may be others than 1 to 65,536. The bounds
# are wide: they keep a damaged file from building for ever, filling the memory or dividing by zero.
# Whether sizes fit the weights is found by `match`.
USUAL_BOUNDS = (1, 65_536)
BOUNDS: dict[str, tuple[float, float]] = {
    "dit.num_blocks": (1, 256),
    "dit.patch_size": (1, 16),
    "dit.eps": (1e-12, 0.1),
    "vae.dim_mult": (1, 64),
    "vae.num_res_blocks": (1, 32),
    "vae.latents_mean": (-1e4, 1e4),
    "vae.latents_std": (1e-4, 1e4),
    "qwen.vision.depth": (1, 256),
    "qwen.vision.patch_size": (1, 256),
    "qwen.vision.spatial_merge_size": (1, 16),
    "qwen.vision.fullatt_block_indexes": (0, 255),
    "qwen.vocab_size": (1, 2**24),
    "qwen.num_hidden_layers": (1, 256),
    "qwen.max_position_embeddings": (512, 2**24),  # the chat text alone may take some hundreds
    "qwen.rms_norm_eps": (1e-12, 0.1),
    "qwen.rope_theta": (1, 1e12),
    "qwen.mrope_section": (0, 65_536),
    "qwen.image_token_id": (0, 2**24),
    "qwen.video_token_id": (0, 2**24),
    "qwen.query_token_id": (0, 2**24),
    "routing_depth": (0, 256),
    "num_image_tokens": (0, 65_536),
    "align_weight": (0, 1e6),
    "temperature": (1e-4, 1e4),
    "lora_rank": (0, 65_536),
    "min_mllm_pixels": (1, 2**24),
    "max_mllm_pixels": (1, 2**24),
    "max_pixels": (1, 2**26),
    "min_pixels": (0, 2**26),
}

ADDED_LATER = {  # fields that older checkpoints of ours lack
    "dit.bf16_timestep",
    "dit.home_grid",
    "min_pixels",
    "qwen.image_token_id",
    "num_image_tokens",
    "sampling_steps",
}


def build_config(kind: type, fields: Any, file: Path, prefix: str = "") -> Any:
    """A dataclass of configuration from what `file` says, with every value checked first.

    fields: a JSON object. prefix: where it is in the whole configuration, such as "dit.". Raises
    ValueError, which names the file and the field, for a value of another type or out of its
    bounds, and for a field that is missing or unknown.
    """
    if not isinstance(fields, dict):
        raise ValueError(f"{file}: {prefix.rstrip('.')} is {_short(fields)}, not an object")
    types = typing.get_type_hints(kind)  # the annotations are strings until this resolves them
    for name in sorted(fields.keys() - types.keys()):
        raise ValueError(f"{file}: this model has no field {_short(prefix + name)}")
    values = {}
    for name, expected in types.items():
        path = prefix + name
        if name in fields:
            values[name] = checked(fields[name], expected, file, path)
        elif path not in ADDED_LATER:
            raise ValueError(f"{file}: the field {path} is missing")
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def checked(value: Any, expected: Any, file: Path, path: str) -> Any:
    """The value of the field `path`, if it has the type `expected` and is within its bounds."""
    if dataclasses.is_dataclass(expected):
        return build_config(expected, value, file, f"{path}.")
    if expected is bool:
        if type(value) is not bool:
            raise ValueError(f"{file}: {path} is {_short(value)}, not true or false")
        return value
    if typing.get_origin(expected) is tuple:  # a list in JSON
        return _checked_tuple(value, typing.get_args(expected), file, path)
    kinds, name = ((int,), "a whole number") if expected is int else ((int, float), "a number")
    low, high = BOUNDS.get(path, USUAL_BOUNDS)
    if type(value) not in kinds or not low <= value <= high:  # true is no number; nan is refused
        raise ValueError(f"{file}: {path} is {_short(value)}, not {name} from {low:,} to {high:,}")
    return value


def _checked_tuple(value: Any, kinds: tuple[Any, ...], file: Path, path: str) -> tuple[Any, ...]:
    """kinds: of tuple[int, int, int] or, for any length, of tuple[int, ...]."""
    if not isinstance(value, list | tuple):
        raise ValueError(f"{file}: {path} is {_short(value)}, not a list")
    length = len(value) if kinds[-1] is Ellipsis else len(kinds)
    if len(value) != length or length > 1024:
        raise ValueError(f"{file}: {path} has {len(value)} values, not {min(length, 1024)}")
    return tuple(checked(item, kinds[0], file, path) for item in value)


def check_together(
    config: Any, tokenizer: Tokenizer, file: Path, part_files: dict[str, Path] | None = None
) -> None:
    """Raise ValueError if the numbers of an RVEDiTConfig are right one by one, but not together.

    It names `file`, or the file in `part_files` of the part that the broken rule begins with.
    """
    dit, vae, qwen = config.dit, config.vae, config.qwen
    vision = qwen.vision
    video_pad, image_pad, query = (
        tokenizer.token_to_id(token)
        for token in ("<|video_pad|>", "<|image_pad|>", "<|object_ref_start|>")
    )
    # What shapes of weights do not tell. A rule begins with the field that it is about.
    rules = {
        "dit.in_channels and dit.out_channels must be vae.z_dim": (
            dit.in_channels == dit.out_channels == vae.z_dim
        ),
        "dit.home_grid must have 2 values, or none": len(dit.home_grid) in (0, 2),
        "vae.latents_mean and vae.latents_std must have vae.z_dim values each, or none": (
            {len(vae.latents_mean), len(vae.latents_std)} <= {0, vae.z_dim}
        ),
        "qwen.vision.hidden_size must divide into qwen.vision.num_heads heads of 4n channels": (
            vision.hidden_size % (4 * vision.num_heads) == 0
        ),
        "qwen.vision.window_size must hold a visual token": vision.window_size >= vision.token_side,
        "qwen.num_attention_heads must be a multiple of qwen.num_key_value_heads": (
            qwen.num_attention_heads % qwen.num_key_value_heads == 0
        ),
        "qwen.mrope_section must be three numbers with half of a head's channels as their sum": (
            len(qwen.mrope_section) == 3
            and 2 * sum(qwen.mrope_section) * qwen.num_attention_heads == qwen.hidden_size
        ),
        "qwen.vocab_size must not be less than the tokenizer's": (
            qwen.vocab_size >= tokenizer.get_vocab_size()
        ),
        f"qwen.video_token_id must be the tokenizer's {video_pad}": (
            qwen.video_token_id == video_pad
        ),
        f"qwen.query_token_id must be the tokenizer's {query}": qwen.query_token_id == query,
        f"qwen.image_token_id must be the tokenizer's {image_pad}": (
            qwen.image_token_id == image_pad
            # Older checkpoints, which read stills as clips, have one that no text contains.
            or (config.num_image_tokens == 0 and qwen.image_token_id >= qwen.vocab_size)
        ),
        "min_mllm_pixels must not exceed max_mllm_pixels": (
            config.min_mllm_pixels <= config.max_mllm_pixels
        ),
    }
    for rule, holds in rules.items():
        if not holds:
            part = rule.partition(".")[0]
            raise ValueError(f"{(part_files or {}).get(part, file)}: {rule}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# --- Filling a model ------------------------------------------------------------------------------


def split(tensors: dict[str, Stored], prefix: str) -> tuple[dict[str, Stored], dict[str, Stored]]:
    """The tensors whose names lack a prefix, and those that have it, which is taken off."""
    without = {key: x for key, x in tensors.items() if not key.startswith(prefix)}
    with_it = {key.removeprefix(prefix): x for key, x in tensors.items() if key.startswith(prefix)}
    return without, with_it


def match(
    module: nn.Module,
    tensors: dict[str, Stored],
    source: Path | str,
    may_lack: str | None = None,
) -> list[str]:
    """Compare a module's parameters with the stored tensors, by name and shape, before any is read.

    Returns the names of parameters that are not stored, which the caller has to initialise. Only
    those may be absent whose names match the regular expression `may_lack`. Any other missing,
    unexpected or misshapen key raises ValueError, which names `source`.
    """
    parameters = dict(module.named_parameters())
    absent = [key for key in parameters if key not in tensors]
    fresh = [key for key in absent if may_lack is not None and re.search(may_lack, key)]
    misshapen = [
        f"{key} {list(tensors[key].shape)} instead of {list(parameter.shape)}"
        for key, parameter in parameters.items()
        if key in tensors and tensors[key].shape != tuple(parameter.shape)
    ]
    problems = {
        "missing": set(absent) - set(fresh),
        "unexpected": tensors.keys() - parameters.keys(),
        "misshapen": misshapen,
    }
    found = [f"{len(keys)} {kind} ({few(keys)})" for kind, keys in problems.items() if keys]
    if found:
        raise ValueError(f"{source} does not fit the model: {'; '.join(found)}")
    return fresh


@torch.no_grad()
def fill(
    module: nn.Module,
    tensors: dict[str, Stored],
    source: Path | str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    may_lack: str | None = None,
) -> list[str]:
    """Give a module on the meta device its weights, tensor by tensor, in a dtype on a device.

    If FSDP has sharded the module, each rank keeps only its part of every tensor. The other
    arguments, the result and the errors are those of `match`.
    """
    fresh = match(module, tensors, source, may_lack)
    allocate(module, device, dtype)
    parameters = dict(module.named_parameters())
    for key in tqdm(tensors, desc="loading", unit="tensor", disable=None, leave=False):
        assign(parameters[key], read_finite(key, tensors[key], dtype))  # no name holds on to it
    return fresh


def read_finite(key: str, tensor: Stored, dtype: torch.dtype) -> Tensor:
    """The values of a stored tensor, in a dtype.

    NaN and infinity, also from values that are too large for the dtype, raise ValueError, which
    names the file.
    """
    value = tensor.read().to(dtype)
    if not is_finite(value):
        raise ValueError(
            f"{tensor.file}: {key} has values that are not finite in {str(dtype)[6:]}, so every "
            f"edit would be black: the file is damaged, or its training has diverged"
        )
    return value


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds no NaN and no infinity."""
    # A sum takes half as long as copying the tensor, isfinite ten times as long. If the sum is
    # finite, so is each value; a sum that is not may be an overflow.
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def digest_of(*modules: nn.Module) -> str:
    """A hash of the first weights of each tensor, of which any training changes some."""
    digest = hashlib.sha256()
    for module in modules:
        for weight in module.parameters():
            digest.update(weight.detach().flatten()[:16].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def allocate(module: nn.Module, device: torch.device | str, dtype: torch.dtype) -> None:
    """Give a module on the meta device memory for its parameters, without values."""
    parameters = dict(module.named_parameters())
    if any(hasattr(parameter, "device_mesh") for parameter in parameters.values()):
        module.to(dtype).to_empty(device=device)  # FSDP's
        return
    # What to_empty does, but it imports sympy for meta tensors: half a second.
    for name, parameter in parameters.items():
        parent, _, leaf = name.rpartition(".")
        empty = torch.empty(parameter.shape, dtype=dtype, device=device)
        value = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        setattr(module.get_submodule(parent), leaf, value)


@torch.no_grad()
def assign(parameter: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into a parameter, or this rank's part of it into a sharded one."""
    if hasattr(parameter, "device_mesh"):  # a DTensor, whose class takes a second to import
        from torch.distributed.tensor import distribute_tensor

        value = value.to(parameter.device, parameter.dtype)
        mesh, placements = parameter.device_mesh, parameter.placements
        value = distribute_tensor(value, mesh, placements, src_data_rank=None)
    parameter.copy_(value)


# --- Writing our checkpoint -----------------------------------------------------------------------


def write_checkpoint(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], texts: dict[str, str]
) -> None:
    """Write shards of safetensors with an index, and text files such as config.json.

    Complete or not at all: a former checkpoint stays in its place until the new one is whole. Only
    one shard is held in memory, so the tensors may be made one at a time.
    """
    _remove_leftovers(folder)
    with cli.replacing(folder) as partial:
        partial.mkdir(parents=True)
        # The index names the file of each tensor, and is only known when all shards are written.
        weight_map = _write_shards(partial, tensors)
        texts = texts | {
            "model.safetensors.index.json": json.dumps({"weight_map": weight_map}, indent=1)
        }
        for name, text in texts.items():
            (partial / name).write_text(text, encoding="utf-8")
        for shard in partial.glob("*.safetensors"):
            # The library makes its files readable for their owner only.
            shutil.copymode(partial / "model.safetensors.index.json", shard)


def _remove_leftovers(folder: Path) -> None:
    """Delete what a run that was killed has written of its checkpoint: gigabytes, perhaps."""
    folder = folder.resolve()  # as `cli.replacing` does
    partial = re.compile(rf"\.partial-(\d+)-{re.escape(folder.name)}")
    for path in folder.parent.glob(".partial-*"):
        name = partial.fullmatch(path.name)
        if name and not _runs(int(name[1])):
            shutil.rmtree(path, ignore_errors=True)


def _runs(process: int) -> bool:
    """Whether another process has this number, so that it may be writing."""
    try:
        os.kill(process, 0)  # sends nothing, but fails if there is no such process
    except PermissionError:  # it is another user's
        return True
    except (OSError, OverflowError):
        return False
    return process != os.getpid()  # a restarted container gives its numbers out again


def _write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Write the tensors under file names that count the shards; returns the file of each key."""
    keys_of_shards = []
    for number, shard in enumerate(_shards(tensors), start=1):
        # Under a number for now: the final names say how many shards there are.
        try:
            save_file(shard, folder / f"{number}", metadata={"format": "pt"})
        except SafetensorError as error:  # of the operating system, such as a full disk
            raise OSError(_first_line(error)) from None
        keys_of_shards.append(list(shard))
    weight_map = {}
    for number, keys in enumerate(keys_of_shards, start=1):
        name = f"model-{number:05d}-of-{len(keys_of_shards):05d}.safetensors"
        (folder / f"{number}").rename(folder / name)
        weight_map |= dict.fromkeys(keys, name)
    return weight_map


def _shards(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Groups of tensors on the CPU, of at most MAX_SHARD_BYTES each or of a single tensor."""
    shard = {}
    size = 0
    for key, tensor in tensors:
        tensor = tensor.detach().cpu().contiguous()
        if shard and size + tensor.nbytes > MAX_SHARD_BYTES:
            yield shard
            shard = {}
            size = 0
        shard[key] = tensor
        size += tensor.nbytes
    yield shard


def few(keys: Iterable[str]) -> str:
    keys = sorted(keys)
    return ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")


def what_it_is(path: Path) -> str | None:
    """What stands in the place of a file, if its first bytes tell."""
    try:
        with open(path, "rb") as file:
            start = file.read(200).lower().lstrip()
    except OSError:
        return None
    return next((what for first, what in INSTEAD.items() if start.startswith(first)), None)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
