"""The detection task: loss of a batch, scores of a data set, boxes alone or with masks."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from vmamba.data import CocoDataset, collate_detection, detection_evaluation_transform
from vmamba.models.detection import mask_rcnn
from vmamba.tasks import Detection

pytest.importorskip("faster_coco_eval", reason="average precision needs faster-coco-eval: pip install 'vmamba[det]'")

BOX_FIGURES = {"box_ap", "box_ap50", "box_ap75", "box_aps", "box_apm", "box_apl"}


class Oracle(nn.Module):
    """A detector that knows every image by the sum of its pixels, and the answer to it."""

    def __init__(self, dataset: CocoDataset):
        super().__init__()
        self.answers = {float(image.sum()): target for image, target in (dataset[i] for i in range(len(dataset)))}

    def forward(self, images):
        found = []
        for image in images:
            target = self.answers[float(image.sum())]
            result = {"boxes": target["boxes"], "labels": target["labels"], "scores": torch.ones(len(target["boxes"]))}
            found.append(result | ({"masks": target["masks"][:, None]} if "masks" in target else {}))
        return found


def _data(make_coco, masks: bool = True) -> tuple[CocoDataset, Detection, DataLoader]:
    images, file, _ = make_coco(masks=masks)
    dataset = CocoDataset(images, file, keep_empty=True, transform=detection_evaluation_transform())
    task = Detection(dataset.coco, dataset.categories, masks=dataset.masks)
    return dataset, task, DataLoader(dataset, batch_size=2, collate_fn=collate_detection)


@pytest.mark.parametrize("masks", [True, False])
def test_a_detector_that_knows_everything_scores_100(make_coco, masks) -> None:
    dataset, task, batches = _data(make_coco, masks)
    scores = task.scores()
    model = Oracle(dataset)
    for batch in batches:
        scores.update(model, batch)
    figures = scores.compute()
    assert set(figures) == BOX_FIGURES | ({name.replace("box", "mask") for name in BOX_FIGURES} if masks else set())
    assert figures["box_ap"] == pytest.approx(100)
    assert figures[task.metric] == pytest.approx(100)
    assert task.metric == ("mask_ap" if masks else "box_ap")
    assert len(scores.boxes) == 4
    assert len(scores.masks) == (4 if masks else 0)


def test_shares_of_two_processes_are_put_together(make_coco) -> None:
    dataset, task, batches = _data(make_coco)
    whole, first, second = task.scores(), task.scores(), task.scores()
    for share, batch in zip((first, second), batches, strict=True):
        whole.update(Oracle(dataset), batch)
        share.update(Oracle(dataset), batch)
    first.boxes[0]["score"] = whole.boxes[0]["score"] = 0.5
    first.boxes[0]["bbox"] = whole.boxes[0]["bbox"] = [0.0, 0.0, 5.0, 5.0]
    first.merge(second)
    assert first.compute() == pytest.approx(whole.compute(), nan_ok=True)
    assert first.compute()["box_ap"] < 100


def test_nothing_evaluated_is_an_error(make_coco) -> None:
    _, task, _ = _data(make_coco)
    with pytest.raises(ValueError, match="no image was evaluated"):
        task.scores().compute()


def test_what_cannot_be_is_refused(make_coco) -> None:
    dataset, _, _ = _data(make_coco)
    with pytest.raises(ValueError, match="at least one category"):
        Detection(dataset.coco, ())
    with pytest.raises(ValueError, match="max_dets must be at least 1"):
        Detection(dataset.coco, dataset.categories, max_dets=0)


def test_packed_masks_give_the_same_loss(make_coco, one_thread) -> None:
    images, file, _ = make_coco()
    dataset = CocoDataset(images, file, transform=detection_evaluation_transform())
    task = Detection(dataset.coco, dataset.categories)
    detector = mask_rcnn("vmamba_nano", 2, channels=8, fc_channels=8, min_size=48, max_size=64).train()
    losses = []
    for part in (dataset, dataset.with_packed_masks()):
        torch.manual_seed(0)
        losses.append(task.training_loss(detector, collate_detection([part[0], part[1]])))
    assert torch.equal(*losses)


@pytest.mark.slow
def test_a_few_steps_learn_a_batch(make_coco, one_thread) -> None:
    """The same photos over and over: a detector that learns finds what is in them."""
    torch.manual_seed(0)
    dataset, task, _ = _data(make_coco)
    (batch,) = DataLoader(dataset, batch_size=3, collate_fn=collate_detection)
    small = {"dims": 16, "depths": (1, 1, 1, 1), "drop_path_rate": 0.0}
    sizes = {"channels": 16, "fc_channels": 32, "min_size": 48, "max_size": 64, "anchor_scale": 5}
    detector = mask_rcnn("vmamba_nano", 2, backbone_kwargs=small, **sizes)
    optimizer = torch.optim.AdamW(detector.parameters(), lr=3e-3, weight_decay=0.01)
    for _ in range(60):
        loss = task.training_loss(detector, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    scores = task.scores()
    with torch.inference_mode():
        scores.update(detector.eval(), batch)
    figures = scores.compute()
    assert figures["box_ap50"] > 60
    assert figures["mask_ap50"] > 60
