"""Our backbones inside the segmentation networks of other libraries."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from vmamba import list_models, load_checkpoint, save_checkpoint
from vmamba.data.segmentation import IGNORED
from vmamba.tasks import Segmentation, SegmentationInference, segment

# What the libraries do with their own dependencies while they are imported
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

DECODERS = {
    **{name: {} for name in ("Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "UPerNet", "Segformer")},
    "DPT": {"decoder_readout": "ignore"},
}
DILATED = ("PAN", "DeepLabV3", "DeepLabV3Plus")
SMALL_UPERNET = {"hidden_size": 32, "auxiliary_channels": 16, "auxiliary_in_channels": 128}
SMALL_MASK2FORMER = {
    **dict.fromkeys(("feature_size", "mask_feature_size", "hidden_dim"), 32),
    **dict.fromkeys(("encoder_feedforward_dim", "dim_feedforward"), 64),
    "encoder_layers": 1,
    "decoder_layers": 2,
    "num_attention_heads": 4,
    "num_queries": 10,
}


@pytest.fixture(scope="module")
def smp():
    return pytest.importorskip(
        "segmentation_models_pytorch", reason="needs segmentation-models-pytorch: pip install 'vmamba[smp]'"
    )


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="needs transformers: pip install 'vmamba[hf]'")


@pytest.fixture
def classifier(tmp_path):
    """A classifier and the file of its weights."""
    model = timm.create_model("vmamba_nano").eval()
    save_checkpoint(model, tmp_path / "classifier.pth", official=True)
    return model, tmp_path / "classifier.pth"


@pytest.fixture
def batch():
    masks = torch.randint(5, (2, 64, 96))
    masks[:, :3] = IGNORED
    return torch.randn(2, 3, 64, 96), masks


def _silent(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize("decoder", DECODERS)
def test_every_decoder_that_needs_no_dilation_takes_our_encoders(smp, decoder, batch) -> None:
    options = {"encoder_name": "tu-vmamba_nano", "encoder_weights": None, "classes": 5, **DECODERS[decoder]}
    model = getattr(smp, decoder)(**options)
    Segmentation(5).training_loss(model, batch).backward()
    # DPT takes the whole network for an encoder, its classifier included
    assert [name for name in _silent(model.encoder) if not name.startswith("model.head.")] == []
    with torch.inference_mode():
        labels = segment(model.eval(), batch[0][..., :50, :77], SegmentationInference(multiple=32))
    assert labels.shape == (2, 50, 77)


@pytest.mark.parametrize("decoder", DILATED)
def test_decoders_that_need_dilation_say_what_to_do(smp, decoder) -> None:
    with pytest.raises(ValueError, match="output_stride must be 32, got (8|16): the grids"):
        getattr(smp, decoder)(encoder_name="tu-vmamba_nano", encoder_weights=None)


def test_an_encoder_of_smp_gives_our_features_and_takes_our_files(smp, classifier) -> None:
    original, path = classifier
    model = smp.Unet("tu-vmamba_nano", encoder_weights=None, classes=5).eval()
    load_checkpoint(model.encoder.model, path, new_head=True)
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        theirs, ours = model.encoder(image), original.forward_intermediates(image, intermediates_only=True)
    assert [tuple(f.shape[1:]) for f in theirs[:2]] == [(3, 64, 96), (0, 32, 48)]  # the image, and nothing at stride 2
    for a, b in zip(theirs[2:], ours, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", list_models())
def test_every_backbone_is_an_encoder_of_smp(smp, name) -> None:
    with torch.device("meta"):
        model = smp.Unet(f"tu-{name}", encoder_weights=None)
    assert (
        model.encoder.out_channels[2:]
        == timm.create_model(name, features_only=True, device="meta").feature_info.channels()
    )


def test_smp_passes_options_to_our_encoders(smp) -> None:
    model = smp.Unet("tu-vmamba_nano", encoder_weights=None, in_channels=4, out_norm=True, drop_path_rate=0.3)
    assert set(model.encoder.model.out_norms) == {"0", "1", "2", "3"}
    assert model(torch.randn(2, 4, 64, 64)).shape == (2, 1, 64, 64)


def _backbone_config(transformers):
    return transformers.TimmBackboneConfig(backbone="vmamba_nano", out_indices=[0, 1, 2, 3])


def test_upernet_of_transformers(transformers, classifier, batch, tmp_path) -> None:
    config = transformers.UperNetConfig(
        backbone_config=_backbone_config(transformers), num_labels=5, loss_ignore_index=IGNORED, **SMALL_UPERNET
    )
    model = transformers.UperNetForSemanticSegmentation(config)
    original, path = classifier
    load_checkpoint(model.backbone._backbone, path, new_head=True)
    with torch.no_grad():
        theirs = model.backbone.eval()(batch[0]).feature_maps
    for a, b in zip(theirs, original.forward_intermediates(batch[0], intermediates_only=True), strict=True):
        assert torch.equal(a, b)

    found = model.train()(pixel_values=batch[0], labels=batch[1])
    found.loss.backward()
    assert found.logits.shape == (2, 5, 64, 96)
    assert _silent(model.backbone) == []
    model.save_pretrained(tmp_path / "saved")
    again = transformers.UperNetForSemanticSegmentation.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again.eval()(batch[0]).logits, model.eval()(batch[0]).logits)


def test_mask2former_of_transformers(transformers, batch, tmp_path) -> None:
    config = transformers.Mask2FormerConfig(
        backbone_config=_backbone_config(transformers), num_labels=5, **SMALL_MASK2FORMER
    )
    model = transformers.Mask2FormerForUniversalSegmentation(config)
    images, masks = batch
    present = [mask[mask != IGNORED].unique() for mask in masks]
    one_each = [(mask == labels[:, None, None]).float() for mask, labels in zip(masks, present, strict=True)]
    found = model(pixel_values=images, mask_labels=one_each, class_labels=present)
    found.loss.backward()
    assert _silent(model.model.pixel_level_module.encoder) == []
    assert found.class_queries_logits.shape == (2, 10, 6)
    processor = transformers.Mask2FormerImageProcessor(ignore_index=IGNORED)
    labels = processor.post_process_semantic_segmentation(found, target_sizes=[(50, 70), (64, 96)])
    assert [tuple(each.shape) for each in labels] == [(50, 70), (64, 96)]
    model.save_pretrained(tmp_path / "saved")
    again = transformers.Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        found, expected = again.eval()(images), model.eval()(images)
    assert torch.equal(found.class_queries_logits, expected.class_queries_logits)
