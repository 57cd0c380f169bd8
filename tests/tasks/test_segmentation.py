"""Loss and metrics of segmentation, against independent implementations."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vmamba import create_upernet
from vmamba.data.segmentation import IGNORED
from vmamba.tasks import Segmentation, SegmentationInference, SegmentationScores, class_accuracy, class_iou
from vmamba.tasks.segmentation import pixel_confusion, pixel_cross_entropy

torchmetrics = pytest.importorskip("torchmetrics", reason="needs torchmetrics: pip install 'vmamba[train]'")


class Given(nn.Module):
    """Gives the scores it was made with."""

    def __init__(self, scores):
        super().__init__()
        self.scores = scores

    def forward(self, images):
        return self.scores


def _random(classes: int, present: int, ignored: float, seed: int = 0, shape=(3, 17, 23)):
    """Scores that are right more often than not, and masks with only the first `present` classes and ignored pixels."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.randint(present, shape, generator=generator)
    scores = torch.randn(shape[0], classes, *shape[1:], generator=generator)
    scores.scatter_add_(1, masks[:, None], torch.full((shape[0], 1, *shape[1:]), 1.5))
    masks[torch.rand(shape, generator=generator) < ignored] = IGNORED
    return scores, masks


@pytest.mark.parametrize(
    ("classes", "present", "ignored"), [(4, 4, 0.0), (4, 4, 0.3), (9, 5, 0.3), (150, 20, 0.1), (3, 1, 0.99)]
)
def test_metrics_equal_torchmetrics(classes, present, ignored) -> None:
    scores, masks = _random(classes, present, ignored)
    ours = SegmentationScores(classes)
    for part in range(len(masks)):
        ours.update(Given(scores[part : part + 1]), (torch.zeros(1, 3, *masks.shape[1:]), masks[part : part + 1]))
    found = ours.compute()

    common = {"num_classes": classes, "ignore_index": IGNORED}
    predicted = scores.argmax(1)
    jaccard = torchmetrics.classification.MulticlassJaccardIndex(**common, average="macro")(predicted, masks)
    assert found["miou"] == pytest.approx(100 * float(jaccard), rel=1e-6)
    micro = torchmetrics.classification.MulticlassAccuracy(**common, average="micro")(predicted, masks)
    assert found["accuracy"] == pytest.approx(100 * float(micro), rel=1e-6)
    recall = torchmetrics.classification.MulticlassRecall(**common, average="none")(predicted, masks)
    labelled = torch.bincount(masks[masks != IGNORED], minlength=classes) > 0
    assert found["macc"] == pytest.approx(100 * float(recall[labelled].mean()), rel=1e-6)
    assert found["loss"] == pytest.approx(float(F.cross_entropy(scores, masks, ignore_index=IGNORED)), rel=1e-5)

    matrix = torchmetrics.classification.MulticlassConfusionMatrix(**common)(predicted, masks)
    assert torch.equal(ours.confusion(), matrix)
    by_class = ours.by_class()
    each = torchmetrics.classification.MulticlassJaccardIndex(**common, average="none")(predicted, masks)
    for label in range(classes):
        occurs = bool(matrix[label].sum() + matrix[:, label].sum())
        assert math.isnan(by_class[label]["iou"]) == (not occurs)
        if occurs:
            assert by_class[label]["iou"] == pytest.approx(100 * float(each[label]), rel=1e-5)
        assert by_class[label]["pixels"] == int((masks == label).sum())


def test_scores_of_several_processes_are_put_together() -> None:
    scores, masks = _random(6, 5, 0.2)
    together, first, second = SegmentationScores(6), SegmentationScores(6), SegmentationScores(6)
    for gathered, part in ((together, slice(0, 3)), (first, slice(0, 1)), (second, slice(1, 3))):
        gathered.update(Given(scores[part]), (torch.zeros(1, 3, *masks.shape[1:]), masks[part]))
    first.merge(second)
    assert torch.equal(first.confusion(), together.confusion())
    assert first.compute() == pytest.approx(together.compute())


def test_metrics_by_hand() -> None:
    masks = torch.tensor([[0, 0, 0, 1, IGNORED]])
    predicted = torch.tensor([[0, 0, 1, 3, 2]])
    confusion = pixel_confusion(masks, predicted, 5)
    expected = torch.tensor([2 / 3, 0, math.nan, 0, math.nan], dtype=torch.float64)
    torch.testing.assert_close(class_iou(confusion), expected, equal_nan=True)
    expected = torch.tensor([2 / 3, 0, math.nan, math.nan, math.nan], dtype=torch.float64)
    torch.testing.assert_close(class_accuracy(confusion), expected, equal_nan=True)


