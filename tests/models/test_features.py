"""Backbones of other kinds that stand in for ours: what weight decay leaves alone, norms, sizes."""

import pytest
import timm
import torch

from vmamba.models.detection import mask_rcnn
from vmamba.models.features import SIDES, ImageSides, TimmFeatures, create_features
from vmamba.models.upernet import create_upernet
from vmamba.tasks import SegmentationInference, class_scores, make_optimizer

SWIN = {"embed_dim": 24, "depths": (2, 2, 2, 2), "num_heads": (1, 1, 2, 2)}


@pytest.mark.parametrize("extractor", ["list", "getter"])
def test_marks_against_weight_decay_survive_timms_renaming(extractor) -> None:
    options = {"feature_cls": "getter"} if extractor == "getter" else {}
    model = create_features("swin_tiny_patch4_window7_224", **SWIN, **options)
    tables = {name for name, _ in model.named_parameters() if name.endswith("relative_position_bias_table")}
    assert len(tables) == 8
    assert model.no_weight_decay() == tables


@pytest.mark.parametrize("network", ["upernet", "mask_rcnn"])
@pytest.mark.parametrize(("name", "mark"), [("swin_tiny_patch4_window7_224", "bias_table"), ("vmamba_nano", "A_log")])
def test_the_optimiser_of_a_network_heeds_them(network, name, mark) -> None:
    options = SWIN if name.startswith("swin") else {}
    if network == "upernet":
        model = create_upernet(name, 3, channels=8, auxiliary_channels=8, **options)
    else:
        model = mask_rcnn(name, 3, channels=8, fc_channels=8, backbone_kwargs=options)
    decayed = {
        id(p)
        for group in make_optimizer(model, lr=1e-3, weight_decay=0.05).param_groups
        if group["weight_decay"]
        for p in group["params"]
    }
    marked = [p for n, p in model.named_parameters() if mark in n and p.ndim > 1]
    assert marked
    assert not decayed & set(map(id, marked))


def test_a_stand_in_for_a_detector_norms_what_it_gives_and_nothing_else() -> None:
    detector = mask_rcnn("resnet18", 2, channels=8, fc_channels=8)
    body = detector.backbone.body
    assert isinstance(body, TimmFeatures)
    assert body.feature_info.reduction() == [4, 8, 16, 32]
    assert len(body.norms) == 4
    features = body(torch.randn(2, 3, 64, 64))
    for feature, channels in zip(features, body.feature_info.channels(), strict=True):
        assert feature.shape[1] == channels
        torch.testing.assert_close(feature.mean(1), torch.zeros(2, *feature.shape[2:]), atol=1e-5, rtol=0)
    plain = mask_rcnn("resnet18", 2, channels=8, fc_channels=8, out_norm=False).backbone.body
    assert not list(plain.norms.parameters())


def test_swin_takes_any_size_and_shifts_its_windows_everywhere() -> None:
    model = create_features("swin_tiny_patch4_window7_224", **SWIN)
    assert [tuple(f.shape[2:]) for f in model(torch.randn(1, 3, 72, 100))] == [(18, 25), (9, 13), (5, 7), (3, 4)]
    shifts = [m.shift_size for m in model.modules() if hasattr(m, "shift_size")]
    assert [tuple(s) for s in shifts] == [(0, 0), (3, 3)] * 4


def test_initial_weights_do_not_depend_on_looking_for_marks() -> None:
    torch.manual_seed(0)
    create_features("convnext_atto")
    after = torch.rand(1)
    torch.manual_seed(0)
    TimmFeatures(timm.create_model("convnext_atto", features_only=True))
    assert torch.equal(after, torch.rand(1))


# ---- images of any size

