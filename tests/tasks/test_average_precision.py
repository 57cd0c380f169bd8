"""Average precision: equal to pycocotools' on the same files, and what it is by hand."""

from __future__ import annotations

import copy
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from vmamba.data import Category, coco_categories, decode_segmentation, read_coco
from vmamba.tasks import average_precision, box_results, mask_results, read_results, write_results
from vmamba.tasks.average_precision import _runs_everywhere, _runs_in_parts

pytest.importorskip("faster_coco_eval", reason="average precision needs faster-coco-eval: pip install 'vmamba[det]'")

FIGURES = ("ap", "ap50", "ap75", "small", "medium", "large")


def _imperfect_results(file: Path, seed: int = 0) -> tuple[list[dict], list[dict]]:
    """Every object of a file found some way off, some missed, some of another class, and things that are not there."""
    coco = read_coco(file)
    generator = np.random.default_rng(seed)
    sizes = {entry["id"]: (entry["height"], entry["width"]) for entry in coco.images}
    boxes, masks = [], []
    categories = [category.id for category in coco.categories]
    for entry in coco.annotations:
        if generator.random() < 0.1:
            continue
        shift = generator.integers(-4, 5, 2)
        size = sizes[entry["image_id"]]
        mask = np.roll(decode_segmentation(entry["segmentation"], size).numpy(), shift, axis=(0, 1))
        x, y, w, h = entry["bbox"]
        grow = generator.normal(1, 0.1, 2)
        box = [float(value) for value in (x + shift[1], y + shift[0], w * grow[0], h * grow[1])]
        category = entry["category_id"] if generator.random() < 0.8 else int(generator.choice(categories))
        for _ in range(generator.integers(1, 3)):
            boxes.append(
                {"image_id": entry["image_id"], "category_id": category, "score": generator.random(), "bbox": box}
            )
            found = {
                "labels": torch.tensor([categories.index(category) + 1]),
                "scores": torch.tensor([generator.random()]),
                "masks": torch.from_numpy(mask.copy())[None, None],
            }
            masks += mask_results(found, entry["image_id"], coco.categories)
    return boxes, masks


def _pycocotools(file: Path, results: Path, iou_type: str, max_dets: int) -> np.ndarray:
    """pycocotools' precision (thresholds, recalls, categories, areas) at `max_dets`."""
    pycocotools = pytest.importorskip("pycocotools.coco", reason="compares with pycocotools, which is not installed")
    from pycocotools.cocoeval import COCOeval

    truth = pycocotools.COCO(str(file))
    evaluation = COCOeval(truth, truth.loadRes(str(results)), iou_type)
    evaluation.params.maxDets = [1, 10, max_dets]
    evaluation.evaluate()
    evaluation.accumulate()
    if max_dets == 100:
        evaluation.summarize()
        return evaluation.stats[:6]
    precision = evaluation.eval["precision"][..., -1]
    parts = (precision[..., 0], precision[0, ..., 0], precision[5, ..., 0], *(precision[..., i] for i in (1, 2, 3)))
    return np.array([part[part > -1].mean() if (part > -1).any() else -1 for part in parts])


@pytest.mark.parametrize("max_dets", [100, 5])
def test_equals_pycocotools_on_a_small_file(make_coco, tmp_path, max_dets) -> None:
    _, file, _ = make_coco()
    _compare(file, tmp_path, max_dets)


@pytest.mark.parametrize(
    ("pack", "max_dets", "every"), [("coco_mini", 100, 1), ("coco_mini", 10, 2), ("nuclei_dsb2018", 500, 12)]
)
def test_equals_pycocotools_on_real_annotations(shared, tmp_path, pack, max_dets, every) -> None:
    with zipfile.ZipFile(shared / "data" / pack / f"{pack}.zip") as archive:
        contents = json.loads(archive.read("annotations/instances_val.json"))
    contents["images"] = contents["images"][::every]
    kept = {entry["id"] for entry in contents["images"]}
    contents["annotations"] = [entry for entry in contents["annotations"] if entry["image_id"] in kept]
    (tmp_path / "truth.json").write_text(json.dumps(contents))
    figures = _compare(tmp_path / "truth.json", tmp_path, max_dets)
    assert all(5 < figure < 95 for figure in figures[:3])  # neither nothing nor everything is found


