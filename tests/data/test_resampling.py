"""Crop, resize and flip as matrices: what Pillow makes of the same boxes."""

import numpy as np
import pytest
import torch
from PIL import Image

from vmamba.data.resampling import resample, taps_needed, to_bytes, weights

H, W = 90, 120
# top, left, height, width: whole, small, smaller still, wide, half, a single pixel
BOXES = [(0, 0, H, W), (10, 20, 30, 40), (5, 7, 11, 9), (40, 3, 50, 111), (0, 60, 90, 60), (89, 119, 1, 1)]
MODES = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
}
PHOTO = np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8)


def window(start, extent, low, high, flip):
    rows = [
        np.broadcast_to(np.asarray(value, dtype=np.float32), (len(start),))
        for value in (start, extent, low, high, flip)
    ]
    return torch.from_numpy(np.stack(rows))


def cropped(boxes, out, mode, flip, dtype=torch.float32):
    top, left, height, width = (np.array(values, dtype=float) for values in zip(*boxes, strict=True))
    matrices = [
        weights(
            window(start, extent, start, start + extent, mirrored),
            size,
            side,
            taps_needed(mode, size / side),
            mode,
            dtype,
        )
        for start, extent, size, side, mirrored in ((top, height, H, out[0], 0), (left, width, W, out[1], flip))
    ]
    images = torch.from_numpy(PHOTO).permute(2, 0, 1).expand(len(boxes), -1, -1, -1)
    return to_bytes(resample(images, *matrices)).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("out", [(32, 32), (48, 64), (160, 160)])
def test_equals_pillow(out, mode, flip):
    for box, ours in zip(BOXES, cropped(BOXES, out, mode, flip), strict=True):
        top, left, height, width = box
        theirs = Image.fromarray(PHOTO).crop((left, top, left + width, top + height))
        # in one call Pillow 13 chooses which axis goes first, and clamps between them
        theirs = theirs.resize((out[1], height), MODES[mode]).resize((out[1], out[0]), MODES[mode])
        if flip:
            theirs = theirs.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        # noise is the worst picture there is; the one grey value is Pillow's rounding between columns and rows
        difference = np.abs(ours.astype(int) - np.asarray(theirs))
        assert difference.max() <= (0 if mode == "nearest" else 1), box


def test_half_precision_is_a_grey_value_off_at_most():
    exact, half = (cropped(BOXES, (48, 64), "bicubic", False, dtype) for dtype in (torch.float32, torch.float16))
    assert np.abs(exact.astype(int) - half).max() <= 1


def test_a_window_beyond_the_image_is_padded_with_black():
    shifts = np.array([-4.0, 0.0, 3.0])
    matrix = weights(window(shifts, 16, 0, 16, 0), 16, 16, taps_needed("bicubic", 1), "bicubic", torch.float32)
    for shift, rows in zip(shifts.astype(int), matrix, strict=True):
        assert torch.equal(
            rows, torch.eye(16).roll(-shift, 0) * ((torch.arange(16) + shift) % 16 == torch.arange(16) + shift)[:, None]
        )


def test_an_axis_shorter_than_the_filter():
    taps = taps_needed("bicubic", 1)
    assert taps > 2
    matrix = weights(window(np.array([0.0]), 2, 0, 2, 0), 2, 8, taps, "bicubic", torch.float32)
    assert matrix.shape == (1, 8, 2)
    torch.testing.assert_close(matrix.sum(dim=2), torch.ones(1, 8))


def test_traces_without_a_break():
    def both(images, rows):
        matrix = weights(rows, 40, 32, 5, "bicubic", torch.float32)
        return resample(images, matrix, matrix)

    images = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    rows = window(np.array([0.0, 5.0]), 20, 0, 40, 1)
    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images, rows), both(images, rows))
