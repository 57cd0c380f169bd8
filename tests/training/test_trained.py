"""Trained models from files: the right one or a clear error."""

import sys

import pytest
import timm
import torch

from vmamba.models import save_checkpoint
from vmamba.training import evaluate_checkpoint, load_trained, newest_run, predict_files, train
from vmamba.training.checkpoints import checkpoint_file


@pytest.fixture
def run_dir(tiny_config, tmp_path):
    return train(tiny_config(schedule={"epochs": 1}), tmp_path / "runs" / "tiny").run_dir


def test_predictions_are_those_of_the_checkpoint(run_dir, photos):
    image = photos / "val" / "dog" / "1.png"
    result = predict_files(run_dir, [image, photos / "val" / "cat"], top_k=2)
    assert [path.name for path, _ in result.predictions] == ["1.png", "0.png", "1.png", "2.png", "3.png"]
    model, about = load_trained(run_dir)
    from vmamba.data import evaluation_transform, read_image

    with torch.inference_mode():
        shares = model(evaluation_transform(about.preprocessing)(read_image(image))[None]).softmax(1)[0]
    best = shares.topk(2)
    (name, share), (second, _) = result.predictions[0][1]
    assert (name, second) == tuple(about.classes[i] for i in best.indices)
    assert share == pytest.approx(float(best.values[0]), rel=1e-5)


def test_prediction_and_evaluation_need_no_extra(run_dir, photos, monkeypatch):
    for module in ("lightning", "lightning.pytorch", "matplotlib", "matplotlib.figure", "sklearn", "sklearn.datasets"):
        monkeypatch.setitem(sys.modules, module, None)
    assert predict_files(run_dir, [photos / "val" / "cat"]).predictions
    assert evaluate_checkpoint(run_dir).images == 12
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'vmamba\[train\]'"):
        predict_files(run_dir, [photos / "val" / "cat"], sheet="sheet.png")
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'vmamba\[train\]'"):
        evaluate_checkpoint(run_dir, data="digits")


def test_sheet_is_drawn(run_dir, photos, tmp_path):
    import numpy as np
    from PIL import Image

    predict_files(run_dir, [photos / "val" / "cat"], sheet=tmp_path / "sheet.png")
    pixels = np.asarray(Image.open(tmp_path / "sheet.png").convert("L"))
    # the photos are noise: if they are on the sheet, its grey values are many and common
    assert (np.unique(pixels, return_counts=True)[1] > 50).sum() > 100


def test_released_weights_with_a_model_name(photos, tmp_path):
    # a file in the official names, as the released ones are, of a model that needs no download
    torch.manual_seed(0)
    source = timm.create_model("vmamba_nano")
    save_checkpoint(source, tmp_path / "official.pth", official=True)
    model, about = load_trained(tmp_path / "official.pth", "vmamba_nano")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), source.parameters(), strict=True))
    assert about.classes == tuple(map(str, range(10)))
    assert predict_files(tmp_path / "official.pth", [photos / "val" / "cat"], model_name="vmamba_nano").predictions
    with pytest.raises(ValueError, match=r"official\.pth does not say which model it holds.*--model NAME"):
        load_trained(tmp_path / "official.pth")
    with pytest.raises(ValueError, match=r"official\.pth"):
        load_trained(tmp_path / "official.pth", "vmamba_micro")
    with pytest.raises(ValueError, match="name labelled images with --data"):
        evaluate_checkpoint(tmp_path / "official.pth", model_name="vmamba_nano")


def test_imagenet_models_know_imagenets_names(tmp_path):
    torch.save({"model": timm.create_model("vmamba_tiny_s1l8").state_dict()}, tmp_path / "tiny.pth")
    _, about = load_trained(tmp_path / "tiny.pth", "vmamba_tiny_s1l8")
    assert (about.classes[0], len(about.display_names)) == ("n01440764", 1000)
    assert "tench" in about.display_names[0]
    assert (about.preprocessing.image_size, about.preprocessing.crop_pct) == ((224, 224), 0.875)


def test_checkpoint_that_does_not_fit_its_model(run_dir):
    path = run_dir / "checkpoints" / "best.ckpt"
    contents = torch.load(path, weights_only=True)
    contents["vmamba"]["model_kwargs"]["dims"] = 16
    torch.save(contents, path)
    with pytest.raises(ValueError, match=r"best\.ckpt do not fit vmamba_nano"):
        load_trained(run_dir)


def test_checkpoint_of_another_format(run_dir):
    path = run_dir / "checkpoints" / "best.ckpt"
    contents = torch.load(path, weights_only=True)
    contents["vmamba"]["format"] = 99
    torch.save(contents, path)
    with pytest.raises(ValueError, match="checkpoint format 99"):
        load_trained(run_dir)


def test_damaged_and_foreign_files(run_dir, tmp_path):
    path = run_dir / "checkpoints" / "best.ckpt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"best\.ckpt is damaged or no checkpoint"):
        load_trained(run_dir)
    (tmp_path / "text.ckpt").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.ckpt is damaged or no checkpoint"):
        load_trained(tmp_path / "text.ckpt")
    torch.save([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(ValueError, match=r"list\.ckpt holds a list"):
        load_trained(tmp_path / "list.ckpt")


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"model": Evil()}, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match=r"evil\.ckpt is damaged or no checkpoint"):
        load_trained(tmp_path / "evil.ckpt")
    assert not (tmp_path / "ran").exists()


def test_what_is_not_there(run_dir, photos, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such run or checkpoint: nowhere"):
        checkpoint_file("nowhere")
    with pytest.raises(FileNotFoundError, match="is no run directory"):
        checkpoint_file(photos)
    with pytest.raises(FileNotFoundError, match="no trained run under"):
        newest_run(tmp_path / "nothing")
    assert newest_run(run_dir.parent) == run_dir
    with pytest.raises(FileNotFoundError, match=r"no such image: no\.png"):
        predict_files(run_dir, ["no.png"])
    with pytest.raises(ValueError, match="holds no images"):
        predict_files(run_dir, [photos])
    with pytest.raises(ValueError, match="cannot compute on device 'tpu9'"):
        predict_files(run_dir, [photos / "val" / "cat"], device="tpu9")


def test_unreadable_image_is_named(run_dir, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"cannot read the image .*bad\.jpg"):
        predict_files(run_dir, [tmp_path / "bad.jpg"])


def test_evaluation_on_other_images(run_dir, make_photos, photos):
    other = make_photos("other", {"dog": 3, "emu": 2})
    assert evaluate_checkpoint(run_dir, data=str(other)).images == 5
    # the folder it was trained on means the images held out there
    assert evaluate_checkpoint(run_dir, data=str(photos)).images == 12
    unknown = make_photos("unknown", {"yak": 1})
    with pytest.raises(ValueError, match="not trained on: yak"):
        evaluate_checkpoint(run_dir, data=str(unknown))
