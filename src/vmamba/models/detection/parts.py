"""What the official detector computes differently from torchvision's, as subclasses of torchvision's parts.

The official detector is Mask R-CNN of mmdetection 3.3 under the configurations of the VMamba release. Everything that
is not here is torchvision's own: the pyramid, the order of steps, sampling, NMS. torchvision's conventions hold
outside: images are lists of (C, H, W) in [0, 1], class 0 is the background.

Sources: Mask R-CNN (arXiv 1703.06870), FPN (1612.03144), Faster R-CNN (1506.01497); for constants and the order of
roundings https://github.com/open-mmlab/mmdetection.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes
from torchvision.ops import batched_nms, box_area, box_iou, clip_boxes_to_image, roi_align

from ..._devices import constant

__all__ = [
    "DetectionTransform",
    "PyramidAnchors",
    "PyramidRoIAlign",
    "RegionHeads",
    "RegionPredictor",
    "RegionProposals",
    "RegionProposalsHead",
    "crop_masks",
    "paste_masks",
]

MASK_THRESHOLD = 0.5  # from mask probabilities to masks, and from resampled training masks to their targets
_PIXELS_TOGETHER = 2**26  # of masks pasted at once on a GPU: 270 MB in fp32
_BELOW_FINEST = 14  # a region is pooled from the finest level while its side is below 2 * 14 of that level's pixels


class PyramidAnchors(AnchorGenerator):
    """Three anchors (height : width 1/2, 1, 2) a pixel of every level, of area (scale * stride)^2, not rounded.

    torchvision rounds the anchors' corners, and takes as a level's stride the image's size over the level's, rounded
    down: of a level with an odd number of columns that is not what separates its pixels.
    """

    def __init__(self, strides: Sequence[int], scale: float = 8.0):
        super().__init__(tuple((scale * stride,) for stride in strides), ((0.5, 1.0, 2.0),) * len(strides))
        self.strides = tuple(strides)

    def generate_anchors(self, scales, aspect_ratios, dtype=torch.float32, device=None) -> Tensor:
        scales = torch.as_tensor(scales, dtype=dtype, device=device)
        heights = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        w = (scales / heights[:, None]).flatten()
        h = (scales * heights[:, None]).flatten()
        return torch.stack([-w, -h, w, h], dim=1) / 2

    def forward(self, images: ImageList, features: list[Tensor]) -> list[Tensor]:
        # coordinates need fp32 whatever the features are computed in
        self.set_cell_anchors(torch.promote_types(features[0].dtype, torch.float32), features[0].device)
        anchors = torch.cat(self.grid_anchors([f.shape[-2:] for f in features], [(s, s) for s in self.strides]))
        return [anchors] * len(images.image_sizes)


class PyramidRoIAlign(nn.Module):
    """RoIAlign with pixel centres at half-integers and as many samples a bin as it has pixels, from one level a region.

    A region's level is floor(log2(side / (14 * finest stride))), side being the root of its area (FPN, eq. 1).
    torchvision's `MultiScaleRoIAlign` takes pixel centres at integers, and guesses the strides from the sizes.
    """

    def __init__(self, strides: Sequence[int], size: int):
        super().__init__()
        self.strides = tuple(strides)
        self.output_size = (size, size)

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes=None) -> Tensor:
        """Features of the levels from the finest on, boxes (N_i, 4) x1 y1 x2 y2 of each image -> (sum N_i, C, S, S)."""
        levels = list(features.values())[: len(self.strides)]
        flat = torch.cat(boxes)
        image = torch.cat([torch.full_like(b[:, :1], i) for i, b in enumerate(boxes)])
        regions = torch.cat([image, flat], dim=1)
        side = box_area(flat).sqrt()
        level = (side / (_BELOW_FINEST * self.strides[0]) + 1e-6).log2().floor().clamp(0, len(levels) - 1)
        pooled = levels[0].new_zeros(len(flat), levels[0].shape[1], *self.output_size)
        for i, (feature, stride) in enumerate(zip(levels, self.strides, strict=True)):
            here = torch.where(level == i)[0]
            aligned = roi_align(feature, regions[here], self.output_size, 1 / stride, sampling_ratio=0, aligned=True)
            pooled[here] = aligned.to(pooled.dtype)
        return pooled


class BoxDeltas(BoxCoder):
    """Offsets of a box against another; a side shrinks or grows at most 62.5-fold. torchvision bounds growth only."""

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        least = -self.bbox_xform_clip * constant(tuple(self.weights[2:]), rel_codes.dtype, rel_codes.device)
        codes = rel_codes.unflatten(1, (-1, 4))
        codes = torch.cat([codes[..., :2], codes[..., 2:].maximum(least)], dim=-1)
        return super().decode_single(codes.flatten(1), boxes)


class MaxIoUMatcher(Matcher):
    """Gives every box without a good match its best candidates, if they overlap by at least `lowest`.

    As the official assigner: such a candidate goes to the box that has it as its best (torchvision: to the box that
    covers the candidate best), and there is a least overlap (torchvision: none).
    """

    def __init__(self, high: float, low: float, lowest: float):
        super().__init__(high, low, allow_low_quality_matches=True)
        self.lowest = lowest

    def set_low_quality_matches_(self, matches: Tensor, all_matches: Tensor, match_quality_matrix: Tensor) -> None:
        best = match_quality_matrix.max(dim=1, keepdim=True).values
        box, candidate = torch.where((match_quality_matrix == best) & (best >= self.lowest))
        # where a candidate is the best of several boxes, the last of them has it
        last = torch.full_like(matches, -1).scatter_reduce_(0, candidate, box, "amax")
        matches.copy_(torch.where(last >= 0, last, matches))


class RegionProposalsHead(RPNHead):
    """torchvision's head, results in at least fp32: boxes and their scores are worked out in full precision."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, deltas = super().forward(x)
        return [_full_precision(t) for t in logits], [_full_precision(t) for t in deltas]


