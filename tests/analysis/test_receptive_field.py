"""Effective receptive fields of networks whose fields are known by hand, and of real ones."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from torch import nn

from vmamba.analysis import effective_receptive_field


def stack(*layers: nn.Module) -> nn.Sequential:
    """The layers with all weights one and no bias."""
    for layer in layers:
        nn.init.ones_(layer.weight)
    return nn.Sequential(*layers)


def test_a_network_of_1x1_kernels_sees_one_pixel():
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 5, 1), nn.Conv2d(5, 4, 1)
    field = effective_receptive_field(nn.Sequential(first, second), torch.randn(2, 3, 9, 13), "1")
    assert field.grid == (9, 13)
    assert field.pixel == (4, 6)
    assert field.centre == (4, 6)
    assert np.argwhere(field.contribution).tolist() == [[4, 6]]
    weights = (second.weight[:, :, 0, 0] @ first.weight[:, :, 0, 0]).detach()
    assert field.contribution[4, 6] == pytest.approx(float(weights.sum(0).abs().sum()), rel=1e-6)
    for area in field.areas((0.01, 0.5, 1.0)):
        assert area[1:] == (1.0, 1 / 117, 1 / 117)


def test_three_3x3_kernels_of_ones_see_the_coefficients_of_three_boxes():
    model = stack(*(nn.Conv2d(1, 1, 3, padding=1, bias=False) for _ in range(3)))
    field = effective_receptive_field(model, torch.randn(1, 1, 21, 21), "2")
    line = np.array([1, 3, 6, 7, 6, 3, 1])
    expected = np.zeros((21, 21))
    expected[7:14, 7:14] = np.outer(line, line)
    np.testing.assert_allclose(field.contribution, expected, rtol=1e-6)
    # of 27^2: a side of 1 holds 7^2, of 3 19^2 (49.5 %), of 5 25^2 (85.7 %), of 7 everything
    assert [area.side for area in field.areas((0.05, 0.2, 0.3, 0.5, 0.99))] == [1, 3, 3, 5, 7]
    assert [area.square for area in field.areas((0.3, 0.99))] == [9 / 441, 49 / 441]
    # the fewest pixels for 30 %: 49 + 4 x 42 = 217 of 729, and one of the four corners of 36
    assert field.areas((0.3,))[0].pixels == 6 / 441


def test_patches_are_centred_between_pixels():
    model = stack(nn.Conv2d(3, 2, 4, stride=4, bias=False))
    field = effective_receptive_field(model, torch.randn(1, 3, 20, 28), "0")
    assert field.centre == (9.5, 13.5)
    inside = field.contribution[8:12, 12:16]
    assert (inside == inside[0, 0]).all()
    assert field.contribution.sum() == inside.sum()
    assert [area.side for area in field.areas((0.25, 0.26, 1.0))] == [2, 4, 4]


def test_a_square_is_counted_where_the_picture_is():
    class Wide(nn.Module):
        """Its centre reads the first column of its row."""

        def forward(self, x):
            return x + 0 * x + x[..., :1]

    field = effective_receptive_field(nn.Sequential(Wide()), torch.randn(1, 1, 3, 20), "0")
    (area,) = field.areas((1.0,))
    assert area.side == 21  # column 0 is ten away from column 10
    assert area.square == 1.0
    assert area.pixels == 2 / 60


def test_the_field_is_the_mean_over_images_however_they_come():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GELU(), nn.Conv2d(4, 2, 3, padding=1))
    images = torch.randn(5, 3, 8, 10)
    together = effective_receptive_field(model, images, "2", batch_size=2)
    one_by_one = [effective_receptive_field(model, image[None], "2").contribution for image in images]
    np.testing.assert_allclose(together.contribution, np.mean(one_by_one, axis=0), rtol=1e-5)
    batches = effective_receptive_field(model, iter(images.split(3)), "2")
    np.testing.assert_allclose(batches.contribution, together.contribution, rtol=1e-5)
    assert (together.images, batches.images) == (5, 5)


def test_rectified_fields_leave_out_what_is_negative():
    model = nn.Conv2d(2, 2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, -1.0], [-5.0, 2.0]])[..., None, None])
    image = torch.tensor([2.0, 1.0]).view(1, 2, 1, 1).expand(1, 2, 3, 3)  # features 5 and -8
    found = effective_receptive_field(nn.Sequential(model), image, "0")
    assert found.contribution[1, 1] == 2 + 1
    rectified = effective_receptive_field(nn.Sequential(model), image, "0", rectified=True)
    assert rectified.contribution[1, 1] == 3
    assert rectified.rectified


class Tokens(nn.Module):
    """Patches of 4 as tokens, behind two tokens that are not of the picture."""

    num_prefix_tokens = 2

    def __init__(self):
        super().__init__()
        self.patches = stack(nn.Conv2d(1, 3, 4, stride=4, bias=False))
        self.early = nn.Identity()
        self.tokens = nn.Identity()

    def forward(self, x):
        x = self.early(self.patches(x).flatten(2).transpose(1, 2))
        return self.tokens(torch.cat([torch.zeros(len(x), 2, 3), x], dim=1))


@pytest.mark.parametrize("layer", ["early", "tokens"])  # where the prefix is not there yet, and where it is
def test_tokens_lie_in_a_grid_behind_the_prefix(layer):
    field = effective_receptive_field(Tokens(), torch.randn(1, 1, 12, 20), layer)
    assert field.grid == (3, 5)
    assert field.contribution[4:8, 8:12].sum() == field.contribution.sum() > 0


def test_the_layout_is_told_from_the_shapes_or_asked_for():
    class Last(nn.Module):
        def forward(self, x):
            return x.permute(0, 2, 3, 1)

    square = nn.Sequential(nn.Conv2d(3, 6, 1), Last())
    assert effective_receptive_field(square, torch.randn(1, 3, 8, 8), "1").grid == (8, 8)
    assert effective_receptive_field(square, torch.randn(1, 3, 8, 8), "0").grid == (8, 8)
    ambiguous = nn.Sequential(nn.Conv2d(3, 8, 1), Last())
    with pytest.raises(ValueError, match="may be NCHW or NHWC: say which"):
        effective_receptive_field(ambiguous, torch.randn(1, 3, 8, 8), "1")
    for layer, layout in (("0", "NCHW"), ("1", "NHWC")):
        field = effective_receptive_field(ambiguous, torch.randn(1, 3, 8, 8), layer, layout=layout)
        assert np.argwhere(field.contribution).tolist() == [[4, 4]]


@pytest.mark.parametrize("name", ["vmamba_nano", "convnext_atto", "resnet18", "deit_tiny_patch16_224"])
def test_any_timm_model_by_its_last_feature(name):
    torch.manual_seed(0)
    kwargs = {"img_size": (64, 96)} if "deit" in name else {}
    model = timm.create_model(name, **kwargs)
    field = effective_receptive_field(model, torch.randn(2, 3, 64, 96))
    assert field.layer == model.feature_info[-1]["module"]
    assert field.grid == ((4, 6) if "deit" in name else (2, 3))
    shares = field.areas()
    assert [a.share for a in shares] == [0.2, 0.3, 0.5, 0.99]
    assert 0 < shares[0].square <= shares[1].square <= shares[2].square <= shares[3].square <= 1
    # what contributes lies around the centre: the most of a quarter of the picture's pixels is nowhere else
    assert all(a.pixels <= a.square for a in shares)


def test_earlier_layers_see_less(tiny):
    images = torch.randn(1, 3, 64, 64)
    first, last = (effective_receptive_field(tiny, images, i) for i in (0, -1))
    assert first.layer == "stages.0"
    assert first.areas()[2].square < last.areas()[2].square


def test_the_model_is_left_as_it_was(tiny):
    tiny.train()
    tiny.stages[1].eval()  # as someone does who freezes a stage
    modes = [module.training for module in tiny.modules()]
    random = torch.get_rng_state()
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    effective_receptive_field(tiny, images)
    with pytest.raises(ValueError, match="no layer"):
        effective_receptive_field(tiny, images, "nowhere")
    assert [module.training for module in tiny.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in tiny.parameters())
    assert torch.equal(random, torch.get_rng_state())
    assert not images.requires_grad


def test_frozen_weights_and_no_grad_do_not_matter(tiny):
    images = torch.randn(1, 3, 64, 64)
    expected = effective_receptive_field(tiny, images).contribution
    tiny.requires_grad_(False)
    with torch.no_grad():
        found = effective_receptive_field(tiny, images).contribution
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_mistakes_name_the_remedy(tiny):
    images = torch.randn(1, 3, 64, 64)
    with pytest.raises(ValueError, match=r"no layer 'stages\.3\.blok'; near names: stages\.3\.blocks"):
        effective_receptive_field(tiny, images, "stages.3.blok")
    with pytest.raises(ValueError, match="features 0 to 3, not 4: stages.0"):
        effective_receptive_field(tiny, images, 4)
    with pytest.raises(ValueError, match="does not say which layers"):
        effective_receptive_field(nn.Sequential(nn.Conv2d(3, 3, 1)), images)
    with pytest.raises(ValueError, match="summed over channels, do not move with the picture.* rectified=True"):
        effective_receptive_field(tiny, images, "head.norm")
    assert effective_receptive_field(tiny, images, "head.norm", rectified=True).contribution.max() > 0
    with pytest.raises(ValueError, match="no map of features"):
        effective_receptive_field(tiny, images, "head.fc")
    with pytest.raises(ValueError, match="no images"):
        effective_receptive_field(tiny, images[:0])
    with pytest.raises(ValueError, match=r"one size, got \(32, 64\) after \(64, 64\)"):
        effective_receptive_field(tiny, [images, images[:, :, :32]])
    with pytest.raises(ValueError, match="unknown layout 'HWC'"):
        effective_receptive_field(tiny, images, layout="HWC")
    with pytest.raises(ValueError, match="does not take images of 64 x 64 px"):
        effective_receptive_field(timm.create_model("deit_tiny_patch16_224"), images)
    with pytest.raises(ValueError, match=r"lie in \(0, 1\], not 20"):
        effective_receptive_field(tiny, images).areas((20,))
    torch.nn.init.constant_(tiny.stem.conv1.weight, float("nan"))
    with pytest.raises(FloatingPointError, match="is not finite"):
        effective_receptive_field(tiny, images)


def test_a_layer_that_does_not_depend_on_the_picture():
    class Constant(nn.Module):
        def forward(self, x):
            return torch.ones_like(x)

    model = nn.Sequential(Constant(), nn.Conv2d(3, 3, 1))
    for layer in ("0", "1"):
        with pytest.raises(ValueError, match="does not depend on the picture"):
            effective_receptive_field(model, torch.randn(1, 3, 8, 8), layer)