def _compare(file: Path, folder: Path, max_dets: int) -> list[float]:
    compared = []
    for kind, iou_type, results in zip(("box", "mask"), ("bbox", "segm"), _imperfect_results(file), strict=True):
        write_results(results, folder / f"{kind}.json")
        ours = average_precision(file, folder / f"{kind}.json", kind, max_dets=max_dets)
        theirs = _pycocotools(file, folder / f"{kind}.json", iou_type, max_dets)
        for name, value in zip(FIGURES, theirs, strict=True):
            mine = getattr(ours, name)
            if value == -1:
                assert np.isnan(mine), name
            else:
                assert mine == pytest.approx(100 * value, abs=1e-9), (kind, name)
        compared += [ours.ap, ours.ap50]
    return compared


def _perfect(file: Path) -> list[dict]:
    coco = read_coco(file)
    return [
        {name: entry[name] for name in ("image_id", "category_id", "bbox")} | {"score": 0.5}
        for entry in coco.annotations
        if not entry["iscrowd"]
    ]


def test_everything_found_is_100_percent(make_coco) -> None:
    _, file, _ = make_coco()
    figures = average_precision(file, _perfect(file))
    assert figures.ap == figures.ap50 == figures.ap75 == pytest.approx(100)
    assert figures.by_category == pytest.approx({"box": 100, "tri": 100})
    assert np.isnan(figures.large)  # there is none
    assert average_precision(file, []).ap == 0


def test_a_crowd_counts_neither_way(make_coco) -> None:
    _, file, _ = make_coco()
    inside_the_crowd = {"image_id": 30, "category_id": 3, "bbox": [32, 41, 10, 6], "score": 0.9}
    elsewhere = inside_the_crowd | {"bbox": [40, 10, 10, 6]}
    assert average_precision(file, [*_perfect(file), inside_the_crowd]).ap == pytest.approx(100)
    assert average_precision(file, [*_perfect(file), elsewhere]).ap < 99


def test_only_the_images_that_were_looked_at_count(make_coco) -> None:
    _, file, _ = make_coco()
    of_one = [entry for entry in _perfect(file) if entry["image_id"] == 7]
    assert average_precision(file, of_one).ap == pytest.approx(50, abs=1)
    assert average_precision(file, of_one, image_ids=[7, 31]).ap == pytest.approx(100)
    with pytest.raises(ValueError, match="a result for image 7, which is not among"):
        average_precision(file, of_one, image_ids=[30])


def test_only_the_listed_categories_count(make_coco) -> None:
    _, file, _ = make_coco()
    of_boxes = [entry for entry in _perfect(file) if entry["category_id"] == 3]
    figures = average_precision(file, of_boxes, categories=[Category(3, "box"), Category(8, "none")])
    assert figures.ap == pytest.approx(100)
    assert np.isnan(figures.by_category["none"])
    with pytest.raises(ValueError, match="a result of category 90"):
        average_precision(file, _perfect(file), categories=[Category(3, "box")])


def test_files_without_areas_and_with_id_0_are_evaluated(make_coco) -> None:
    _, file, contents = make_coco()
    bare = copy.deepcopy(contents)
    for number, entry in enumerate(bare["annotations"]):
        del entry["area"]
        entry["id"] = number
    results = [entry | {"bbox": [b + 1 for b in entry["bbox"]]} for entry in _perfect(file)]
    wanted = average_precision(file, results)
    file.write_text(json.dumps(bare))
    figures = average_precision(file, results)
    assert figures.as_dict("box") == pytest.approx(wanted.as_dict("box"), nan_ok=True)
    assert 0 < figures.ap < 100


def test_annotations_that_cannot_be_evaluated_are_left_out(make_coco) -> None:
    _, file, contents = make_coco()
    masks = _imperfect_results(file)[1]
    wanted = average_precision(file, masks, "mask")
    first = contents["annotations"][0]
    broken = ({"bbox": [1]}, {"image_id": 99}, {"category_id": 99}, {"segmentation": [[1, 2]]})
    contents["annotations"] += [first | change for change in broken]
    file.write_text(json.dumps(contents))
    assert average_precision(file, masks, "mask").as_dict("m") == pytest.approx(wanted.as_dict("m"), nan_ok=True)
    del contents["images"][0]["width"]
    file.write_text(json.dumps(contents))
    with pytest.raises(ValueError, match=r"annotations\.json: image 7 has no height and width"):
        average_precision(file, masks, "mask")