class RegionProposals(RegionProposalNetwork):
    """The region proposal network: 1000 proposals an image, of up to 1000 (training: 2000) a level, NMS at 0.7.

    The loss of a box is the L1 distance of the offsets (torchvision: smooth L1).
    """

    def __init__(self, anchors: PyramidAnchors, head: RegionProposalsHead, proposals: int = 1000):
        super().__init__(
            anchors,
            head,
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n={"training": 2 * proposals, "testing": proposals},
            post_nms_top_n={"training": proposals, "testing": proposals},
            nms_thresh=0.7,
        )
        self.box_coder = BoxDeltas((1.0, 1.0, 1.0, 1.0))
        self.proposal_matcher = MaxIoUMatcher(0.7, 0.3, lowest=0.3)
        self.min_size = torch.finfo(torch.float32).tiny  # any box that has an area

    def compute_loss(self, objectness, pred_bbox_deltas, labels, regression_targets) -> tuple[Tensor, Tensor]:
        positive, negative = self.fg_bg_sampler(labels)
        positive = torch.where(torch.cat(positive))[0]
        sampled = torch.cat([positive, torch.where(torch.cat(negative))[0]])
        targets = torch.cat(regression_targets)[positive]
        box_loss = F.l1_loss(pred_bbox_deltas[positive], targets, reduction="sum") / sampled.numel()
        return F.binary_cross_entropy_with_logits(objectness.flatten()[sampled], torch.cat(labels)[sampled]), box_loss


class RegionPredictor(nn.Module):
    """Scores (N, 1 + classes), the background first, and box offsets (N, 4 * classes) from features (N, C)."""

    def __init__(self, in_channels: int, classes: int):
        super().__init__()
        self.cls_score = nn.Linear(in_channels, 1 + classes)
        self.bbox_pred = nn.Linear(in_channels, 4 * classes)
        for layer, std in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return _full_precision(self.cls_score(x)), _full_precision(self.bbox_pred(x))


