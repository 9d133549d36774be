"""From any colours to those of a common display: 8-bit RGB of BT.709.

HDR and wide colour are converted as a display would show them: to light, from their primaries to
those of BT.709, and back to a signal by BT.1886. White of SDR is at 203 cd/m² (ITU-R BT.2408), so
that colours within the range of SDR come out as if they had been SDR.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from av import VideoFrame
from av.video import reformatter as sws

# swscale's defaults trade accuracy for speed: with them colours are off by 3 levels instead of 1,
# and chroma is not interpolated.
FULL_CHROMA = sws.Interpolation.FULL_CHR_H_INT | sws.Interpolation.FULL_CHR_H_INP
SCALING = sws.Interpolation.BICUBIC | sws.Interpolation.ACCURATE_RND | FULL_CHROMA

GAMMA = 2.4  # BT.1886
SDR_WHITE = 203.0  # cd/m²
KNEE = 0.9  # of SDR white: light above it is compressed, so that highlights keep some detail
# The 10 bits of Y, Cb and Cr cannot tell a channel of less than about this share of the brightest
# one from none, and BT.1886 would make up to 16 levels of that error.
FLOOR = 0.0085
LUMA_2020 = np.array([0.2627, 0.6780, 0.0593], np.float32)
# From linear RGB of wider primaries to that of BT.709. The white of DCI P3 (SMPTE 431), which alone
# is not D65, is adapted to it by Bradford's method.
TO_709 = {
    sws.ColorPrimaries.BT2020: np.array(
        [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]],
        np.float32,
    ),
    sws.ColorPrimaries.SMPTE431: np.array(
        [[1.1575, -0.1550, -0.0026], [-0.0415, 1.0456, -0.0041], [-0.0181, -0.0786, 1.0966]],
        np.float32,
    ),
    sws.ColorPrimaries.SMPTE432: np.array(
        [[1.2249, -0.2249, 0], [-0.0421, 1.0421, 0], [-0.0196, -0.0786, 1.0983]], np.float32
    ),
}


def _light_of_pq(signal: np.ndarray) -> np.ndarray:
    """SMPTE ST 2084: [0, 1] -> light on the display, where SDR white is 1."""
    m1, m2 = 1305 / 8192, 2523 / 32
    c1, c2, c3 = 107 / 128, 2413 / 128, 2392 / 128
    power = signal ** (1 / m2)
    light = (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1)
    return 10_000 / SDR_WHITE * light


def _light_of_hlg(signal: np.ndarray) -> np.ndarray:
    """ARIB STD-B67 (ITU-R BT.2100): [0, 1] -> light of the scene in [0, 1]."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)


def _light_table(transfer: int, white: int) -> np.ndarray:
    """Light for each of the 65,536 levels of a signal, of which `white` is 1."""
    signal = np.minimum(np.arange(65_536) / white, 1)
    if transfer == sws.ColorTrc.SMPTE2084:
        return _light_of_pq(signal).astype(np.float32)
    if transfer == sws.ColorTrc.ARIB_STD_B67:
        return _light_of_hlg(signal).astype(np.float32)
    return (signal**GAMMA).astype(np.float32)


def _to_bt709(image: np.ndarray, primaries: int, transfer: int, white: int) -> np.ndarray:
    """Any primaries and transfer function, uint16 (H, W, 3) -> BT.709, uint8 (H, W, 3)."""
    table = _light_table(transfer, white)
    roots = np.arange(16_384) / 16_383  # of light: in these steps the dark ones are fine enough
    signals = np.rint(255 * roots ** (2 / GAMMA)).astype(np.uint8)
    result = np.empty(image.shape, np.uint8)
    for top in range(0, len(image), 64):  # in strips, to save memory
        light = table[image[top : top + 64]]  # (64, W, 3)
        if transfer == sws.ColorTrc.ARIB_STD_B67:
            # The OOTF of a display of 1000 cd/m²: from light of the scene to light on the display.
            light *= 1000 / SDR_WHITE * (light @ LUMA_2020)[..., None] ** 0.2
        light = np.maximum(light @ TO_709[primaries].T, 0)
        # Both ends are compressed relative to the brightest channel, which keeps the hue.
        red, green, blue = light[..., :1], light[..., 1:2], light[..., 2:]
        peak = np.maximum(np.maximum(red, green), blue)  # much faster than light.max(-1)
        light *= np.square(np.minimum(light / (FLOOR * peak + 1e-9), 1))
        bright = np.maximum(peak, KNEE)
        compressed = 1 - (1 - KNEE) * np.exp((KNEE - bright) / (1 - KNEE))
        light *= np.where(peak > KNEE, compressed / bright, 1)
        result[top : top + 64] = signals[(16_383 * np.sqrt(light) + 0.5).astype(np.uint16)]
    return result


