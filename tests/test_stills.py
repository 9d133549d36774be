"""Claims about stills.py, through video.py, held against FFmpeg, Pillow and plain arithmetic."""

import base64
import dataclasses
import struct
import sys
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from pillow_heif import register_heif_opener
from test_video import (
    SDR_COLOURS,
    decoded,
    edited,
    encode,
    grey_levels,
    naive_hdr,
    times,
)

import video

# --- reading --------------------------------------------------------------------------------------


def picture(height: int = 45, width: int = 61) -> np.ndarray:
    """A smooth picture with odd sides that looks different from every side."""
    y, x = np.mgrid[:height, :width]
    return np.stack([4 * x, 5 * y, 2 * (x + y)], -1).clip(0, 255).astype(np.uint8)


def on_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return np.round(rgb * share + 255 * (1 - share))


def turned(image: np.ndarray, orientation: int) -> np.ndarray:
    """As EXIF defines it: where the first row and the first column of what is stored belong."""
    return {
        1: image,
        2: image[:, ::-1],
        3: image[::-1, ::-1],
        4: image[::-1],
        5: image.swapaxes(0, 1),
        6: np.rot90(image, -1),
        7: image[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(image),
    }[orientation]


QUALITY = {
    ".png": {},
    ".webp": dict(lossless=True),
    ".jpg": dict(quality=97, subsampling="4:4:4"),
    ".avif": dict(quality=97, subsampling="4:4:4"),
}


def save_still(path: Path, kind: str) -> np.ndarray:
    """Write a still with Pillow. Returns the picture that a viewer shows, (H, W, 3)."""
    rgb = picture()
    alpha = rgb[..., 0]
    image = Image.fromarray(rgb)
    shown = rgb
    options = QUALITY[path.suffix].copy()
    if kind == "alpha":
        image = Image.fromarray(np.dstack([rgb, alpha]))
        shown = on_white(rgb, alpha)
    elif kind == "grey with alpha":
        image = Image.fromarray(np.dstack([rgb[..., 1], alpha]))
        shown = on_white(rgb[..., 1:2], alpha).repeat(3, 2)
    elif kind.startswith("palette"):
        index = alpha // 16
        palette = np.random.default_rng(0).integers(0, 256, (16, 3), dtype=np.uint8)
        image = Image.fromarray(index)
        image.putpalette(palette.tobytes())
        shown = palette[index]
        if kind == "palette with alpha":
            options["transparency"] = bytes(range(0, 256, 16))
            shown = on_white(shown, 16 * index)
    elif kind == "one colour transparent":
        options["transparency"] = tuple(rgb[7, 9].tolist())
        shown = np.where((rgb == rgb[7, 9]).all(-1, keepdims=True), 255, rgb)
    elif kind == "grey":
        image = Image.fromarray(rgb[..., 0])
        shown = rgb[..., :1].repeat(3, axis=2)
    elif kind == "black and white":
        image = Image.fromarray(alpha > 100)
        shown = 255 * (rgb[..., :1] > 100).repeat(3, axis=2)
    elif kind == "16 bits":
        image = Image.fromarray(rgb[..., 0].astype(np.uint16) * 257)
        shown = rgb[..., :1].repeat(3, axis=2)
    elif kind == "CMYK":
        image = image.convert("CMYK")
    elif kind.startswith("turned"):
        exif = Image.Exif()
        exif[0x0112] = int(kind[-1])
        options["exif"] = exif
        shown = turned(rgb, int(kind[-1]))
    image.save(path, **options)
    return shown


MODES = ("colour", "alpha", "palette", "palette with alpha", "one colour transparent")
MODES += ("grey", "grey with alpha", "black and white", "16 bits")


@pytest.mark.parametrize(
    "name, kind",
    [
        *[("in.png", kind) for kind in MODES],
        *[("in.jpg", kind) for kind in ("colour", "grey", "CMYK")],
        *[("in.webp", kind) for kind in ("colour", "alpha")],
        *[("in.avif", kind) for kind in ("colour", "alpha")],
        *[("in.jpg", f"turned {i}") for i in range(1, 9)],
        *[("in.avif", f"turned {i}") for i in range(1, 9)],
        *[("in.png", "turned 6"), ("in.webp", "turned 6")],
        *[("100%03d.png", "colour"), ("100%03d.jpg", "colour")],
    ],
)
def test_stills_are_read_as_viewers_show_them(tmp_path: Path, name: str, kind: str) -> None:
    """One frame, upright, with odd sides, transparent pixels on white."""
    shown = save_still(tmp_path / name, kind)
    clip = video.read_video(tmp_path / name)
    assert clip.total == 1 and clip.timestamps == [0]
    assert clip.frames.shape == (1, *shown.shape)
    error = np.abs(clip.frames[0].numpy() - shown.astype(float))
    assert error.max() <= (4 if name.endswith((".jpg", ".avif")) else 0)


def test_an_opened_still_is_a_read_one(tmp_path: Path) -> None:
    """One picture always fits into memory."""
    shown = save_still(tmp_path / "in.png", "turned 6")
    opened = video.open_video(tmp_path / "in.png", 5)
    assert [block.shape for block in opened.blocks(8)] == [(1, *shown.shape)]
    whole = video.read_video(tmp_path / "in.png")
    assert torch.equal(whole.frames, opened.frames)
    assert dataclasses.replace(whole, frames=None) == dataclasses.replace(opened, frames=None)


@pytest.mark.parametrize(
    "name, options",
    [
        ("in.jpg", dict(subsampling="4:2:0")),
        ("in.jpg", dict(subsampling="4:2:2")),
        ("in.jpg", dict(subsampling="4:4:4", progressive=True)),
        ("in.webp", {}),
        ("in.avif", {}),
    ],
)
def test_ffmpeg_reads_the_same_numbers(tmp_path: Path, name: str, options: dict) -> None:
    """In lossy formats too. Colours between two samples of colour are interpolated in two ways."""
    Image.fromarray(picture()).save(tmp_path / name, quality=90, **options)
    (read,) = video.read_video(tmp_path / name).frames.numpy()
    (reference,) = decoded(tmp_path / name)[1]
    error = np.abs(read.astype(int) - reference)
    assert error.max() <= 9 and error.mean() < 1.5


@pytest.mark.parametrize("form", ["rgb48be", "rgba64be", "ya16be", "gray16be"])
def test_sixteen_bits_become_eight(tmp_path: Path, form: str) -> None:
    """FFmpeg writes each level l as 257 l."""
    image = picture()[..., :1].repeat(3, 2) if "rgb" not in form else picture()
    encode(tmp_path / "in.png", image[None], codec="png", pix_fmt=form)
    assert Image.open(tmp_path / "in.png").size == (61, 45)
    error = video.read_video(tmp_path / "in.png").frames[0].int().numpy() - image
    assert np.abs(error).max() <= 1


def png_with(numbers: np.ndarray, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file of uint16 (H, W, 3), with chunks of given names before its pixels."""
    height, width, _ = numbers.shape
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in numbers)
    data = b"\x89PNG\r\n\x1a\n"
    for name, content in (
        (b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    ):  # fmt: skip
        data += struct.pack(">I", len(content)) + name + content
        data += struct.pack(">I", zlib.crc32(name + content))
    return data


@pytest.mark.parametrize("name", ["in.png", "100%03d.png"])
def test_an_hdr_png_becomes_bt709(tmp_path: Path, name: str) -> None:
    """Pillow does not know of HDR, so FFmpeg reads it."""
    signals = np.stack([naive_hdr(colour, "pq") for colour in SDR_COLOURS])
    numbers = np.round(65535 * signals)[None].repeat(8, 0).astype(np.uint16)
    pq_of_bt2020 = bytes([9, 16, 0, 1])
    (tmp_path / name).write_bytes(png_with(numbers, (b"cICP", pq_of_bt2020)))
    clip = video.read_video(tmp_path / name)
    assert clip.total == 1 and video.default_ending(tmp_path / name) == ".png"
    assert np.abs(clip.frames[0].int().numpy() - SDR_COLOURS).max() <= 2


# avifenc --grid 2x1: a red tile of 64x64 and a blue one.
TILES = """
AAAAIGZ0eXBhdmlmAAAAAGF2aWZtaWYxbWlhZk1BMUEAAAF/bWV0YQAAAAAAAAAoaGRscgAAAAAAAAAAcGljdAAAAAAAAAAA
AAAAAGxpYmF2aWYAAAAADnBpdG0AAAAAAAEAAAA6aWxvYwAAAABEAAADAAEAAAABAAABpwAAAAgAAgAAAAEAAAGvAAAAIwAD
AAAAAQAAAdIAAAAjAAAAXGlpbmYAAAAAAAMAAAAaaW5mZQIAAAAAAQAAZ3JpZENvbG9yAAAAABppbmZlAgAAAQACAABhdjAx
Q29sb3IAAAAAGmluZmUCAAABAAMAAGF2MDFDb2xvcgAAAAAcaXJlZgAAAAAAAAAQZGltZwABAAIAAgADAAAAi2lwcnAAAABf
aXBjbwAAABRpc3BlAAAAAAAAAIAAAABAAAAAEHBpeGkAAAAAAwgICAAAABNjb2xybmNseAABAA0ABoAAAAAUaXNwZQAAAAAA
AABAAAAAQAAAAAxhdjFDgSAAAAAAACRpcG1hAAAAAAAAAAMAAQMBAgMAAgQEAoUDAAMEBAKFAwAAAFZtZGF0AAAAAQCAAEAS
AAoJOBV//YQENBpAMhQbQBxxxwQAtNt7DJcrobsP3VI8ExIACgk4FX/9hAQ0GkAyFBtAHHHHBAC023q/uWjSp1aarXtw
"""


def test_a_picture_in_tiles_is_read_unless_it_is_hdr(tmp_path: Path) -> None:
    """FFmpeg, which reads HDR, gives the tiles one by one, and the first one is not the picture."""
    data = base64.b64decode(TILES)
    (tmp_path / "in.avif").write_bytes(data)
    frame = video.read_video(tmp_path / "in.avif").frames[0].int()
    assert frame.shape == (64, 128, 3)
    assert (frame[:, :64] - torch.tensor([200, 40, 40])).abs().max() < 4
    assert (frame[:, 64:] - torch.tensor([40, 40, 200])).abs().max() < 4

    (tmp_path / "in.avif").write_bytes(data.replace(b"nclx\0\1\0\r", b"nclx\0\t\0\x12"))
    with pytest.raises(
        ValueError, match="in.avif: is a picture in tiles;.* otherwise convert it to PNG"
    ):
        video.read_video(tmp_path / "in.avif")


def test_a_picture_that_has_to_be_cropped_is_not_shown_whole(tmp_path: Path) -> None:
    """As encoders of HEIC make it of odd sizes: one tile of 64x64, of which 48x64 are the picture.

    FFmpeg gives the whole tile.
    """
    data = base64.b64decode(TILES)
    for old, new in [
        ("0000005c69696e66", "0000005e69696e66"),  # iinf and its last infe: two bytes longer
        ("0000001a696e6665020000010003", "0000001c696e6665020000010003"),
        ("436f6c6f72000000001c69726566", "436f6c6f720000000000001a69726566"),
        ("0000001064696d670001000200020003", "0000000e64696d67000100010002"),  # one tile
        ("697370650000000000000080", "697370650000000000000030"),  # 48 wide
        ("0000000100800040", "0000000000300040"),
    ]:
        assert bytes.fromhex(old) in data
        data = data.replace(bytes.fromhex(old), bytes.fromhex(new), 1)
    (tmp_path / "in.avif").write_bytes(data)
    assert video.read_video(tmp_path / "in.avif").frames.shape == (1, 64, 48, 3)

    (tmp_path / "in.avif").write_bytes(data.replace(b"nclx\0\1\0\r", b"nclx\0\t\0\x12"))
    with pytest.raises(ValueError, match="in.avif: is a picture in tiles"):
        video.read_video(tmp_path / "in.avif")


def test_heic_is_read_by_pillow_heif(tmp_path: Path) -> None:
    """The photo of an iPhone: upright, at its own odd size, without the pictures beside it."""
    register_heif_opener()
    other = Image.fromarray(255 - picture()[:20, :30])
    photo = Image.fromarray(picture())
    photo.getexif()[0x0112] = 6
    options = dict(save_all=True, append_images=[photo], primary_index=1, quality=97, chroma=444)
    other.save(tmp_path / "in.HEIC", **options)
    clip = video.read_video(tmp_path / "in.HEIC")
    assert clip.total == 1 and video.default_ending(tmp_path / "in.HEIC") == ".png"
    assert np.abs(clip.frames[0].int().numpy() - turned(picture(), 6)).max() <= 6


def test_a_photo_with_a_profile_is_not_taken_for_its_hdr(tmp_path: Path) -> None:
    """New phones add what makes HDR of it, with wide colours: left to FFmpeg, it is only tiles."""
    register_heif_opener()
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    path = tmp_path / "in.heic"
    Image.fromarray(picture()).save(path, quality=97, chroma=444, icc_profile=profile)
    path.write_bytes(path.read_bytes() + b"\0\0\0\x14freecolrnclx\0\x0c\0\x10")
    clip = video.read_video(path)
    assert clip.profile == profile
    assert np.abs(clip.frames[0].numpy().astype(int) - picture()).mean() < 3


def test_heic_without_pillow_heif_says_how_to_read_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    data = (
        base64.b64decode(TILES).replace(b"ftypavif", b"ftypheic").replace(b"avifmif1", b"mif1heic")
    )
    (tmp_path / "in.heic").write_bytes(data)
    with pytest.raises(ValueError, match="in.heic: is a picture in tiles; for HEIC, `pip install"):
        video.read_video(tmp_path / "in.heic")


@pytest.mark.parametrize("xmp", [b"", b'<x hdrgm:Version="1.0">'])
def test_the_first_picture_of_a_phone_is_the_photo(tmp_path: Path, xmp: bytes) -> None:
    """Behind it there may be another view (MPO), or what makes HDR of it (Ultra HDR)."""
    other = Image.fromarray(255 - picture()[:20, :30])
    options = dict(format="MPO", save_all=True, append_images=[other], quality=97, subsampling=0)
    Image.fromarray(picture()).save(tmp_path / "in.jpg", xmp=xmp, **options)
    clip = video.read_video(tmp_path / "in.jpg")
    assert clip.total == 1 and video.default_ending(tmp_path / "in.jpg") == ".jpg"
    assert np.abs(clip.frames[0].int().numpy() - picture()).max() <= 4


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\1\x12aaaaaa"]
)
@pytest.mark.filterwarnings("error")
def test_odd_exif_costs_neither_the_picture_nor_a_word(tmp_path: Path, exif: bytes) -> None:
    """Pillow would warn of it, in several lines."""
    Image.fromarray(picture()).save(tmp_path / "in.jpg", exif=exif)
    assert video.read_video(tmp_path / "in.jpg").frames.shape == (1, 45, 61, 3)


def test_a_picture_of_any_size_is_read_if_memory_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow itself would refuse it as an attack."""
    Image.new("1", (60_000, 10_000)).save(tmp_path / "in.png")
    monkeypatch.setattr(video, "_available_memory", lambda: 10**9)
    with pytest.raises(ValueError, match=r"in.png: its 1 frames of 60000x10000 need 1.8 GB"):
        video.read_video(tmp_path / "in.png")


@pytest.mark.parametrize("name", ["in.png", "in.jpg", "in.webp", "in.avif"])
def test_stills_cut_short_are_refused(tmp_path: Path, name: str) -> None:
    """Decoders would fill the rest with grey."""
    noise = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / name, exif=Image.Exif(), **QUALITY[name[2:]])
    data = (tmp_path / name).read_bytes()
    for length in (20, len(data) // 3, len(data) - 2000, len(data) - 50):
        for rest in (b"", bytes(len(data) - length)):
            (tmp_path / name).write_bytes(data[:length] + rest)
            if len(rest) == 50:
                continue  # too few for zeros to be told from pixels
            with pytest.raises(ValueError, match=f"{name}: .*(cut short|damaged)") as caught:
                video.read_video(tmp_path / name)
            assert "\n" not in str(caught.value)
    (tmp_path / name).write_bytes(data + b"a film behind it, as phones append")
    assert len(video.read_video(tmp_path / name).frames) == 1


@pytest.mark.parametrize("name", ["in.png", "in.jpg"])
def test_zeros_behind_the_end_do_no_harm(tmp_path: Path, name: str) -> None:
    """Some cameras fill up the last block of a file."""
    save_still(tmp_path / name, "colour")
    with (tmp_path / name).open("ab") as file:
        file.write(bytes(5000))
    assert len(video.read_video(tmp_path / name).frames) == 1


def test_a_webp_may_end_in_zeros(tmp_path: Path) -> None:
    """As that of a large picture does which is flat at the bottom."""
    noise = np.random.default_rng(0).integers(0, 255, (160, 160, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "in.webp", quality=100)
    expected = video.read_video(tmp_path / "in.webp").frames
    _, body = (tmp_path / "in.webp").read_bytes().split(b"WEBPVP8 ")
    body = body[4:] + bytes(2000)
    chunk = b"WEBPVP8 " + struct.pack("<I", len(body)) + body
    (tmp_path / "in.webp").write_bytes(b"RIFF" + struct.pack("<I", len(chunk)) + chunk)
    assert torch.equal(video.read_video(tmp_path / "in.webp").frames, expected)


def test_fill_bytes_in_a_jpeg_are_passed_over(tmp_path: Path) -> None:
    """Any number of FF may stand before a marker."""
    shown = save_still(tmp_path / "in.jpg", "colour")
    data = (tmp_path / "in.jpg").read_bytes()
    size = int.from_bytes(data[4:6], "big")
    filled = data[:2] + b"\xff" + data[2 : 4 + size] + b"\xff\xff\xff" + data[4 + size :]
    (tmp_path / "in.jpg").write_bytes(filled)
    clip = video.read_video(tmp_path / "in.jpg")
    assert np.abs(clip.frames[0].numpy() - shown.astype(int)).max() <= 4


# --- what moves -----------------------------------------------------------------------------------


def test_an_animated_webp_is_a_clip(tmp_path: Path) -> None:
    """With the duration of each of its frames, and transparent pixels on white."""
    images = []
    for level in (40, 80, 120, 160):
        image = np.full((48, 64, 4), level, np.uint8)
        image[:, 32:, 3] = 255
        image[:20, :32, 3] = 0
        image[20:, :32, 3] = 51
        images.append(Image.fromarray(image))
    durations = [100, 50, 70, 200]
    options = dict(save_all=True, append_images=images[1:], duration=durations, lossless=True)
    images[0].save(tmp_path / "in.webp", **options)
    clip = video.read_video(tmp_path / "in.webp")
    assert times(clip) == [Fraction(t, 1000) for t in (0, 100, 150, 220)]
    assert clip.last_duration * clip.time_base == Fraction(1, 5)
    assert (clip.frames[:, :20, :32] == 255).all()
    assert clip.frames[:, 30, 10, 0].tolist() == [204 + level // 5 for level in (40, 80, 120, 160)]
    assert clip.frames[:, 30, 50, 0].tolist() == [40, 80, 120, 160]
    assert video.default_ending(tmp_path / "in.webp") == ".mp4"

    part = video.read_video(tmp_path / "in.webp", 2)
    assert torch.equal(part.frames, clip.frames[:2])
    assert part.total == 4 and times(part) == times(clip)[:2]
    video.write_video(tmp_path / "out.mp4", clip.frames, clip)
    assert decoded(tmp_path / "out.mp4")[0] == times(clip)
    assert decoded(tmp_path / "out.mp4")[2] == [Fraction(t, 1000) for t in durations]


@pytest.mark.parametrize("name", ["in.avif", "in.png"])
def test_an_animated_avif_or_png_is_a_clip(tmp_path: Path, name: str) -> None:
    """All its frames, and not the picture of its first one, which is also there."""
    first, *rest = (Image.fromarray(image) for image in grey_levels(5))
    first.save(tmp_path / name, save_all=True, append_images=rest, duration=100)
    clip = video.read_video(tmp_path / name)
    assert clip.total == 5 and clip.rate == 10
    assert (clip.frames.float().mean((1, 2, 3)) - 40 - 2 * torch.arange(5)).abs().max() < 2
    assert video.default_ending(tmp_path / name) == ".mp4"


@pytest.mark.parametrize("name", ["in.mjpeg", "in.MJPG"])
def test_motion_jpeg_is_a_clip(tmp_path: Path, name: str) -> None:
    """It begins as a photo does, and only its name tells that more follows."""
    pictures = b""
    for image in grey_levels(5):
        Image.fromarray(image).save(tmp_path / "a.jpg", quality=97)
        pictures += (tmp_path / "a.jpg").read_bytes()
    (tmp_path / name).write_bytes(pictures)
    clip = video.read_video(tmp_path / name)
    assert clip.timestamps == [0, 1, 2, 3, 4]
    assert (clip.frames.float().mean((1, 2, 3)) - 40 - 2 * torch.arange(5)).abs().max() < 2


# --- writing --------------------------------------------------------------------------------------


def test_the_edit_of_a_picture_is_a_picture_whatever_its_name(tmp_path: Path) -> None:
    """And that of a clip, or of what cannot be read, an MP4 file."""
    expected = {"a.avif": ".png", "a.jpg": ".jpg", "a.webp": ".webp"}
    for name in expected:
        save_still(tmp_path / name, "colour")
    for name in ("a.jfif", "A.JPEG"):
        (tmp_path / name).write_bytes((tmp_path / "a.jpg").read_bytes())
    encode(tmp_path / "a.mkv", grey_levels(2))
    (tmp_path / "cut.webp").write_bytes((tmp_path / "a.webp").read_bytes()[:60])
    expected |= {"a.jfif": ".png", "A.JPEG": ".jpeg"}
    expected |= {"a.mkv": ".mp4", "missing.avif": ".mp4", "cut.webp": ".mp4"}
    assert {name: video.default_ending(tmp_path / name) for name in expected} == expected


@pytest.mark.parametrize("name, worst", [("a.png", 0), ("a.webp", 0), ("a.jpg", 3), ("a.JPEG", 3)])
def test_stills_are_written_without_loss_where_the_format_allows(
    tmp_path: Path, name: str, worst: int
) -> None:
    """Odd sides stay; FFmpeg and Pillow read what was written."""
    frames = torch.from_numpy(picture())[None]
    save_still(tmp_path / "in.png", "colour")
    clip = video.read_video(tmp_path / "in.png")
    video.prepare_edit(clip, tmp_path / name)
    assert video.write_video(tmp_path / name, iter(frames.split(1)), clip) == (45, 61)
    for again in (Image.open(tmp_path / name).convert("RGB"), decoded(tmp_path / name)[1][0]):
        assert np.abs(np.array(again).astype(int) - picture()).max() <= worst
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["in.png", name])


def test_a_clip_is_no_still(tmp_path: Path) -> None:
    """Several frames are refused before the edit and at writing, in one line."""
    clip = video.read_video(encode(tmp_path / "in.mp4", grey_levels(3)))
    for write in (
        lambda: video.prepare_edit(clip, tmp_path / "a.png"),
        lambda: video.write_video(tmp_path / "a.png", clip.frames, clip),
    ):
        with pytest.raises(ValueError, match="a.png: can hold one picture and not a clip"):
            write()
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize("name", ["in.png", "in.jpg", "in.webp"])
def test_a_still_may_become_a_clip(tmp_path: Path, name: str) -> None:
    """Of one frame, without sound."""
    save_still(tmp_path / name, "colour")
    still = edited(tmp_path / name, tmp_path / "a.mp4")
    again = video.read_video(tmp_path / "a.mp4")
    assert again.frames.shape == (1, 44, 60, 3)
    assert (again.frames.int() - still.frames[:, :44, :60].int()).abs().float().mean() < 3


# --- colour profiles ------------------------------------------------------------------------------


def make_profile(size: int = 0) -> bytes:
    """The ICC profile of sRGB, followed by as many bytes that no reader looks at."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    length = len(profile) + size
    return length.to_bytes(4, "big") + profile[4:] + np.random.default_rng(0).bytes(size)


@pytest.mark.parametrize("size", [0, 1, 150_000])
@pytest.mark.parametrize("name", ["in.png", "in.jpg", "in.webp", "in.avif"])
def test_a_photo_keeps_its_colour_profile(tmp_path: Path, name: str, size: int) -> None:
    """In every format of stills, beside EXIF and in parts where it is long."""
    profile = make_profile(size)
    exif = Image.Exif()
    exif[0x0112] = 1
    options = dict(icc_profile=profile, exif=exif, **QUALITY[name[2:]])
    Image.fromarray(picture()).save(tmp_path / name, **options)
    for written in ("a.png", "a.jpg", "a.webp"):
        edited(tmp_path / name, tmp_path / written)
        with Image.open(tmp_path / written) as again:
            assert again.info["icc_profile"] == profile
            error = np.abs(np.array(again.convert("RGB")).astype(int) - picture())
        assert error.max() <= (0 if {name[-4:], written[-4:]} <= {".png", "webp"} else 6)
        assert video.read_video(tmp_path / written).profile == profile


def test_ffmpeg_keeps_the_profile_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of a HEIC picture, which Pillow does not read."""
    profile = make_profile()
    Image.fromarray(picture()).save(tmp_path / "in.avif", icc_profile=profile)
    monkeypatch.setattr("stills.shape_of", lambda path: None)
    clip = video.read_video(tmp_path / "in.avif")
    assert clip.profile == profile and clip.total == 1
    assert video.default_ending(tmp_path / "in.avif") == ".png"


def grey_profile() -> bytes:
    """An ICC profile of grey whose numbers v stand for v^2.2 of white's light."""
    white = b"XYZ " + bytes(4) + np.array([63190, 65536, 54061], ">i4").tobytes()  # D50
    curve = b"curv" + bytes(4) + struct.pack(">IHH", 1, round(2.2 * 256), 0)
    tags = struct.pack(">I", 2)
    tags += b"wtpt" + struct.pack(">II", 156, len(white))
    tags += b"kTRC" + struct.pack(">II", 156 + len(white), len(curve) - 2)
    tags += white + curve
    header = bytearray(128)
    header[:4] = struct.pack(">I", 128 + len(tags))
    header[8:12] = bytes([2, 0x40, 0, 0])  # the version
    header[12:24] = b"mntrGRAYXYZ "
    header[36:40] = b"acsp"
    header[68:80] = white[8:]
    return bytes(header) + tags


@pytest.mark.parametrize("name", ["in.jpg", "in.png"])
def test_grey_with_a_profile_becomes_srgb(tmp_path: Path, name: str) -> None:
    """Light and its signal in sRGB by the textbook."""
    levels = np.arange(256, dtype=np.uint8)[None].repeat(8, 0)
    Image.fromarray(levels).save(tmp_path / name, icc_profile=grey_profile(), **QUALITY[name[2:]])
    clip = video.read_video(tmp_path / name)
    assert clip.profile == b""
    light = (levels / 255) ** 2.2
    srgb = 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    error = np.abs(clip.frames[0].numpy() - srgb[..., None])
    assert error.max() <= (2 if name == "in.png" else 4)


@pytest.mark.parametrize(
    "mode, profile, kept",
    [
        ("L", make_profile(), True),  # grey is also RGB
        ("RGB", grey_profile(), False),
        ("CMYK", make_profile()[:16] + b"CMYK" + make_profile()[20:], False),  # damaged
    ],
)
def test_a_profile_that_does_not_fit_changes_no_number(
    tmp_path: Path, mode: str, profile: bytes, kept: bool
) -> None:
    image = Image.fromarray(picture()).convert(mode)
    image.save(tmp_path / "in.jpg", icc_profile=profile, **QUALITY[".jpg"])
    clip = video.read_video(tmp_path / "in.jpg")
    assert clip.profile == (profile if kept else b"")
    shown = np.array(image.convert("RGB")).astype(int)
    assert np.abs(clip.frames[0].numpy() - shown).max() <= 4
