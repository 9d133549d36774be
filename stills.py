"""Reading and writing pictures with Pillow: JPEG, PNG, WebP, which may be animated, AVIF and HEIC.

A picture comes in as viewers show it: upright as its EXIF says, transparent pixels on white, in
8 bits. It keeps its numbers, and its ICC profile, which says what colours they are; only grey and
CMYK with a profile become sRGB.

What Pillow would read wrongly is left to FFmpeg, in `video.py`: HDR and wide colour without a
profile, and what moves in PNG and AVIF. So is HEIC where pillow-heif is not installed, which is
optional.
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF")  # that are read, by Pillow's names
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"mif1", b"msf1")  # the last two also of AVIF
# How files with these endings are written: without loss, or in JPEG's best quality.
JPEG = dict(format="JPEG", quality=100, subsampling="4:4:4")
WRITTEN = {
    ".png": dict(format="PNG"),
    ".jpg": JPEG,
    ".jpeg": JPEG,
    ".webp": dict(format="WEBP", lossless=True),
}

# A clip begins as a photo does. Only its name tells that more follows.
MOTION_JPEG = (".mjpeg", ".mjpg")
# BT.2020 and P3, as PNG (cICP) and AVIF (nclx) name them, by their numbers in ITU-T H.273.
WIDE_COLOUR = re.compile(rb"(cICP|colrnclx\0)[\x09\x0b\x0c]")
# The last bytes of a JPEG and of a PNG file.
ENDS = (b"\xff\xd9", b"IEND\xaeB`\x82")
# The modes in which numbers of these colour spaces, by their names in ICC profiles, are stored.
NOT_RGB = {b"GRAY": "L", b"CMYK": "CMYK"}

# Pillow would refuse more than 179 megapixels. `video.py` asks whether they fit into memory.
Image.MAX_IMAGE_PIXELS = None


class Pictures(NamedTuple):
    frames: np.ndarray  # uint8 (T, H, W, 3)
    durations: list[int]  # T times in milliseconds
    profile: bytes  # the ICC profile of the numbers in `frames`; b"" if there is none


def _formats(path: Path) -> tuple[str, ...]:
    """The formats that Pillow may find in a file; HEIC is among them if pillow-heif is there."""
    with path.open("rb") as file:
        brand = file.read(12)[8:]
    if brand in HEIC_BRANDS:
        with contextlib.suppress(ImportError):
            from pillow_heif import register_heif_opener

            register_heif_opener()
            return (*FORMATS, "HEIF")
    return FORMATS


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Image.Image]:
    with warnings.catch_warnings(action="ignore"):  # of odd EXIF, say
        try:
            with Image.open(path, formats=_formats(path)) as image:
                yield image
        except (UnidentifiedImageError, MemoryError):
            raise
        except Exception as error:  # damage shows in many ways
            raise ValueError(f"{path}: the picture is damaged or cut short ({error})") from error


def shape_of(path: Path) -> tuple[int, int, int] | None:
    """(T, H, W) of a picture as it is stored; T > 1 only for animated WebP.

    None for files that are not Pillow's. Raises ValueError, in one line, if it is damaged.
    """
    with path.open("rb") as file:
        head = file.read(65_536)
    # Beside a profile, nclx may be that of the HDR which a phone's gain map makes of the photo.
    is_wide = WIDE_COLOUR.search(head) and b"colrprof" not in head
    if is_wide or path.suffix.lower() in MOTION_JPEG:
        return None
    try:
        with _open(path) as image:
            # Phones store a second picture in a JPEG, Pillow's MPO, and in HEIC. It is not a frame.
            count = 1 if image.format in ("MPO", "HEIF") else getattr(image, "n_frames", 1)
            if count > 1 and image.format != "WEBP":
                return None
            return count, image.height, image.width
    except UnidentifiedImageError:
        return None


def _is_unfilled(path: Path) -> bool:
    """Whether the file was made as large as it should become, and then not filled."""
    data = path.read_bytes()
    filled = data.rstrip(b"\0")
    # A large flat picture is a WebP that ends in zeros by itself: a twentieth of all its bytes.
    least = len(data) // 10 if data[8:12] == b"WEBP" else 1024
    return len(data) - len(filled) > least and not filled.endswith(ENDS)


def _rgb(image: Image.Image) -> tuple[Image.Image, bytes]:
    """A picture in any mode of Pillow's -> RGB, and the ICC profile of its numbers."""
    profile = image.info.get("icc_profile") or b""
    if image.mode.startswith("I;16"):  # Pillow would clip its 16 bits
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    space = profile[16:20]
    if image.mode == NOT_RGB.get(space):
        with contextlib.suppress(OSError, ImageCms.PyCMSError):  # a profile that is damaged
            own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            srgb = ImageCms.createProfile("sRGB")
            image = ImageCms.profileToProfile(image, own, srgb, outputMode="RGB")
    return image.convert("RGB"), profile if space == b"RGB " else b""


def read(path: Path, count: int) -> Pictures:
    """Decode the first `count` frames. Raises ValueError, in one line, if they are damaged."""
    if _is_unfilled(path):
        raise ValueError(f"{path}: the file is cut short, its last part is missing; copy it again")
    frames = []
    durations = []
    with _open(path) as image:
        for index in range(count):
            if index > 0:  # an open file is at its main picture, which in HEIC may be any
                image.seek(index)
            frame, profile = _rgb(ImageOps.exif_transpose(image))
            frames.append(np.asarray(frame))
            durations.append(image.info.get("duration") or 40)  # as FFmpeg: 25 stills a second
    return Pictures(np.stack(frames), durations, profile)


def write(path: Path, image: np.ndarray, profile: bytes) -> None:
    """Write uint8 (H, W, 3) in the format that the ending of `path` names, with its profile."""
    buffer = io.BytesIO()
    options = WRITTEN[path.suffix.lower()]
    Image.fromarray(image).save(buffer, icc_profile=profile, **options)
    path.write_bytes(buffer.getvalue())