def _on_white(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 4) with alpha -> uint8 (H, W, 3)."""
    colour = image[..., :3].astype(np.uint16)
    alpha = image[..., 3:].astype(np.uint16)
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def wide_primaries(frame: VideoFrame) -> sws.ColorPrimaries | None:
    """The primaries of a frame if they are wider than BT.709's. HDR has BT.2020's if not P3's."""
    if frame.color_primaries in TO_709:
        return sws.ColorPrimaries(frame.color_primaries)
    hdr = frame.color_trc in (sws.ColorTrc.SMPTE2084, sws.ColorTrc.ARIB_STD_B67)
    return sws.ColorPrimaries.BT2020 if hdr else None


# Matrices that FFmpeg cannot convert, by their tag in ITU-T H.273.
NOT_CONVERTED = {
    8: "YCgCo",
    11: "YDzDx",
    14: "ICtCp",
    15: "IPT-PQ-C2",
    16: "YCgCo-Re",
    17: "YCgCo-Ro",
}


def check_matrix(frame: VideoFrame, path: Path) -> None:
    """Raise ValueError if FFmpeg cannot convert the colours of a frame of this file to RGB."""
    name = NOT_CONVERTED.get(frame.colorspace)
    if name and not frame.format.is_rgb:
        raise ValueError(
            f"{path}: FFmpeg cannot convert its colours from {name} to RGB; convert it to BT.709 "
            "first"
        )


def _matrix(frame: VideoFrame) -> sws.Colorspace | None:
    """The YCbCr matrix of a frame whose tag swscale cannot use. None: swscale reads the tag."""
    # No tag at all; BT.2020 with constant luminance, which is nearly the same as without; and
    # "derived from the primaries".
    unmarked, constant_luminance, derived = (0, 2, 3), 10, (12, 13)
    if frame.format.is_rgb or frame.colorspace not in (*unmarked, constant_luminance, *derived):
        return None
    is_2020 = wide_primaries(frame) == sws.ColorPrimaries.BT2020
    if frame.colorspace == constant_luminance or is_2020:
        return sws.Colorspace.BT2020
    if frame.width >= 1280 or frame.height > 576:
        return sws.Colorspace.ITU709
    return sws.Colorspace.ITU601


def to_rgb(frame: VideoFrame, size: tuple[int, int], scaler: sws.VideoReformatter) -> np.ndarray:
    """One frame as it is stored, scaled to `size` (H, W) -> uint8 (H, W, 3), BT.709."""
    wide = wide_primaries(frame)
    has_alpha = any(component.is_alpha for component in frame.format.components)
    transparent = has_alpha or frame.format.name == "pal8"  # the palette may have it
    layout = "rgb48" if wide else "rgba" if transparent else "rgb24"
    image = scaler.reformat(
        frame,
        size[1],
        size[0],
        layout,
        src_colorspace=_matrix(frame),
        dst_color_range=sws.ColorRange.JPEG,
        interpolation=SCALING,
    ).to_ndarray()
    if wide:
        # swscale's 16 bits: from YCbCr, white comes out as 255 · 256.
        white = 65_535 if frame.format.is_rgb else 65_280
        return _to_bt709(image, wide, frame.color_trc, white)
    return _on_white(image) if transparent else image