def test_nothing_to_evaluate() -> None:
    scores = SegmentationScores(3)
    with pytest.raises(ValueError, match="no labelled pixel"):
        scores.compute()
    scores.update(Given(torch.zeros(1, 3, 2, 2)), (torch.zeros(1, 3, 2, 2), torch.full((1, 2, 2), IGNORED)))
    with pytest.raises(ValueError, match="no labelled pixel"):
        scores.compute()


def test_loss_is_the_mean_over_labelled_pixels() -> None:
    scores, masks = _random(5, 5, 0.4)
    torch.testing.assert_close(pixel_cross_entropy(scores, masks), F.cross_entropy(scores, masks, ignore_index=IGNORED))
    scores.requires_grad_()
    loss = pixel_cross_entropy(scores, torch.full_like(masks, IGNORED))
    loss.backward()
    assert loss == 0
    assert (scores.grad == 0).all()


def test_weighted_loss_is_the_weighted_mean() -> None:
    scores, masks = _random(5, 5, 0.4)
    weights = torch.tensor([1.0, 2.0, 0.5, 10.0, 3.0])
    expected = F.cross_entropy(scores, masks, weights, ignore_index=IGNORED)
    torch.testing.assert_close(pixel_cross_entropy(scores, masks, weights), expected)
    assert pixel_cross_entropy(scores, torch.full_like(masks, IGNORED), weights) == 0
    batch = (torch.zeros(3, 3, 17, 23), masks)
    task = Segmentation(5, 0.0, class_weights=tuple(weights.tolist()))
    torch.testing.assert_close(task.training_loss(Given((scores, scores)), batch), expected)


def test_scores_of_another_size_are_resized() -> None:
    scores, masks = _random(5, 5, 0.4)
    small = F.avg_pool2d(scores, 4)
    resized = F.interpolate(small, masks.shape[1:], mode="bilinear", align_corners=False)
    torch.testing.assert_close(pixel_cross_entropy(small, masks), pixel_cross_entropy(resized, masks))


def test_auxiliary_loss_counts_with_its_weight() -> None:
    main, masks = _random(5, 5, 0.4)
    other, _ = _random(5, 5, 0.4, seed=1)
    batch = (torch.zeros(3, 3, 17, 23), masks)
    expected = pixel_cross_entropy(main, masks) + 0.4 * pixel_cross_entropy(other, masks)
    torch.testing.assert_close(Segmentation(5).training_loss(Given((main, other)), batch), expected)
    torch.testing.assert_close(Segmentation(5).training_loss(Given(main), batch), pixel_cross_entropy(main, masks))


def test_evaluation_is_at_the_size_of_the_masks() -> None:
    scores = SegmentationScores(4, SegmentationInference(size=(64, 48)))
    seen = []

    class Count(nn.Module):
        def forward(self, images):
            seen.append(tuple(images.shape[2:]))
            return torch.randn(1, 4, *images.shape[2:])

    scores.update(Count(), (torch.randn(1, 3, 30, 40), torch.randint(4, (1, 60, 80))))
    assert seen == [(48, 64)]
    assert scores.confusion().sum() == 60 * 80


def test_a_upernet_learns_a_picture_by_heart(one_thread) -> None:
    torch.manual_seed(0)
    model = create_upernet(
        "vmamba_nano", 3, channels=32, auxiliary_channels=16, dropout=0.0, dims=16, depths=(1, 1, 1, 1)
    )
    masks = torch.zeros(2, 64, 64, dtype=torch.int64)
    masks[0, 20:50, 10:40], masks[1, 5:30, 30:60], masks[:, :4] = 1, 2, IGNORED
    colours = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]])
    images = colours[masks.clamp(max=2)].permute(0, 3, 1, 2) + 0.1 * torch.randn(2, 3, 64, 64)
    task = Segmentation(3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = task.training_loss(model, (images, masks))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    scores = task.scores()
    with torch.inference_mode():
        scores.update(model.eval(), (images, masks))
    assert scores.compute()["miou"] > 90


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"classes": 1}, "at least two classes"),
        ({"classes": 3, "auxiliary_weight": -1.0}, "auxiliary_weight"),
        ({"classes": 3, "class_weights": (1.0, 2.0)}, "3 positive numbers"),
        ({"classes": 2, "class_weights": (1.0, 0.0)}, "2 positive numbers"),
    ],
)
def test_values_out_of_range(values, message) -> None:
    with pytest.raises(ValueError, match=message):
        Segmentation(**values)
