"""A configuration is checked before anything is built: every field, by its type and its bounds."""

import dataclasses
import json
import math
import shutil
import typing

import pytest
from tokenizers import Tokenizer, models

import rvedit
import weights
from rvedit import RVEDiTConfig

TOY = json.loads((rvedit.TOY / "config.json").read_text())
TOY.pop("model_type")
TOY.setdefault("num_image_tokens", 0)  # as rvedit.load does for older checkpoints
TOKENIZER = weights.read_tokenizer(rvedit.TOY)


def leaves(kind, prefix=""):
    """Path and type of each field that is not an object, such as ("dit.dim", int)."""
    for name, expected in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(expected):
            yield from leaves(expected, f"{prefix}{name}.")
        else:
            yield prefix + name, expected


LEAVES = dict(leaves(RVEDiTConfig))
NUMBERS = [path for path, expected in LEAVES.items() if expected in (int, float)]
LISTS = [path for path, expected in LEAVES.items() if typing.get_origin(expected) is tuple]
TREES = ["dit", "vae", "qwen", "qwen.vision"]


def with_value(path, value):
    """The toy's configuration with another value of one field."""
    fields = json.loads(json.dumps(TOY))
    *parents, name = path.split(".")
    tree = fields
    for parent in parents:
        tree = tree[parent]
    tree[name] = value
    return fields


def without(path):
    fields = with_value(path, None)
    *parents, name = path.split(".")
    tree = fields
    for parent in parents:
        tree = tree[parent]
    del tree[name]
    return fields


def build(fields, tokenizer=TOKENIZER):
    config = weights.build_config(RVEDiTConfig, fields, "config.json")
    weights.check_together(config, tokenizer, "config.json")
    return config


def tokenizer_of(qwen):
    """One that has nothing but the tokens that the configuration names."""
    ids = {
        "<|video_pad|>": qwen.video_token_id,
        "<|image_pad|>": qwen.image_token_id,
        "<|object_ref_start|>": qwen.query_token_id,
    }
    return Tokenizer(models.WordLevel(ids, unk_token="<|video_pad|>"))


def refusal(fields):
    """The one line that says what is wrong."""
    with pytest.raises(ValueError, match=r"^config.json: ") as error:
        build(fields)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_shipped_configuration_and_the_presets_are_right():
    build(TOY)
    for name in ("toy", "wan2.2-ti2v-5b"):
        config = rvedit.preset(name)
        assert build(dataclasses.asdict(config), tokenizer_of(config.qwen)) == config


def test_every_number_that_may_be_a_fraction_has_bounds_of_its_own():
    fractions = {path for path in LEAVES if LEAVES[path] in (float, tuple[float, ...])}
    assert fractions <= weights.BOUNDS.keys() <= LEAVES.keys()


@pytest.mark.parametrize("path", NUMBERS)
def test_what_is_no_such_number_is_refused(path):
    wrong = [None, "9", "", [1], {}, True, math.nan, math.inf, -1e99, 1e99]
    if LEAVES[path] is int:
        wrong += [1.5, 1.0, -1, 10**9, 10**400]
        if weights.BOUNDS.get(path, weights.USUAL_BOUNDS)[0] > 0:
            wrong.append(0)
    for value in wrong:
        assert path in refusal(with_value(path, value)), value


@pytest.mark.parametrize("path", LISTS)
def test_what_is_no_such_list_is_refused(path):
    for value in (None, 1, "1, 2", {}, [None], [[1]], ["1"], [math.nan], [1e99]):
        assert path in refusal(with_value(path, value)), value


@pytest.mark.parametrize("path", TREES)
def test_what_is_no_object_is_refused(path):
    for value in (None, 1, "dit", [], [1]):
        assert path in refusal(with_value(path, value)), value


@pytest.mark.parametrize("path", [*LEAVES, *TREES])
def test_a_missing_field_is_named_unless_older_checkpoints_lack_it(path):
    if path in weights.ADDED_LATER:
        weights.build_config(RVEDiTConfig, without(path), "config.json")
    else:
        assert refusal(without(path)) == f"config.json: the field {path} is missing"


@pytest.mark.parametrize("path", ["colour", "dit.colour", "qwen.vision.colour"])
def test_an_unknown_field_is_named(path):
    assert refusal(with_value(path, 1)) == f"config.json: this model has no field {path!r}"


MISFITS = {  # wrong only beside other fields: the field, its value, the field that the line names
    "dit.num_heads": (7, "heads"),
    "dit.dim": (250, "heads"),
    "dit.in_channels": (16, "vae.z_dim"),
    "dit.out_channels": (16, "vae.z_dim"),
    "vae.z_dim": (16, "vae.z_dim"),
    "vae.dim_mult": ([1, 4], "dim_mult"),
    "vae.latents_mean": ([0.0], "vae.latents_mean"),
    "vae.latents_std": ([1.0] * 25, "vae.latents_std"),
    "qwen.vision.num_heads": (5, "qwen.vision.num_heads"),
    "qwen.vision.hidden_size": (90, "qwen.vision.hidden_size"),
    "qwen.vision.window_size": (15, "qwen.vision.window_size"),
    "qwen.hidden_size": (130, "qwen.mrope_section"),
    "qwen.num_attention_heads": (8, "qwen.mrope_section"),
    "qwen.num_key_value_heads": (6, "qwen.num_key_value_heads"),
    "qwen.image_token_id": (3, "qwen.image_token_id"),
    "qwen.mrope_section": ([4, 6, 7], "qwen.mrope_section"),
    "qwen.video_token_id": (3, "qwen.video_token_id"),
    "qwen.query_token_id": (768, "qwen.query_token_id"),
    "qwen.vocab_size": (700, "qwen.vocab_size"),
    "routing_depth": (7, "routing depth 7"),
    "min_mllm_pixels": (128**2 + 1, "min_mllm_pixels"),
}


@pytest.mark.parametrize("path", MISFITS)
def test_numbers_that_do_not_go_together_are_refused(path):
    value, named = MISFITS[path]
    assert named in refusal(with_value(path, value))


def test_a_long_value_is_shown_in_short():
    assert len(refusal(with_value("max_frames", "9" * 10_000))) < 200


@pytest.mark.parametrize("value", [10**9, "3", None], ids=str)
@pytest.mark.parametrize("path", ["dit.num_blocks", "qwen.vision.depth", "vae.latents_std"])
def test_a_checkpoint_with_such_a_configuration_is_refused_before_it_is_built(
    path, value, tmp_path, monkeypatch
):
    """The file is named with its folder."""
    folder = shutil.copytree(rvedit.TOY, tmp_path / "toy")
    fields = {"model_type": "rvedit"} | with_value(path, value)
    (folder / "config.json").write_text(json.dumps(fields))
    monkeypatch.setattr(rvedit, "RVEDiT", lambda *_: pytest.fail("the model was built"))
    with pytest.raises(ValueError) as error:
        rvedit.load(folder)
    assert str(error.value).startswith(f"{folder / 'config.json'}: {path} is {value!r}, not ")