class RegionHeads(RoIHeads):
    """Box and mask heads. The background has no box offsets and no masks; box loss L1, mask targets binary.

    Args:
        box_pool, box_head, box_predictor: regions to scores and offsets.
        mask_pool, mask_head, mask_predictor: regions to mask logits (N, classes, S, S); None for boxes alone.
        score_threshold, max_detections: what is reported.
    """

    def __init__(
        self,
        box_pool: nn.Module,
        box_head: nn.Module,
        box_predictor: RegionPredictor,
        mask_pool: nn.Module | None = None,
        mask_head: nn.Module | None = None,
        mask_predictor: nn.Module | None = None,
        *,
        score_threshold: float = 0.05,
        max_detections: int = 100,
    ):
        super().__init__(
            box_pool,
            box_head,
            box_predictor,
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=512,
            positive_fraction=0.25,
            bbox_reg_weights=(10.0, 10.0, 5.0, 5.0),
            score_thresh=score_threshold,
            nms_thresh=0.5,
            detections_per_img=max_detections,
            mask_roi_pool=mask_pool,
            mask_head=mask_head,
            mask_predictor=mask_predictor,
        )
        self.box_coder = BoxDeltas(self.box_coder.weights)
        self.proposal_matcher = MaxIoUMatcher(0.5, 0.5, lowest=0.5)

    def forward(self, features, proposals, image_shapes, targets=None):
        """As torchvision's: (detections of each image, {}) in evaluation, ([], losses) in training."""
        if self.training:
            return [], self._losses(features, proposals, targets)
        scores, deltas = self.box_predictor(self.box_head(self.box_roi_pool(features, proposals, image_shapes)))
        boxes, scores, labels = self.postprocess_detections(scores, deltas, proposals, image_shapes)
        detections = [{"boxes": b, "labels": n, "scores": s} for b, s, n in zip(boxes, scores, labels, strict=True)]
        if self.has_mask():
            for detection, logits in zip(detections, self._mask_logits(features, boxes, labels), strict=True):
                detection["masks"] = logits.sigmoid()[:, None]
        return detections, {}

    def assign_targets_to_proposals(self, proposals, gt_boxes, gt_labels):
        """For every proposal the number of its object and its label, 0 for the background.

        The objects' own boxes stand last among the proposals. They are matched to themselves and take no part in the
        matching of the others (torchvision: they do, and each is then the best candidate of its object).
        """
        matched, labels = [], []
        for boxes, objects, classes in zip(proposals, gt_boxes, gt_labels, strict=True):
            candidates = boxes[: len(boxes) - len(objects)]
            match = classes.new_full((len(candidates),), -1)
            if len(candidates) and len(objects):
                match = self.proposal_matcher(box_iou(objects, candidates))
            label = torch.zeros_like(match)
            label[match >= 0] = classes[match[match >= 0]]
            itself = torch.arange(len(objects), device=match.device)
            matched.append(torch.cat([match.clamp(min=0), itself]))
            labels.append(torch.cat([label, classes]))
        return matched, labels

    def _losses(self, features, proposals, targets) -> dict[str, Tensor]:
        proposals, matched, labels, offsets = self.select_training_samples(proposals, targets)
        scores, deltas = self.box_predictor(self.box_head(self.box_roi_pool(features, proposals)))
        every_label, offsets = torch.cat(labels), torch.cat(offsets)
        positive = torch.where(every_label > 0)[0]
        of_class = deltas.unflatten(1, (-1, 4))[positive, every_label[positive] - 1]
        losses = {
            "loss_classifier": F.cross_entropy(scores, every_label),
            "loss_box_reg": F.l1_loss(of_class, offsets[positive], reduction="sum") / every_label.numel(),
        }
        if self.has_mask():
            kept = [torch.where(label > 0)[0] for label in labels]
            boxes = [box[keep] for box, keep in zip(proposals, kept, strict=True)]
            owners = [match[keep] for match, keep in zip(matched, kept, strict=True)]
            logits = torch.cat(
                self._mask_logits(features, boxes, [label[keep] for label, keep in zip(labels, kept, strict=True)])
            )
            wanted = [
                crop_masks(target["masks"], owner, box, logits.shape[-1])
                for target, owner, box in zip(targets, owners, boxes, strict=True)
            ]
            # a mean over nothing is NaN; a sum over nothing leaves the head in the graph
            mean = "mean" if len(logits) else "sum"
            losses["loss_mask"] = F.binary_cross_entropy_with_logits(logits, torch.cat(wanted), reduction=mean)
        return losses

    def _mask_logits(self, features, boxes: list[Tensor], labels: list[Tensor]) -> list[Tensor]:
        """Of each image its regions' mask logits (N_i, S, S), each for its own class."""
        logits = _full_precision(self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes))))
        index = torch.arange(len(logits), device=logits.device)
        return list(logits[index, torch.cat(labels) - 1].split([len(b) for b in boxes]))

    def postprocess_detections(self, class_logits, box_regression, proposals, image_shapes):
        """Every class of every proposal with a score above the threshold, NMS within a class, the best of the rest."""
        counts = [len(p) for p in proposals]
        every_box = self.box_coder.decode(box_regression, proposals).reshape(len(class_logits), -1, 4).split(counts)
        every_score = class_logits.softmax(dim=1)[:, 1:].split(counts)
        found = [], [], []
        for boxes, scores, shape in zip(every_box, every_score, image_shapes, strict=True):
            row, column = torch.where(scores > self.score_thresh)
            boxes = clip_boxes_to_image(boxes[row, column], shape)
            scores = scores[row, column]
            kept = batched_nms(boxes, scores, column, self.nms_thresh)[: self.detections_per_img]
            for results, tensor in zip(found, (boxes, scores, column + 1), strict=True):
                results.append(tensor[kept])
        return found