# the smallest model of every family whose sides are known by its name, and one of every other rule
OF_SIDES = {
    "csatv2": "csatv2",
    "dla": "dla46_c",
    "hieradet_sam2": "sam2_hiera_tiny",
    "hrnet": "hrnet_w18_small",
    "inception_resnet_v2": "inception_resnet_v2",
    "inception_v3": "inception_v3",
    "inception_v4": "inception_v4",
    "tresnet": "tresnet_m",
}
OF_ANY_SIZE = {
    "bat_resnext26ts": {},
    "convnext_atto": {},
    "efficientvit_b0": {},
    "halonet26t": {},
    "lambda_resnet26t": {},
    "resnet50_clip_gap": {},
    "maxvit_tiny_rw_224": {},
    "naflexvit_base_patch16_gap": {"embed_dim": 24, "num_heads": 2, "depth": 4},
    "pvt_v2_b0": {},
    "resnet18": {},
    "swin_tiny_patch4_window7_224": SWIN,
    "swinv2_tiny_window8_256": SWIN,
    "test_vit": {},
    "vit_tiny_patch16_224": {},
    "vit_tiny_r_s16_p8_224": {},
    "vitamin_small_224": {},
}
OF_ONE_SIZE = (
    "botnet26t_256",
    "coat_lite_tiny",
    "efficientformerv2_s0",
    "gcvit_xxtiny",
    "hiera_tiny_224",
    "levit_128s",
)
SMALL_HEADS = {"channels": 8, "auxiliary_channels": 8}


