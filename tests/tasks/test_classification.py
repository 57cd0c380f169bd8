"""Classification: the loss and the scores, against figures worked out by hand or by scikit-learn."""

import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vmamba.data.loading import seed_generators
from vmamba.tasks import Classification, ClassificationScores, confusion_matrix, top_k_hits


class Given(nn.Module):
    """Returns the logits it was made with."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, images):
        return self.logits[: len(images)]


def test_top_k_hits():
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0], [4.0, 3.0, 2.0, 1.0], [0.0, 1.0, 2.0, 3.0]])
    labels = torch.tensor([1, 2, 0])
    assert [top_k_hits(logits, labels, k) for k in (1, 2, 3, 4, 9)] == [1, 1, 2, 3, 3]


def test_confusion_matrix_equals_scikit_learns():
    from sklearn.metrics import confusion_matrix as theirs

    generator = torch.Generator().manual_seed(0)
    labels, predicted = (torch.randint(7, (200,), generator=generator) for _ in range(2))
    ours = confusion_matrix(labels, predicted, 7)
    assert np.array_equal(ours.numpy(), theirs(labels, predicted, labels=range(7)))


def test_scores_do_not_depend_on_the_batches():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(50, 8, generator=generator), torch.randint(8, (50,), generator=generator)
    whole, parts = ClassificationScores(8), ClassificationScores(8)
    whole.update(Given(logits), (torch.zeros(50, 1), labels))
    for start in range(0, 50, 16):
        part = slice(start, start + 16)
        parts.update(Given(logits[part]), (torch.zeros(len(labels[part]), 1), labels[part]))
    metrics = whole.compute()
    assert metrics == pytest.approx(parts.compute())
    assert metrics["loss"] == pytest.approx(float(F.cross_entropy(logits, labels)))
    assert metrics["top1"] == pytest.approx(100 * float((logits.argmax(1) == labels).float().mean()))
    assert whole.confusion().sum() == 50
    assert torch.equal(whole.confusion(), parts.confusion())


def test_scores_of_nothing():
    with pytest.raises(ValueError, match="no image"):
        ClassificationScores(3).compute()


def test_plain_and_smoothed_loss():
    logits, labels = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 0.5]]), torch.tensor([0, 2])
    log_p = logits.log_softmax(1)
    plain = -(log_p[0, 0] + log_p[1, 2]) / 2
    batch = (torch.zeros(2, 3, 4, 4), labels)
    torch.testing.assert_close(Classification(3).training_loss(Given(logits), batch), plain)
    smoothed = 0.7 * plain + 0.3 * -log_p.mean()
    torch.testing.assert_close(Classification(3, label_smoothing=0.3).training_loss(Given(logits), batch), smoothed)


@pytest.mark.parametrize("alphas", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_mixing_changes_images_and_targets_and_not_the_batch(alphas):
    class Remember(nn.Module):
        def forward(self, images):
            self.images = images
            return logits

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, generator=generator)
    images, labels = torch.randn(4, 3, 32, 32, generator=generator), torch.tensor([0, 1, 2, 0])
    before = images.clone()
    task, model = Classification(3, **alphas), Remember()
    seed_generators(3)
    loss = task.training_loss(model, (images, labels))
    assert torch.equal(images, before)
    assert not torch.equal(model.images, images)
    # a mixed target is a mean of two one-hot ones, so the loss is a mean of the losses for the two orders
    ends = sorted(float(F.cross_entropy(logits, order)) for order in (labels, labels.flip(0)))
    assert ends[0] <= float(loss) <= ends[1]
    seed_generators(3)
    assert torch.equal(loss, task.training_loss(model, (images, labels)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"classes": 1}, "at least two classes"),
        ({"classes": 3, "label_smoothing": 1.0}, "label_smoothing"),
        ({"classes": 3, "mixup": -1.0}, "mixup"),
    ],
)
def test_values_out_of_range(values, message):
    with pytest.raises(ValueError, match=message):
        Classification(**values)


def test_scores_of_two_processes_are_those_of_one():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(23, 8, generator=generator), torch.randint(8, (23,), generator=generator)
    whole, *shares = (ClassificationScores(8) for _ in range(3))
    whole.update(Given(logits), (torch.zeros(23, 1), labels))
    for rank, share in enumerate(shares):
        part = slice(rank, None, 2)
        for start in range(0, len(labels[part]), 5):
            batch = slice(start, start + 5)
            some = labels[part][batch]
            share.update(Given(logits[part][batch]), (torch.zeros(len(some), 1), some))
    shares[0].merge(pickle.loads(pickle.dumps(shares[1])))
    assert shares[0].compute() == pytest.approx(whole.compute())
    assert torch.equal(shares[0].confusion(), whole.confusion())