class DetectionTransform(GeneralizedRCNNTransform):
    """Images (C, H, W) in [0, 1] -> a normalised batch, padded with zeros to a multiple of 32; and results back.

    The short side becomes `min_size` pixels, but the long side at most `max_size`; sizes are rounded to the nearest
    pixel (torchvision: down), bilinear, without antialiasing. With several `min_size` training draws one an image, and
    evaluation takes the last.
    """

    def normalize(self, image: Tensor) -> Tensor:
        # torchvision makes both tensors for every image, and a GPU is waited for to take them
        mean, std = (constant(tuple(v), image.dtype, image.device) for v in (self.image_mean, self.image_std))
        return (image - mean[:, None, None]) / std[:, None, None]

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None):
        short = self.torch_choice(self.min_size) if self.training else self.min_size[-1]
        before = tuple(image.shape[-2:])
        scale = min(short / min(before), self.max_size / max(before))
        size = tuple(int(side * scale + 0.5) for side in before)
        if size == before:
            return image, target
        image = F.interpolate(image[None], size=size, mode="bilinear", align_corners=False)[0]
        if target is not None:
            target["boxes"] = resize_boxes(target["boxes"], before, size)
            if "masks" in target:
                # an interpolation of bool does not exist, one of no masks is an error
                masks = target["masks"]
                masks = masks.view(torch.uint8) if masks.dtype == torch.bool else masks.to(torch.uint8)
                target["masks"] = F.interpolate(masks[None], size=size)[0] if len(masks) else masks.new_zeros(0, *size)
        return image, target

    def postprocess(self, result, image_shapes, original_image_sizes):
        """Boxes and masks at the images' own sizes; masks become (N, 1, H, W) bool."""
        if not self.training:
            for found, shape, original in zip(result, image_shapes, original_image_sizes, strict=True):
                found["boxes"] = resize_boxes(found["boxes"], shape, original)
                if "masks" in found:
                    # autocast would round the pixels' places and the probabilities to three digits
                    with torch.autocast(found["masks"].device.type, enabled=False):
                        found["masks"] = paste_masks(found["masks"][:, 0], found["boxes"], original)[:, None]
        return result


