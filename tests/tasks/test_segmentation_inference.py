"""Segmentation of images of any size: windows, scales, mirror images, padding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vmamba import create_upernet
from vmamba.tasks import ADE20K_MULTI_SCALE, ADE20K_SINGLE_SCALE, SegmentationInference, class_scores, segment


class PerPixel(nn.Module):
    """Scores a pixel by its own colour alone, and remembers the sizes that it saw."""

    def __init__(self, classes: int = 5, multiple: int = 1):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, classes, 1)
        self.multiple = multiple
        self.seen = []

    def forward(self, images):
        assert all(side % self.multiple == 0 for side in images.shape[2:])
        self.seen.append(tuple(images.shape[2:]))
        return self.conv(images)


@pytest.fixture
def image():
    return torch.randn(1, 3, 40, 56, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def upernet(one_thread):
    torch.manual_seed(0)
    return create_upernet(
        "vmamba_nano", 5, channels=8, auxiliary_channels=8, dims=8, depths=(1, 1, 1, 1), drop_path_rate=0.0
    ).eval()


@pytest.mark.parametrize("window", [(40, 56), (64, 64), (500, 56)])
@torch.inference_mode()
def test_one_window_over_the_image_is_the_whole_image(upernet, image, window) -> None:
    whole = class_scores(upernet, image)
    assert torch.equal(whole, upernet(image))
    assert torch.equal(class_scores(upernet, image, SegmentationInference(window=window)), whole)


@pytest.mark.parametrize(("window", "stride"), [((32, 32), (16, 16)), ((32, 40), (32, 7)), ((33, 50), None)])
@torch.inference_mode()
def test_windows_cover_everything_and_overlaps_are_averaged(image, window, stride) -> None:
    """A model that looks at single pixels gives the same by windows, wherever they lie."""
    model = PerPixel()
    found = class_scores(model, image, SegmentationInference(window=window, stride=stride))
    torch.testing.assert_close(found, model.conv(image))
    assert set(model.seen) == {window}
    assert len(model.seen) > 1


@torch.inference_mode()
def test_overlapping_windows_by_hand(image) -> None:
    class Border(nn.Module):  # the score of a pixel is its column in the window
        def forward(self, images):
            return torch.arange(images.shape[3]).expand(1, 2, *images.shape[2:])

    found = class_scores(Border(), image[..., :48], SegmentationInference(window=(40, 32), stride=(40, 16)))
    expected = [*range(16), *((a + b) / 2 for a, b in zip(range(16, 32), range(16), strict=True)), *range(16, 32)]
    torch.testing.assert_close(found[0, 0, 0], torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize("size", [(1, 1), (5, 200), (33, 47), (40, 56)])
@pytest.mark.parametrize("multiple", [1, 32])
@torch.inference_mode()
def test_any_size_is_padded_and_cut_back(size, multiple) -> None:
    model = PerPixel(multiple=multiple)
    image = torch.randn(2, 3, *size)
    found = class_scores(model, image, SegmentationInference(multiple=multiple))
    torch.testing.assert_close(found, model.conv(image))
    (seen,) = model.seen
    assert all(s >= max(32, o) for s, o in zip(seen, size, strict=True))
    assert segment(model, image, SegmentationInference(multiple=multiple)).shape == (2, *size)


@torch.inference_mode()
def test_padding_is_the_mean_colour_right_and_below(upernet) -> None:
    image = torch.randn(1, 3, 40, 56)
    found = class_scores(upernet, image, SegmentationInference(multiple=32))
    assert torch.equal(found, upernet(F.pad(image, (0, 8, 0, 24)))[..., :40, :56])


@torch.inference_mode()
def test_scales_and_mirror_images_are_averaged_as_probabilities(upernet, image) -> None:
    inference = SegmentationInference(ratios=(1.0, 1.5), flip=True, antialias=False)
    assert inference.views == 4
    total = 0
    for size in ((40, 56), (60, 84)):
        view = F.interpolate(image, size, mode="bilinear", align_corners=False)
        for scores in (upernet(view), upernet(view.flip(3)).flip(3)):
            total = total + F.interpolate(scores, (40, 56), mode="bilinear", align_corners=False).softmax(1)
    found = class_scores(upernet, image, inference)
    torch.testing.assert_close(found.exp(), total / 4)
    assert torch.equal(segment(upernet, image, inference), found.argmax(1))


@torch.inference_mode()
def test_a_mirrored_image_gives_the_mirrored_result(upernet, image) -> None:
    inference = SegmentationInference(flip=True)
    one, two = class_scores(upernet, image, inference), class_scores(upernet, image.flip(3), inference)
    torch.testing.assert_close(one, two.flip(3), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("size", "expected"), [((2048, 512), (512, 717)), ((100, 90), (71, 100)), (None, (40, 56))])
@torch.inference_mode()
def test_images_are_fitted_and_the_result_is_at_the_size_asked_for(image, size, expected) -> None:
    model = PerPixel()
    labels = segment(model, image, SegmentationInference(size=size), out_size=(90, 130))
    assert model.seen == [expected]
    assert labels.shape == (1, 90, 130)
    assert segment(model, image, SegmentationInference(size=size)).shape == (1, 40, 56)


@torch.inference_mode()
def test_labels_are_the_best_scores_at_the_original_size() -> None:
    """Resized first, then the best of 50 classes, taken a few classes at a time; ties go to the first class."""
    model, image = PerPixel(classes=50), torch.randn(2, 3, 20, 30)
    for inference in (None, SegmentationInference(size=(64, 64)), SegmentationInference(window=(32, 32))):
        scores = class_scores(model, image, inference, (61, 83))
        assert torch.equal(segment(model, image, inference, (61, 83)), scores.argmax(1))
    nn.init.zeros_(model.conv.weight)
    nn.init.ones_(model.conv.bias)
    assert (segment(model, image) == 0).all()


def test_smaller_images_are_smoothed_on_request() -> None:
    stripes = torch.zeros(1, 3, 64, 64)
    stripes[..., ::4] = 1

    class Remember(nn.Module):
        def forward(self, images):
            self.images = images
            return images

    model = Remember()
    class_scores(model, stripes, SegmentationInference(ratios=(0.5,), antialias=True))
    smooth = model.images
    class_scores(model, stripes, SegmentationInference(ratios=(0.5,), antialias=False))
    assert smooth.std() < 0.7 * model.images.std()


def test_a_model_in_training_mode_is_told(upernet, image) -> None:
    with pytest.raises(TypeError, match=r"gives a tuple, not scores alone: call model\.eval\(\)"):
        segment(upernet.train(), image.expand(2, -1, -1, -1))


def test_published_settings() -> None:
    assert (ADE20K_SINGLE_SCALE.size, ADE20K_SINGLE_SCALE.views) == ((2048, 512), 1)
    assert (ADE20K_MULTI_SCALE.ratios, ADE20K_MULTI_SCALE.views) == ((0.5, 0.75, 1.0, 1.25, 1.5, 1.75), 12)
    assert ADE20K_MULTI_SCALE.size is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": (0, 5)}, "size"),
        ({"window": (5,)}, "window"),
        ({"stride": (5, 5)}, "name a window"),
        ({"window": (32, 32), "stride": (33, 8)}, "gaps"),
        ({"ratios": ()}, "ratios"),
        ({"ratios": (1.0, 0.0)}, "ratios"),
        ({"multiple": 0}, "multiple"),
    ],
)
def test_values_out_of_range(values, message) -> None:
    with pytest.raises(ValueError, match=message):
        SegmentationInference(**values)


@torch.inference_mode()
def test_certain_mistakes_have_a_finite_loss() -> None:
    class Certain(nn.Module):
        def forward(self, images):
            return torch.tensor([0.0, 1e4]).reshape(1, 2, 1, 1).expand(1, 2, *images.shape[2:])

    found = class_scores(Certain(), torch.zeros(1, 3, 32, 32), SegmentationInference(flip=True))
    assert found.isfinite().all()
    assert (found[:, 1] == 0).all()