def test_detections_become_results(make_coco, tmp_path) -> None:
    masks = torch.zeros(2, 1, 6, 8, dtype=torch.bool)
    masks[0, 0, 1:3, 2:5] = True
    found = {
        "boxes": torch.tensor([[2.0, 1.0, 5.0, 3.0], [0.0, 0.0, 8.0, 6.0]]),
        "labels": torch.tensor([1, 80]),
        "scores": torch.tensor([0.75, 0.5]),
        "masks": masks,
    }
    boxes = box_results(found, 139, coco_categories())
    assert boxes[0] == {"image_id": 139, "category_id": 1, "score": 0.75, "bbox": [2, 1, 3, 2]}
    assert boxes[1]["category_id"] == 90
    runs = mask_results(found, 139, coco_categories())
    assert "bbox" not in runs[0]
    assert torch.equal(decode_segmentation(runs[0]["segmentation"], (6, 8)), masks[0, 0])
    write_results(runs, tmp_path / "r.json")
    assert read_results(tmp_path / "r.json") == runs


def test_mistakes_are_named(make_coco, tmp_path) -> None:
    _, file, _ = make_coco()
    with pytest.raises(ValueError, match="kind must be one of"):
        average_precision(file, [], "keypoints")
    with pytest.raises(ValueError, match="max_dets must be at least 1"):
        average_precision(file, [], max_dets=0)
    with pytest.raises(ValueError, match="a result without segmentation"):
        average_precision(file, _perfect(file), "mask")
    with pytest.raises(FileNotFoundError, match=r"no result file .*none\.json"):
        average_precision(file, tmp_path / "none.json")
    (tmp_path / "r.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"r\.json is no result file of COCO"):
        average_precision(file, tmp_path / "r.json")


def _masks_of_all_kinds(size: tuple[int, int]) -> torch.Tensor:
    """(N, 1, H, W) bool: nothing, everything, noise, and parts that touch the image's sides."""
    generator = torch.Generator().manual_seed(0)
    masks = [torch.zeros(size, dtype=torch.bool), torch.ones(size, dtype=torch.bool)]
    for share in (0.05, 0.5, 0.95):
        masks.append(torch.rand(size, generator=generator) < share)
        patch = torch.zeros(size, dtype=torch.bool)
        patch[size[0] // 3 :, size[1] // 2 :] = True  # to the bottom, but not from the top
        masks += [patch, patch.flip(0), patch & masks[2]]
    return torch.stack([*masks, masks[0]])[:, None]


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (7, 5), (40, 64)])
@pytest.mark.parametrize("runs_of", [_runs_in_parts, _runs_everywhere])
def test_masks_are_encoded_as_by_cocos_own_encoder(size, runs_of, monkeypatch) -> None:
    library = pytest.importorskip("faster_coco_eval.core.mask")
    monkeypatch.setitem(mask_results.__globals__, "_runs_in_parts", runs_of)
    monkeypatch.setitem(mask_results.__globals__, "_PIXELS_TOGETHER", 4 * size[0] * size[1])
    masks = _masks_of_all_kinds(size)
    count = len(masks)
    found = {"masks": masks, "labels": torch.ones(count, dtype=torch.int64), "scores": torch.rand(count)}
    results = mask_results(found, 3, (Category(1, "thing"),))
    for mask, result in zip(masks[:, 0], results, strict=True):
        wanted = library.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
        assert result["segmentation"] == {"size": list(size), "counts": wanted["counts"].decode()}
    nothing = {"masks": masks[:0], "labels": torch.ones(0, dtype=torch.int64), "scores": torch.rand(0)}
    assert mask_results(nothing, 3, (Category(1, "thing"),)) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_masks_on_a_gpu_are_encoded_as_on_the_cpu() -> None:
    masks = _masks_of_all_kinds((40, 64))
    found = {"labels": torch.ones(len(masks), dtype=torch.int64), "scores": torch.rand(len(masks))}
    here, there = (mask_results(found | {"masks": part}, 3, (Category(1, "thing"),)) for part in (masks, masks.cuda()))
    assert here == there