def crop_masks(masks: Tensor, owners: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Training targets of the mask head: what lies of a mask in a box, resampled to size x size, 0 or 1.

    Args:
        masks: (G, H, W) of an image's objects. owners: (N,), the object of each box. boxes: (N, 4) x1 y1 x2 y2.

    Returns:
        (N, size, size), floating point like the boxes.
    """
    if not len(boxes):
        return boxes.new_zeros(0, size, size)
    # only the objects that are asked for are expanded to floating point
    used, owners = owners.unique(return_inverse=True)
    regions = torch.cat([owners[:, None].to(boxes), boxes], dim=1)
    sampled = roi_align(masks[used, None].to(boxes), regions, (size, size), 1.0, sampling_ratio=0, aligned=True)
    return (sampled[:, 0] >= MASK_THRESHOLD).to(boxes)


def paste_masks(masks: Tensor, boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Mask probabilities on their boxes' grids -> masks of the image.

    The value of a pixel is the bilinear interpolation at its centre between the centres of the grid's cells, zero
    outside the grid. It is separable: rows @ mask @ columns, of the pixels of the box alone.

    Args:
        masks: (N, S, S) in [0, 1]. boxes: (N, 4) x1 y1 x2 y2 in pixels. image_size: H, W.

    Returns:
        (N, H, W) bool; True from a probability of 0.5 on. A box without an area has an empty mask.
    """
    pasted = torch.zeros(len(masks), *image_size, dtype=torch.bool, device=masks.device)
    # A GPU is sooner done with all pixels than its host with telling it of every box: 500 boxes were 10,000 kernels.
    paste = _paste_boxes if masks.device.type == "cpu" else _paste_everywhere
    paste(pasted, masks, boxes.double())
    return pasted


def _paste_boxes(pasted: Tensor, masks: Tensor, boxes: Tensor) -> None:
    """Fill `pasted`, of each mask the pixels in its box and one around it, one box after another."""
    weights, starts, stops = [], [], []
    for low, high, side in zip(boxes[:, [1, 0]].T, boxes[:, [3, 2]].T, pasted.shape[1:], strict=True):
        starts.append((low.floor() - 1).clamp(0, side).long())
        stops.append((high.ceil() + 1).clamp(0, side).long())
        longest = max((stops[-1] - starts[-1]).tolist(), default=0)
        weights.append(_hat_weights(starts[-1][:, None] + torch.arange(max(longest, 0)), low, high, masks))
    places = torch.stack([*starts, *stops], dim=1).tolist()
    for canvas, rows, mask, columns, place in zip(pasted, weights[0], masks, weights[1], places, strict=True):
        top, left, bottom, right = place
        if top < bottom and left < right:
            inside = rows[: bottom - top] @ mask @ columns[: right - left].T
            canvas[top:bottom, left:right] = inside >= MASK_THRESHOLD


def _paste_everywhere(pasted: Tensor, masks: Tensor, boxes: Tensor) -> None:
    """Fill `pasted`, many masks at once.

    The same pixels: further outside a box than a pixel every cell gives less than half of itself.
    """
    height, width = pasted.shape[1:]
    x1, y1, x2, y2 = boxes.unbind(1)
    rows = _hat_weights(torch.arange(height, device=masks.device), y1, y2, masks)
    columns = _hat_weights(torch.arange(width, device=masks.device), x1, x2, masks)
    together = max(1, _PIXELS_TOGETHER // (height * width))
    for canvas, down, mask, across in zip(*(t.split(together) for t in (pasted, rows, masks, columns)), strict=True):
        canvas.copy_(down @ mask @ across.mT >= MASK_THRESHOLD)


def _hat_weights(pixels: Tensor, low: Tensor, high: Tensor, masks: Tensor) -> Tensor:
    """(N, pixels, cells): how much each cell between `low` and `high` (N,) fp64 gives to `pixels` (P,) or (N, P).

    In the dtype of `masks`. Where `high` is not above `low` there are zeros and NaN, which no pixel is True of.
    """
    cells = torch.arange(masks.shape[-1], dtype=masks.dtype, device=masks.device)
    scale = (len(cells) / (high - low).clamp(min=0)).to(masks.dtype)
    positions = (pixels.to(masks.dtype) + 0.5 - low.to(masks.dtype)[:, None]) * scale[:, None] - 0.5
    return (1 - (positions[..., None] - cells).abs()).clamp(min=0)


def _full_precision(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
