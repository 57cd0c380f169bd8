"""The detector: against the official one, its parts against what they should be, its training, its backbones."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from vmamba import FeatureGetter, VMamba, from_official, load_checkpoint
from vmamba.models.detection import MaskRCNN, mask_rcnn, parts
from vmamba.models.detection.parts import (
    BoxDeltas,
    DetectionTransform,
    MaxIoUMatcher,
    PyramidAnchors,
    PyramidRoIAlign,
    crop_masks,
    paste_masks,
)

SMALL = {"depths": (1, 1, 1, 1), "dims": 8}
HEADS = {"channels": 16, "fc_channels": 24, "min_size": 64, "max_size": 96}
OFFICIAL = {
    "depths": (1, 1, 1, 1),
    "dims": 12,
    "ssm_d_state": 1,
    "ssm_ratio": 1.0,
    "ssm_conv_bias": False,
    "forward_type": "v05_noz",
    "norm_layer": "ln2d",
    "downsample_version": "v3",
    "patchembed_version": "v2",
}


def _small(classes: int = 3, **options) -> MaskRCNN:
    return mask_rcnn("vmamba_nano", classes, backbone_kwargs=SMALL, **(HEADS | options))


def _target(*boxes: tuple[int, int, int, int], labels: list[int], size: tuple[int, int] = (64, 64)) -> dict:
    masks = torch.zeros(len(boxes), *size, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[y1:y2, x1:x2] = True
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return {"boxes": boxes, "labels": torch.tensor(labels, dtype=torch.int64), "masks": masks}


# ---- the official detector


def _compare_with_official(folder: Path) -> None:
    wanted = load_file(folder / "mask_rcnn_128x160.safetensors")
    if "masks_packed" in wanted:
        bits = np.unpackbits(wanted["masks_packed"].numpy())
        wanted["masks"] = torch.from_numpy(bits).reshape(-1, 128, 160)
    detector = mask_rcnn(
        FeatureGetter(from_official(OFFICIAL), out_norm=True),
        5,
        channels=32,
        fc_channels=48,
        min_size=128,
        max_size=160,
    ).eval()
    load_checkpoint(detector, folder / "mask_rcnn.state.safetensors")
    detector.transform.image_mean, detector.transform.image_std = [0.0] * 3, [1.0] * 3  # the input is normalised
    seen = {}
    filter_proposals = detector.rpn.filter_proposals
    detector.rpn.filter_proposals = lambda *args: seen.setdefault("proposals", filter_proposals(*args))
    detector.rpn.head.register_forward_hook(lambda module, inputs, outputs: seen.update(scores=outputs[0]))
    detector.backbone.register_forward_hook(lambda module, inputs, outputs: seen.update(levels=list(outputs.values())))
    with torch.inference_mode():
        (found,) = detector(list(wanted["input"]))

    errors = {}
    for i in range(5):
        for name, ours in ((f"fpn{i}", seen["levels"][i]), (f"rpn_cls{i}", seen["scores"][i])):
            if name in wanted:
                errors[name] = ((ours - wanted[name]).norm() / wanted[name].norm()).item()
    assert len(errors) >= 9
    assert {name: error for name, error in errors.items() if not error <= 1e-4} == {}
    (proposals,), (scores,) = seen["proposals"]
    torch.testing.assert_close(proposals, wanted["proposals"], atol=0.05, rtol=0)
    torch.testing.assert_close(scores, wanted["proposal_scores"], atol=1e-3, rtol=0)

    assert wanted["scores"].min() > 0.05 + 1e-3  # every one of the 100 counts
    torch.testing.assert_close(found["boxes"], wanted["boxes"], atol=0.05, rtol=0)
    torch.testing.assert_close(found["scores"], wanted["scores"], atol=1e-3, rtol=0)
    assert torch.equal(found["labels"] - 1, wanted["labels"])
    ours, theirs = found["masks"][:, 0], wanted["masks"].bool()
    union = (ours | theirs).flatten(1).sum(1)
    assert union.min() > 0
    assert ((ours & theirs).flatten(1).sum(1) / union).min() >= 0.99


def test_the_official_detector_finds_the_same(golden: Path) -> None:
    _compare_with_official(golden)


@pytest.mark.golden
def test_the_official_detector_finds_the_same_in_every_tensor(shared: Path) -> None:
    _compare_with_official(shared / "golden" / "downstream")


# ---- its parts


def test_anchors_are_not_rounded_and_stand_a_stride_apart() -> None:
    anchors = PyramidAnchors((4, 64))
    features = [torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 1, 1)]
    images = type("Images", (), {"image_sizes": [(8, 12)] * 2})()
    first, second = anchors(images, features)
    assert first is second
    assert first.shape == ((2 * 3 + 1) * 3, 4)
    half = 16 * math.sqrt(2)  # of the long side of an anchor of 32 x 32 pixels' area and ratio 1 : 2
    torch.testing.assert_close(first[0], torch.tensor([-half, -half / 2, half, half / 2]))
    torch.testing.assert_close(first[1], torch.tensor([-16.0, -16, 16, 16]))
    torch.testing.assert_close(first[3 * 3 + 3 + 1], torch.tensor([4.0 - 16, 4 - 16, 4 + 16, 4 + 16]))
    torch.testing.assert_close(first[-2], torch.tensor([-256.0, -256, 256, 256]))


def test_regions_are_pooled_from_the_level_of_their_size() -> None:
    pool = PyramidRoIAlign((4, 8, 16, 32), 2)
    # level i is constantly i
    features = {str(i): torch.full((2, 1, 256 >> i, 256 >> i), float(i)) for i in range(4)}
    sides = torch.tensor([10, 111, 112, 223, 224, 447, 448, 900])
    boxes = torch.stack([torch.zeros(8), torch.zeros(8), sides, sides], dim=1)
    pooled = pool(features, [boxes[:3], boxes[3:]])
    assert pooled.shape == (8, 1, 2, 2)
    assert pooled[:, 0, 0, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_regions_are_aligned_to_pixel_centres_with_a_sample_a_pixel() -> None:
    # of a ramp, a bin's mean is the ramp at the bin's centre, in coordinates where pixel i covers i..i+1
    ramp = torch.arange(32.0).expand(1, 1, 32, 32) + 0.5
    box = torch.tensor([[8.0, 8, 72, 72]])  # pixels 2..18 at stride 4
    pooled = PyramidRoIAlign((4,), 4)({"0": ramp}, [box])
    torch.testing.assert_close(pooled[0, 0, 0], torch.tensor([4.0, 8, 12, 16]))


def test_box_sides_shrink_and_grow_62_fold_at_most() -> None:
    box = torch.tensor([[0.0, 0, 100, 100]])
    coder = BoxDeltas((10.0, 10.0, 5.0, 5.0))
    small, large = (coder.decode(torch.tensor([[0.0, 0, s, s]]), [box])[0, 0] for s in (-100.0, 100.0))
    assert (small[2] - small[0]).item() == pytest.approx(1.6, rel=1e-4)
    assert (large[2] - large[0]).item() == pytest.approx(6250, rel=1e-4)
    for scale in (0.5, 3.0):
        other = torch.tensor([[10.0, 20, 10 + 50 * scale, 20 + 70 * scale]])
        torch.testing.assert_close(coder.decode(coder.encode([other], [box])[0], [box])[:, 0], other)


def test_a_box_without_a_good_match_takes_its_best_from_another() -> None:
    overlaps = torch.tensor(
        [
            [0.8, 0.4, 0.1, 0.0, 0.0],
            [0.1, 0.0, 0.2, 0.1, 0.1],  # its best overlap is below 0.3: nobody
            [0.6, 0.5, 0.0, 0.0, 0.0],  # its best is the first box's own match, and goes to it
        ]
    )
    matcher = MaxIoUMatcher(0.7, 0.3, lowest=0.3)
    assert matcher(overlaps).tolist() == [2, -2, -1, -1, -1]


def test_pasted_masks_are_the_bilinear_interpolation_at_pixel_centres() -> None:
    torch.manual_seed(0)
    masks = torch.rand(4, 28, 28)
    boxes = torch.tensor([[3.2, 4.7, 30.1, 22.0], [-8.0, 10.0, 20.5, 50.0], [10, 10, 10, 20], [38.9, 20, 41, 90.0]])
    pasted = paste_masks(masks, boxes, (40, 44))
    assert pasted.shape == (4, 40, 44)
    assert pasted.dtype == torch.bool
    assert not pasted[2].any()
    for mask, box, ours in zip(masks, boxes, pasted, strict=True):
        if box[2] == box[0]:
            continue
        y = (torch.arange(40) + 0.5 - box[1]) / (box[3] - box[1]) * 2 - 1
        x = (torch.arange(44) + 0.5 - box[0]) / (box[2] - box[0]) * 2 - 1
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)[None]
        sampled = F.grid_sample(mask[None, None], grid, align_corners=False)[0, 0]
        near = (sampled - 0.5).abs() < 1e-5
        assert torch.equal(ours | near, (sampled >= 0.5) | near)
        assert ours.any()


def _pasted_one_by_one(masks: torch.Tensor, boxes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """What `paste_masks` promises, in numbers of one box, none of it shared between boxes."""
    pasted = torch.zeros(len(masks), *size, dtype=torch.bool)
    cells = torch.arange(masks.shape[-1], dtype=masks.dtype)
    for canvas, mask, (x1, y1, x2, y2) in zip(pasted, masks, boxes.tolist(), strict=True):
        if x2 <= x1 or y2 <= y1:
            continue
        weights, window = [], []
        for low, high, side in ((y1, y2, size[0]), (x1, x2, size[1])):
            start, stop = max(math.floor(low) - 1, 0), min(math.ceil(high) + 1, side)
            pixels = torch.arange(start, max(start, stop), dtype=masks.dtype) + 0.5
            positions = (pixels - low) * (len(cells) / (high - low)) - 0.5
            weights.append((1 - (positions[:, None] - cells).abs()).clamp(min=0))
            window.append(slice(start, max(start, stop)))
        canvas[tuple(window)] = weights[0] @ mask @ weights[1].T >= 0.5
    return pasted


@pytest.mark.parametrize("paste", [parts._paste_boxes, parts._paste_everywhere], ids=["boxes", "everywhere"])
def test_masks_pasted_together_are_those_pasted_one_by_one(paste, monkeypatch) -> None:
    size = (61, 83)
    monkeypatch.setattr(parts, "_PIXELS_TOGETHER", 7 * size[0] * size[1])
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(90, 2, generator=generator) * torch.tensor([83.0, 61.0])
    boxes = torch.cat([corners, corners + 40 * torch.rand(90, 2, generator=generator)], dim=1)
    boxes[:20] = boxes[:20].round()
    boxes[20:30] += torch.tensor(
        [-30.0, -30.0, 0.0, 0.0]
    )  # beyond the image's upper left corner, others beyond the lower
    boxes[30:40, 2:] = boxes[30:40, :2] + torch.rand(10, 2, generator=generator)  # less than a pixel
    boxes[40, 2], boxes[41, 3], boxes[42] = boxes[40, 0], boxes[41, 1] - 3, boxes[42].flip(0)  # no area
    boxes[43:47] = torch.tensor([[-9, -9, 99, 99], [90, 5, 99, 20], [5, -20, 20, -9], [0, 0, 83, 61]])
    masks = torch.rand(90, 28, 28, generator=generator).sqrt()
    masks[50:55], masks[55:60] = 0, 1
    wanted = _pasted_one_by_one(masks, boxes, size)
    filled = wanted.flatten(1).any(1)
    assert filled[:20].all()
    assert filled[20:40].any()
    assert filled[43]
    assert not filled[[40, 41, 44, 45, 50]].any()
    pasted = torch.zeros_like(wanted)
    paste(pasted, masks, boxes.double())
    assert torch.equal(pasted, wanted)
    paste(none := torch.zeros(0, *size, dtype=torch.bool), masks[:0], boxes[:0].double())
    assert none.shape == (0, *size)
    assert torch.equal(paste_masks(masks, boxes, size), wanted)


def test_mask_targets_are_the_mask_inside_the_box() -> None:
    masks = torch.zeros(3, 32, 32, dtype=torch.bool)
    masks[2, 8:16, 8:16] = True
    boxes = torch.tensor([[8.0, 8, 24, 24], [0.0, 0, 8, 8]])
    targets = crop_masks(masks, torch.tensor([2, 2]), boxes, 4)
    wanted = torch.zeros(2, 4, 4)
    wanted[0, :2, :2] = 1
    assert torch.equal(targets, wanted)
    assert crop_masks(masks, torch.tensor([], dtype=torch.int64), boxes[:0], 4).shape == (0, 4, 4)


@pytest.mark.parametrize(
    ("size", "resized"), [((480, 640), (800, 1067)), ((375, 1000), (500, 1333)), ((800, 800), None)]
)
def test_images_are_resized_to_the_nearest_pixel(size, resized) -> None:
    transform = DetectionTransform(800, 1333, [0.5] * 3, [0.25] * 3).eval()
    images, _ = transform([torch.rand(3, *size)])
    assert images.image_sizes == [resized or size]
    assert all(side % 32 == 0 for side in images.tensors.shape[2:])


def test_training_draws_a_size_and_scales_boxes_and_masks_with_it() -> None:
    transform = DetectionTransform((32, 128), 1000, [0.5] * 3, [0.25] * 3).train()
    target = _target((16, 8, 48, 40), labels=[1])
    torch.manual_seed(0)
    seen = set()
    for _ in range(20):
        images, (scaled,) = transform([torch.rand(3, 64, 64)], [target])
        (height, width) = images.image_sizes[0]
        factor = height / 64
        torch.testing.assert_close(scaled["boxes"], target["boxes"] * factor)
        assert scaled["masks"].shape == (1, height, width)
        x1, y1, x2, y2 = (int(v) for v in scaled["boxes"][0])
        assert scaled["masks"].sum() == scaled["masks"][0, y1:y2, x1:x2].sum() == 32 * 32 * factor**2
        seen.add(height)
    assert seen == {32, 128}
    assert target["boxes"].tolist() == [[16, 8, 48, 40]]  # what came in is untouched
    empty = transform([torch.rand(3, 64, 64)], [_target(labels=[])])[1][0]
    assert len(empty["masks"]) == len(empty["boxes"]) == 0


# ---- detections


def test_detections_have_torchvisions_form_and_the_images_own_sizes() -> None:
    torch.manual_seed(0)
    detector = _small(score_threshold=0.0, max_detections=7).eval()
    with torch.inference_mode():
        found = detector([torch.rand(3, 50, 70), torch.rand(3, 90, 40)])
    for result, (height, width) in zip(found, [(50, 70), (90, 40)], strict=True):
        assert set(result) == {"boxes", "labels", "scores", "masks"}
        assert len(result["scores"]) == 7
        assert result["scores"].diff().max() <= 0
        assert result["labels"].dtype == torch.int64
        assert 1 <= result["labels"].min() <= result["labels"].max() <= 3
        assert result["masks"].shape == (7, 1, height, width)
        assert result["masks"].dtype == torch.bool
        assert result["boxes"].min() >= 0
        assert (result["boxes"] <= torch.tensor([width, height] * 2) + 1e-3).all()


def test_nothing_found_is_an_empty_result() -> None:
    detector = _small(score_threshold=0.99).eval()
    with torch.inference_mode():
        (found,) = detector([torch.rand(3, 64, 64)])
    assert found["boxes"].shape == (0, 4)
    assert found["masks"].shape == (0, 1, 64, 64)


def test_a_batch_finds_what_single_images_do() -> None:
    torch.manual_seed(0)
    detector = _small(score_threshold=0.0, max_detections=5).eval()
    images = [torch.rand(3, 64, 64), torch.rand(3, 64, 64)]
    with torch.inference_mode():
        together = detector(images)
        for image, result in zip(images, together, strict=True):
            (alone,) = detector([image])
            torch.testing.assert_close(alone["boxes"], result["boxes"], atol=1e-3, rtol=1e-4)
            assert torch.equal(alone["labels"], result["labels"])


# ---- training


@pytest.mark.parametrize("masks", [True, False])
def test_every_parameter_learns(masks) -> None:
    torch.manual_seed(0)
    detector = _small(masks=masks).train()
    targets = [_target((4, 4, 40, 44), (30, 30, 60, 62), labels=[1, 3]), _target((8, 8, 20, 20), labels=[2])]
    losses = detector([torch.rand(3, 64, 64)] * 2, targets)
    names = {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"} | (
        {"loss_mask"} if masks else set()
    )
    assert set(losses) == names
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    without = [name for name, p in detector.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_an_image_without_objects_teaches_the_background() -> None:
    detector = _small().train()
    losses = detector([torch.rand(3, 64, 64)], [_target(labels=[])])
    assert losses["loss_mask"] == losses["loss_box_reg"] == losses["loss_rpn_box_reg"] == 0
    assert losses["loss_classifier"] > 0
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in detector.parameters())


def test_a_few_steps_find_the_object() -> None:
    torch.manual_seed(0)
    detector = _small(classes=2).train()
    image = torch.zeros(3, 64, 64)
    image[:, 16:48, 8:40] = 1
    target = _target((8, 16, 40, 48), labels=[2])
    optimizer = torch.optim.AdamW(detector.parameters(), lr=2e-3)
    for _ in range(60):
        loss = sum(detector([image], [target]).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.inference_mode():
        (found,) = detector.eval()([image])
    assert found["labels"][0] == 2
    assert found["scores"][0] > 0.5
    assert (found["boxes"][0] - target["boxes"][0]).abs().max() < 4
    mask = found["masks"][0, 0]
    assert (mask & target["masks"][0]).sum() / (mask | target["masks"][0]).sum() > 0.8


def test_losses_are_the_official_ones() -> None:
    """Box losses are L1 sums over the number of samples; class and objectness are means."""
    torch.manual_seed(0)
    rpn = _small().rpn.train()
    labels = [torch.tensor([1.0, 0.0, 0.0, -1.0])]
    logits, deltas = torch.randn(4, 1), torch.randn(4, 4)
    targets = [torch.randn(4, 4)]
    objectness, boxes = rpn.compute_loss(logits, deltas, labels, targets)
    assert boxes.item() == pytest.approx(((deltas[0] - targets[0][0]).abs().sum() / 3).item(), rel=1e-5)
    wanted = F.binary_cross_entropy_with_logits(logits[:3, 0], torch.tensor([1.0, 0, 0]))
    assert objectness.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_region_losses_are_of_the_regions_own_class(monkeypatch) -> None:
    torch.manual_seed(0)
    heads = _small(classes=3).roi_heads.train()
    scores, deltas, masks = torch.randn(4, 4), torch.randn(4, 12), torch.randn(2, 3, 28, 28)
    boxes = torch.tensor([[0.0, 0, 28, 28], [4, 4, 32, 32], [0, 0, 9, 9], [5, 5, 9, 9]])
    labels, owners = torch.tensor([3, 1, 0, 0]), torch.tensor([1, 0, 0, 0])
    offsets = torch.randn(4, 4)
    monkeypatch.setattr(heads, "select_training_samples", lambda *_: ([boxes], [owners], [labels], [offsets]))
    monkeypatch.setattr(heads.box_predictor, "forward", lambda _: (scores, deltas))
    monkeypatch.setattr(heads.mask_predictor, "forward", lambda _: masks)
    target = _target((0, 0, 14, 28), (10, 10, 30, 30), labels=[1, 3])
    features = {str(i): torch.zeros(1, 16, 64 >> i, 64 >> i) for i in range(4)}
    _, losses = heads(features, [boxes], [(64, 64)], [target])
    distance = (deltas[0, 8:] - offsets[0]).abs().sum() + (deltas[1, :4] - offsets[1]).abs().sum()
    assert losses["loss_box_reg"].item() == pytest.approx((distance / 4).item(), rel=1e-5)
    assert losses["loss_classifier"].item() == pytest.approx(F.cross_entropy(scores, labels).item(), rel=1e-5)
    # regions of 28 pixels: their targets are the objects' masks, pixel by pixel
    wanted = torch.stack([target["masks"][1, :28, :28], target["masks"][0, 4:32, 4:32]]).float()
    ours = torch.stack([masks[0, 2], masks[1, 0]])
    wanted = F.binary_cross_entropy_with_logits(ours, wanted)
    assert losses["loss_mask"].item() == pytest.approx(wanted.item(), rel=1e-5)


def test_an_object_takes_its_best_region_from_another_object() -> None:
    heads = _small().roi_heads
    objects = torch.tensor([[0.0, 0, 20, 20], [0, 0, 20, 28]])
    regions = torch.tensor([[0.0, 0, 20, 23], [0, 0, 20, 22], [40, 40, 50, 50]])
    labels = torch.tensor([2, 3])
    with_objects = torch.cat([regions, objects])
    (matched,), (found,) = heads.assign_targets_to_proposals([with_objects], [objects], [labels])
    # the first region overlaps object 0 by 20/23 and object 1 by 23/28, the second by 20/22 and 22/28: each object has
    # its own best one, although both regions overlap object 0 more
    assert matched.tolist() == [1, 0, 0, 0, 1]
    assert found.tolist() == [3, 2, 0, 2, 3]
    (matched,), (found,) = heads.assign_targets_to_proposals([regions], [objects[:0]], [labels[:0]])
    assert matched.tolist() == found.tolist() == [0, 0, 0]


def test_autocast_keeps_boxes_and_losses_in_full_precision() -> None:
    torch.manual_seed(0)
    detector = _small(score_threshold=0.0)
    with torch.autocast("cpu", torch.bfloat16):
        losses = detector.train()([torch.rand(3, 64, 64)], [_target((4, 4, 40, 44), labels=[1])])
        with torch.no_grad():
            (found,) = detector.eval()([torch.rand(3, 64, 64)])
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert found["boxes"].dtype == found["scores"].dtype == torch.float32


def test_masks_are_pasted_in_full_precision_under_autocast() -> None:
    transform = _small().eval().transform
    torch.manual_seed(0)
    boxes, masks = torch.tensor([[3.2, 4.9, 300.4, 211.7]]), torch.rand(1, 1, 28, 28)
    pasted = []
    for enabled in (False, True):
        found = [{"boxes": boxes.clone(), "masks": masks.clone()}]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            transform.postprocess(found, [(240, 320)], [(240, 320)])
        pasted.append(found[0]["masks"])
    assert torch.equal(*pasted)
    assert 0.3 < pasted[0][0, 0, 10:200, 10:290].float().mean() < 0.7


# ---- backbones and mistakes


@pytest.mark.parametrize(
    ("name", "options", "strides"),
    [
        ("resnet18", {}, (4, 8, 16, 32)),
        ("convnext_atto", {}, (4, 8, 16, 32)),
        (
            "swin_tiny_patch4_window7_224",
            {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)},
            (4, 8, 16, 32),
        ),
        ("resnet18", {"out_indices": (3, 4)}, (16, 32)),
    ],
)
def test_other_backbones_of_timm_stand_in(name, options, strides) -> None:
    detector = mask_rcnn(name, 2, backbone_kwargs=options, score_threshold=0.0, max_detections=3, **HEADS).eval()
    assert detector.backbone.strides == strides
    with torch.inference_mode():
        levels = detector.backbone(torch.rand(1, 3, 64, 96))
        (found,) = detector([torch.rand(3, 60, 90)])
    assert [tuple(level.shape) for level in levels.values()] == [
        (1, 16, -(-64 // s), -(-96 // s)) for s in (*strides, 2 * strides[-1])
    ]
    assert found["masks"].shape == (3, 1, 60, 90)


def test_vmamba_gets_its_output_norms_and_options() -> None:
    body = _small().backbone.body
    assert len(body.out_norms) == 4
    assert body.model.config.dims == (8, 16, 32, 64)


def test_classification_weights_start_a_backbone(tmp_path) -> None:
    classifier = VMamba(num_classes=7, mlp_ratio=2.0, **SMALL)
    torch.save({"model": classifier.state_dict()}, tmp_path / "c.pth")
    detector = _small()
    load_checkpoint(detector.backbone.body, tmp_path / "c.pth", new_head=True, new_out_norms=True)
    weights = detector.backbone.body.model.state_dict()
    assert all(torch.equal(weights[name], t) for name, t in classifier.state_dict().items() if name in weights)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "vit_tiny_patch16_224"}, r"strides \[16, .*twice the one before"),
        ({"backbone": "resnet999"}, "no model 'resnet999'"),
        ({"classes": 0}, "classes must be a positive number"),
        ({"min_size": ()}, "min_size must be positive"),
        ({"min_size": 800, "max_size": 700}, r"max_size must be at least min_size \(800\), got 700"),
        ({"score_threshold": 1.5}, "score_threshold must be"),
        ({"max_detections": 0}, "max_detections must be"),
        ({"anchor_scale": 0}, "anchor_scale must be"),
        ({"backbone": timm.create_model("resnet18", features_only=True), "backbone_kwargs": {"a": 1}}, "left out when"),
    ],
)
def test_what_cannot_be_is_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        mask_rcnn(**({"backbone": "resnet18", "classes": 2, "channels": 8, "fc_channels": 8} | options))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: None, "needs a target for every image: 1 images"),
        (lambda t: [{k: v for k, v in t.items() if k != "masks"}], "target 0 has no masks: .*masks=False"),
        (lambda t: [{k: v for k, v in t.items() if k != "labels"}], "target 0 has no labels$"),
        (lambda t: [t | {"labels": torch.tensor([0])}], r"labels must be 1 to 3 .*target 0 has 0 to 0"),
        (lambda t: [t | {"labels": torch.tensor([4])}], r"labels must be 1 to 3 .*target 0 has 4 to 4"),
        (lambda t: [t | {"boxes": torch.tensor([[9.0, 9, 9, 20]])}], "target 0 has a box without an area"),
    ],
)
def test_targets_that_do_not_fit_are_named(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        _small().train()([torch.rand(3, 64, 64)], change(_target((4, 4, 20, 20), labels=[1])))
