"""Training augmentation of whole batches, on the device that trains.

It does what :func:`~.transforms.training_transform` does to one image after the other, with the same ranges and
probabilities. What an image draws follows from the seed, the epoch and its index alone. All is drawn on the CPU, in
arrays of a few numbers for each image; the device is never waited for. What differs from timm's:

* other random numbers, so the two paths agree in distribution and not image by image;
* RandAugment's geometric operations are bilinear (timm takes the interpolation of the crop);
* colour jitter changes brightness, contrast and saturation in this order (there in a random one), without rounding
  between them;
* the noise of random erasing is a window, at a random place, of a larger field of noise drawn once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from . import rand_augment
from .loading import BATCH_STREAM, NOISE_STREAM, derive_seed
from .random_numbers import uniforms
from .resampling import Window, resample, taps_needed, to_bytes, weights
from .transforms import Augmentation, Preprocessing

# timm's and torchvision's: attempts to place a crop or an erased rectangle before giving up
ATTEMPTS = 10
ERASED_AREA = (0.02, 1 / 3)
ERASED_RATIO = (0.3, 1 / 0.3)
# a window into the field of noise has so many places along each side
NOISE_PLACES = 256

# where in the row of numbers that an image draws each use finds its own
_CROP = slice(0, 2 * ATTEMPTS + 2)
_FLIP = _CROP.stop
_JITTER = slice(_FLIP + 1, _FLIP + 4)
_ERASE = slice(_JITTER.stop, _JITTER.stop + 2 * ATTEMPTS + 5)
_LAYERS = _ERASE.stop


@dataclass(frozen=True)
class Draws:
    """What the images of a batch drew, arrays of B rows.

    ``rows`` and ``columns`` are the crop; ``jitter`` (B, 3) the factors of brightness, contrast and saturation;
    ``layers`` RandAugment's operations and arguments; ``erase`` (B, 4) top, left, height and width of the rectangle, 0
    high for none, and ``noise`` (B, 2) the place of its noise.
    """

    rows: Window
    columns: Window
    jitter: np.ndarray | None
    layers: tuple[tuple[np.ndarray, np.ndarray], ...]
    erase: np.ndarray
    noise: np.ndarray


class BatchAugmentation:
    """Augments batches of RGB images for a model with ``preprocessing``.

    Args:
        seed: of the run.
        device: where the images are; "cpu" or "cuda".

    Raises:
        ValueError: ``augmentation`` asks for something only the loader on the CPU can do.
    """

    def __init__(
        self, preprocessing: Preprocessing, augmentation: Augmentation, *, seed: int, device: torch.device
    ) -> None:
        self.preprocessing = preprocessing
        self.augmentation = augmentation
        self.seed = seed
        self.device = torch.device(device)
        self.policy = rand_augment.Policy.parse(augmentation.rand_augment) if augmentation.rand_augment else None
        mean, std = (torch.tensor(v, dtype=torch.float32) for v in (preprocessing.mean, preprocessing.std))
        self._scale = (1 / (255 * std)).reshape(1, 3, 1, 1).to(self.device)
        self._shift = (-mean / std).reshape(1, 3, 1, 1).to(self.device)
        self._fill = (255 * mean).round().to(self.device)
        # half precision holds a grey value to 1/8 and has 16 times the arithmetic; CPUs have none of that
        self._dtype = torch.float16 if self.device.type == "cuda" else torch.float32
        self._luma = torch.tensor([0.299, 0.587, 0.114], dtype=self._dtype).reshape(1, 3, 1, 1).to(self.device)
        self._noise: Tensor | None = None
        if augmentation.random_erase:
            generator = torch.Generator().manual_seed(derive_seed(seed, NOISE_STREAM))
            sides = (side + NOISE_PLACES - 1 for side in preprocessing.image_size)
            self._noise = torch.randn(3, *sides, generator=generator).to(self.device)

    def draw(self, epoch: int, indices: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> Draws:
        """What images ``indices`` (B,) of ``heights`` and ``widths`` (B,) pixels undergo in ``epoch``."""
        options, layers = self.augmentation, self.policy.layers if self.policy else 0
        numbers = uniforms(derive_seed(self.seed, BATCH_STREAM, epoch), indices, _LAYERS + layers * rand_augment.DRAWS)
        flip = numbers[:, _FLIP] < options.horizontal_flip
        if options.crop == "resized":
            boxes = resized_crops(numbers[:, _CROP], heights, widths, options.scale, options.ratio)
            rows, columns = (
                Window(start, extent, start, start + extent, mirrored)
                for start, extent, mirrored in zip(boxes[:2], boxes[2:], (np.zeros_like(flip), flip), strict=True)
            )
        else:
            rows, columns = (
                _padded(number, sizes, side, options.crop_padding, mirrored)
                for number, sizes, side, mirrored in zip(
                    numbers[:, :2].T,
                    (heights, widths),
                    self.preprocessing.image_size,
                    (np.zeros_like(flip), flip),
                    strict=True,
                )
            )
        jitter = None
        if options.color_jitter and not self.policy:
            low = max(0.0, 1 - options.color_jitter)
            jitter = low + numbers[:, _JITTER] * (1 + options.color_jitter - low)
        own = numbers[:, _LAYERS:].reshape(len(indices), layers, rand_augment.DRAWS)
        drawn = [rand_augment.draw(self.policy, own[:, i], self.preprocessing.image_size) for i in range(layers)]
        erase, noise = _erased(numbers[:, _ERASE], options.random_erase, self.preprocessing.image_size)
        return Draws(rows, columns, jitter, tuple(drawn), erase, noise)

    def apply(self, images: Tensor, draws: Draws) -> Tensor:
        """Images (B, 3, H, W) uint8, each in the upper left corner of its H x W, augmented and normalised.

        Returns:
            (B, 3, h, w) float32 in channels-last layout, h and w the model's image size.
        """
        cropped = resample(images, *self._matrices(draws, tuple(images.shape[2:])))
        if draws.layers:
            cropped = to_bytes(cropped)
            for operation, argument in draws.layers:
                rand_augment.apply(cropped, operation, argument, self._fill, self._to_device)
        elif draws.jitter is not None:
            cropped = _jitter(cropped.clamp_(0, 255), self._to_device(draws.jitter.astype(np.float32)), self._luma)
        else:
            cropped.clamp_(0, 255)
        out = torch.empty(cropped.shape, dtype=torch.float32, device=self.device, memory_format=torch.channels_last)
        torch.addcmul(self._shift, cropped, self._scale, out=out)
        erased = np.flatnonzero(draws.erase[:, 2])
        if len(erased):
            self._erase(out, erased, draws)
        return out

    def _matrices(self, draws: Draws, inputs: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        interpolation, outputs = self.preprocessing.interpolation, self.preprocessing.image_size
        windows = [
            np.stack([window.start, window.extent, window.low, window.high, window.flip]).astype(np.float32)
            for window in (draws.rows, draws.columns)
        ]

        def make(window: np.ndarray, axis: int) -> Tensor:
            # one number of taps for all batches of a data set
            taps = taps_needed(interpolation, inputs[axis] / outputs[axis])
            return weights(self._to_device(window), inputs[axis], outputs[axis], taps, interpolation, self._dtype)

        if inputs[0] == inputs[1] and outputs[0] == outputs[1]:
            # some fifty small kernels, which take a GPU as long for both axes as for one
            both = make(np.concatenate(windows, axis=1), 0)
            return both[: both.shape[0] // 2], both[both.shape[0] // 2 :]
        return make(windows[0], 0), make(windows[1], 1)

    def _erase(self, images: Tensor, which: np.ndarray, draws: Draws) -> None:
        H, W = images.shape[2:]
        boxes = self._to_device(np.concatenate([draws.erase[which], draws.noise[which]], axis=1))
        top, left, height, width, y, x = (column[:, None, None] for column in boxes.unbind(1))
        rows = torch.arange(H, device=self.device)[:, None]
        columns = torch.arange(W, device=self.device)
        inside = (rows >= top) & (rows < top + height) & (columns >= left) & (columns < left + width)
        noise = self._noise[:, y + rows, x + columns].transpose(0, 1)
        places = self._to_device(which)
        images[places] = torch.where(inside[:, None], noise, images[places])

    def _to_device(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        if self.device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)


def resized_crops(
    numbers: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> np.ndarray:
    """timm's random resized crop from uniform ``numbers`` (B, 22): top, left, height and width, (4, B) float64.

    The first ten pairs are area and aspect ratio, of which the first that fits is taken; the last pair is the place.
    Where none fits the crop is as large as ``ratio`` lets it be, in the middle.
    """
    sizes, places = numbers[:, : 2 * ATTEMPTS].reshape(-1, ATTEMPTS, 2), numbers[:, 2 * ATTEMPTS :]
    area = (scale[0] + sizes[..., 0] * (scale[1] - scale[0])) * (heights * widths)[:, None]
    aspect = np.exp(np.log(ratio[0]) + sizes[..., 1] * (np.log(ratio[1]) - np.log(ratio[0])))
    width, height = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (width <= widths[:, None]) & (height <= heights[:, None])
    height, width = _first(fits, height, width)
    top, left = np.floor(places.T * (np.stack([heights - height, widths - width]) + 1))
    shape = widths / heights
    largest_width = np.where(shape > ratio[1], np.rint(heights * ratio[1]), widths)
    largest_height = np.where(shape < ratio[0], np.rint(widths / ratio[0]), heights)
    middle = (heights - largest_height) // 2, (widths - largest_width) // 2
    return np.where(fits.any(axis=1), (top, left, height, width), (*middle, largest_height, largest_width))


def _padded(number: np.ndarray, sizes: np.ndarray, side: int, padding: int, flip: np.ndarray) -> Window:
    """An axis of images resized to ``side`` pixels, padded at both ends and cropped to ``side`` at random."""
    shift = np.floor(number * (2 * padding + 1)) - padding
    return Window(shift * sizes / side, sizes.astype(float), np.zeros(len(sizes)), sizes.astype(float), flip)


def _erased(numbers: np.ndarray, probability: float, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """timm's random erasing, one rectangle: (top, left, height, width) and the noise's place, both int64."""
    H, W = size
    whether, shapes, (y, x), places = (
        numbers[:, 0],
        numbers[:, 1 : 1 + 2 * ATTEMPTS].reshape(-1, ATTEMPTS, 2),
        numbers[:, 1 + 2 * ATTEMPTS : 3 + 2 * ATTEMPTS].T,
        numbers[:, 3 + 2 * ATTEMPTS :],
    )
    area = (ERASED_AREA[0] + shapes[..., 0] * (ERASED_AREA[1] - ERASED_AREA[0])) * (H * W)
    low, high = np.log(ERASED_RATIO)
    aspect = np.exp(low + shapes[..., 1] * (high - low))
    height, width = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (width < W) & (height < H)
    height, width = _first(fits, height, width)
    height = np.where((whether < probability) & fits.any(axis=1), height, 0)
    boxes = np.stack([np.floor(y * (H - height + 1)), np.floor(x * (W - width + 1)), height, width], axis=1)
    return boxes.astype(np.int64), (places * NOISE_PLACES).astype(np.int64)


def _first(fits: np.ndarray, *values: np.ndarray) -> tuple[np.ndarray, ...]:
    """Of each row of ``values`` the one at the first attempt that fits (the first of all where none does)."""
    chosen = fits.argmax(axis=1)[:, None]
    return tuple(np.take_along_axis(value, chosen, axis=1)[:, 0] for value in values)


def _jitter(images: Tensor, factors: Tensor, luma: Tensor) -> Tensor:
    """Brightness, contrast and saturation of grey values (B, 3, H, W), 0 to 255, by ``factors`` (B, 3); in place."""
    brightness, contrast, saturation = (factor.to(images.dtype).reshape(-1, 1, 1, 1) for factor in factors.unbind(1))
    images.mul_(brightness).clamp_(0, 255)
    # a mean over many pixels in half precision would lose them
    mean = (images.mean(dim=(2, 3), keepdim=True, dtype=torch.float32) * luma).sum(dim=1, keepdim=True)
    images.lerp_(mean.to(images.dtype), 1 - contrast).clamp_(0, 255)
    gray = (images * luma).sum(dim=1, keepdim=True)
    return images.lerp_(gray.expand_as(images), 1 - saturation).clamp_(0, 255)