def _grids(model: TimmFeatures, height: int, width: int) -> list[tuple[int, int]]:
    """What the features of an image cover, rounded up, of the height and the width."""
    return [(-(-height // stride), -(-width // stride)) for stride in model.feature_info.reduction()]


def _created(name: str, **options) -> TimmFeatures:
    """On the meta device, where shapes are checked and nothing is computed."""
    with torch.device("meta"):
        return create_features(name, **options).eval()


def _features(model: TimmFeatures, height: int, width: int) -> list[tuple[int, int]]:
    with torch.inference_mode():
        return [tuple(feature.shape[2:]) for feature in model(torch.empty(1, 3, height, width, device="meta"))]


def test_every_family_of_known_sides_is_looked_at() -> None:
    assert OF_SIDES.keys() == SIDES.keys()


@pytest.mark.parametrize("family", SIDES)
def test_families_of_known_sides_take_any(family) -> None:
    model = _created(OF_SIDES[family])
    assert model.sides == SIDES[family]
    for height, width in ((75, 101), (33, 90)):
        found = _features(model, height, width)
        for got, grid, stride in zip(found, _grids(model, height, width), model.feature_info.reduction(), strict=True):
            # convolutions without padding, and stages that round down, give less
            assert all(1 <= side <= most for side, most in zip(got, grid, strict=True)), (got, grid, stride)


@pytest.mark.parametrize("name", OF_ANY_SIZE)
def test_backbones_of_other_kinds_take_any_size(name) -> None:
    model = _created(name, **OF_ANY_SIZE[name])
    assert model.sides.largest is None
    rounds_down = name == "convnext_atto"  # as it always has: it drops the pixels that fill no patch
    for height, width in ((75, 101), (90, 33)):
        grids = _grids(model, height, width)
        if rounds_down:
            grids = [(height // stride, width // stride) for stride in model.feature_info.reduction()]
        assert _features(model, height, width) == grids


def test_what_a_padded_image_gives_is_that_of_zeros_beside_it() -> None:
    """Of Swin, whose official segmentation and detection codes do the same, nothing is cut off."""
    model = create_features("swin_tiny_patch4_window7_224", **SWIN).eval()
    image = torch.randn(1, 3, 75, 101)
    padded = torch.zeros(1, 3, 76, 104)
    padded[:, :, :75, :101] = image
    with torch.inference_mode():
        for ours, theirs in zip(model(image), model(padded), strict=True):
            assert torch.equal(ours, theirs)


def test_what_lies_beyond_the_image_is_cut_off() -> None:
    model = create_features("hrnet_w18_small", out_indices=4).eval()
    image = torch.randn(1, 3, 66, 40)
    padded = torch.zeros(1, 3, 96, 64)
    padded[:, :, :66, :40] = image
    with torch.inference_mode():
        whole, cut = model(padded), model(image)
    assert [tuple(feature.shape[2:]) for feature in whole] == [(24, 16), (12, 8), (6, 4), (3, 2)]
    assert [tuple(feature.shape[2:]) for feature in cut] == [(17, 10), (9, 5), (5, 3), (3, 2)]
    for ours, theirs in zip(cut, whole, strict=True):
        assert torch.equal(ours, theirs[..., : ours.shape[2], : ours.shape[3]])


@pytest.mark.parametrize(
    ("sides", "image", "padding"),
    [
        (ImageSides(), (75, 101), (0, 0)),
        (ImageSides((4, 4)), (75, 104), (1, 0)),
        (ImageSides((32, 16), short=3), (61, 61), (0, 0)),
        (ImageSides((32, 16), short=3), (60, 60), (4, 4)),
        (ImageSides((8, 8), least=64), (33, 65), (31, 7)),
        (ImageSides((224, 224), largest=(224, 224)), (224, 1), (0, 223)),
    ],
)
def test_padding_is_the_least_that_a_model_takes(sides, image, padding) -> None:
    assert sides.padding(*image) == padding


@pytest.mark.parametrize("name", OF_ONE_SIZE)
def test_models_of_one_size_take_smaller_images_and_say_what_they_take(name) -> None:
    model = _created(name)
    side = timm.get_pretrained_cfg(name).input_size[-1]
    assert model.sides.largest == (side, side)
    for height, width in ((side, side), (75, 101)):
        assert _features(model, height, width) == _grids(model, height, width)
    with pytest.raises(ValueError, match=f"{name} takes images of at most {side} x {side} pixels, not of {side + 1} x"):
        _features(model, side + 1, 100)


def test_a_model_of_one_size_can_be_made_for_another() -> None:
    model = _created("hiera_tiny_224", img_size=96)
    assert _features(model, 96, 70) == _grids(model, 96, 70)
    with pytest.raises(ValueError, match="at most 96 x 96 pixels"):
        _features(model, 97, 96)


def test_detectors_refuse_backbones_of_smaller_images() -> None:
    heads = {"channels": 8, "fc_channels": 8, "masks": False}
    with pytest.raises(ValueError, match=r"gcvit_xxtiny takes .* 224 x 224 pixels, but .* up to 1333: give .* 224"):
        mask_rcnn("gcvit_xxtiny", 2, **heads)
    detector = mask_rcnn("gcvit_xxtiny", 2, min_size=100, max_size=200, **heads).eval()
    with torch.inference_mode():
        (found,) = detector([torch.rand(3, 75, 101)])
    assert found["boxes"].shape[1:] == (4,)


def test_a_detector_on_swin_takes_images_of_any_size() -> None:
    detector = mask_rcnn(
        "swin_tiny_patch4_window7_224", 2, channels=8, fc_channels=8, min_size=66, max_size=99, backbone_kwargs=SWIN
    ).eval()
    assert detector.backbone.body(torch.rand(1, 3, 75, 101))[0].shape[2:] == (19, 26)
    with torch.inference_mode():
        found = detector([torch.rand(3, 75, 101), torch.rand(3, 45, 31)])
    assert len(found) == 2


@pytest.mark.parametrize("name", ["vmamba_nano", "resnet18", "swin_tiny_patch4_window7_224", "test_vit"])
@pytest.mark.parametrize(
    "inference",
    [
        SegmentationInference(),
        SegmentationInference(ratios=(0.75, 1.0, 1.25), flip=True),
        SegmentationInference(window=(45, 45), stride=(31, 31)),
        SegmentationInference(size=(99, 66)),
    ],
    ids=["whole", "scales", "windows", "resized"],
)
def test_segmentation_of_images_of_any_size(name, inference) -> None:
    model = create_upernet(name, 3, **SMALL_HEADS, **(SWIN if name.startswith("swin") else {})).eval()
    with torch.inference_mode():
        scores = class_scores(model, torch.randn(1, 3, 75, 101), inference)
    assert scores.shape == (1, 3, 75, 101)
    assert scores.isfinite().all()


def test_training_on_crops_of_any_size() -> None:
    model = create_upernet("swin_tiny_patch4_window7_224", 3, **SMALL_HEADS, **SWIN).train()
    scores, auxiliary = model(torch.randn(2, 3, 75, 101))
    assert scores.shape == auxiliary.shape == (2, 3, 75, 101)
    (scores.sum() + auxiliary.sum()).backward()
    assert model.backbone.model.patch_embed.proj.weight.grad.isfinite().all()
