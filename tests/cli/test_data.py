"""``vmamba data``: tables, files, exit status."""

import json
import re

import pytest
from PIL import Image

from vmamba.cli import main

QUICK = ["--set", "data.image_size=32", "--set", "data.batch_size=4", "--set", "run.device=cpu", "--seconds", "0.05"]


@pytest.fixture
def photos(make_photos, tmp_path, monkeypatch, one_thread):
    monkeypatch.chdir(tmp_path)
    return make_photos("photos", {"train/cat": 5, "train/dog": 5, "val/cat": 1, "val/dog": 1})


def fails(arguments, capsys, status=2):
    with pytest.raises(SystemExit) as stop:
        main(["data", *arguments])
    assert stop.value.code == status
    return capsys.readouterr()


def test_check_of_good_data(photos, capsys, tmp_path):
    main(["data", "check", "photos", "--json", "check.json"])
    out = capsys.readouterr().out
    assert "train: 10 images in 2 classes, 5 to 5 in each" in out
    assert "width x height in px: least 40 x 36" in out
    assert "every image is readable and the classes agree" in out
    assert json.loads((tmp_path / "check.json").read_text())["usable"] is True


def test_check_of_bad_data(photos, capsys, tmp_path):
    whole = (photos / "train/cat/2.png").read_bytes()
    (photos / "train/cat/2.png").write_bytes(whole[:200])
    out = fails(["check", "photos", "--json", "check.json"], capsys, status=1).out
    assert re.search(r"1 unreadable:\n    cannot read the image photos/train/cat/2\.png: .*truncated", out)
    assert "data.on_unreadable=skip" in out
    assert json.loads((tmp_path / "check.json").read_text())["usable"] is False


def test_check_of_masks(photos, capsys, tmp_path):
    for kind, mode in (("images", "RGB"), ("masks", "L")):
        (tmp_path / "street" / kind).mkdir(parents=True)
        for number in range(2):
            Image.new(mode, (24, 18)).save(tmp_path / "street" / kind / f"{number}.png")
    (tmp_path / "street" / "classes.txt").write_text("road\nsky\n")
    command = ["check", "street", "--task", "segmentation", "--json", "check.json"]
    main(["data", *command])
    assert "street: 2 classes, parts all\nnothing is wrong" in capsys.readouterr().out
    Image.new("L", (24, 18), 7).save(tmp_path / "street" / "masks" / "1.png")
    assert "  street/masks/1.png: holds the unknown label(s) 7" in fails(command, capsys, status=1).out
    report = json.loads((tmp_path / "check.json").read_text())
    assert (report["usable"], report["task"], report["classes"]) == (False, "segmentation", ["road", "sky"])
    assert [(finding["kind"], finding["file"]) for finding in report["findings"]] == [
        ("unknown label", "street/masks/1.png")
    ]


def test_check_of_objects(photos, make_coco, capsys, tmp_path):
    images, file, contents = make_coco()
    command = ["check", str(images), "--task", "detection", "--annotations", str(file), "--json", "check.json"]
    main(["data", *command])
    out = capsys.readouterr().out
    assert f"{file}: images 3, annotations 5, categories 2, with masks\nnothing is wrong" in out
    contents["annotations"][0]["bbox"] = [5, 6, 0, 24]
    file.write_text(json.dumps(contents))
    out = fails(command, capsys, status=1).out
    assert f"  {file}: annotation {contents['annotations'][0]['id']}: bbox [5, 6, 0, 24]" in out
    (finding,) = json.loads((tmp_path / "check.json").read_text())["findings"]
    assert (finding["kind"], finding["id"]) == ("degenerate box", contents["annotations"][0]["id"])


def test_bench_of_processes(photos, capsys, tmp_path):
    main(["data", "bench", "--data", "photos", "--workers", "0,1", *QUICK, "--needed", "1e9", "--json", "b.json"])
    out = capsys.readouterr().out
    assert re.search(r"photos: 10 training images, 32 px, batch 4; \d+ cores", out)
    assert len(re.findall(r"^ +[01] +[\d,]+  waits 100 % of the time$", out, re.MULTILINE)) == 2
    assert re.search(r"would starve: about [\d,]+ processes would do", out)
    report = json.loads((tmp_path / "b.json").read_text())
    assert [row["workers"] for row in report["rows"]] == [0, 1]
    assert all(row["images_per_second"] > 0 and row["keeps_busy"] is False for row in report["rows"])


def test_bench_of_memory(photos, capsys):
    main(["data", "bench", "--data", "photos", *QUICK, "--set", "data.in_memory=true", "--needed", "0.01"])
    out = capsys.readouterr().out
    assert "in memory, batches made on cpu" in out
    assert re.search(r"^ +memory +[\d,]+  never waits$", out, re.MULTILINE)
    assert "is kept busy" in out


def test_bench_compares_with_figures_of_models(photos, capsys, tmp_path):
    rows = [
        {"task": "training", "model": "a", "mode": "eager", "images_per_second": 300.0},
        {"task": "training", "model": "a", "mode": "compile", "images_per_second": 500.0},
        {"task": "inference", "model": "a", "mode": "eager", "images_per_second": 9000.0},
    ]
    (tmp_path / "bench.json").write_text(json.dumps({"rows": rows}))
    main(["data", "bench", "--data", "photos", *QUICK, "--workers", "0", "--needed", "bench.json"])
    assert "the GPU, at 500 images/s," in capsys.readouterr().out
    rows.append({"task": "training", "model": "b", "mode": "eager", "images_per_second": 100.0})
    (tmp_path / "bench.json").write_text(json.dumps({"rows": rows}))
    error = fails(["bench", "--data", "photos", *QUICK, "--needed", "bench.json"], capsys).err
    assert "holds no training speed of vmamba_micro; it holds a, b" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "nowhere"], "no such data folder: nowhere"),
        (["check", "photos", "--json", "nowhere/x.json"], "there is no directory nowhere"),
        (["check", "photos", "--task", "segmentation"], "is no segmentation data set"),
        (["check", "photos", "--task", "detection"], "photos is no detection data set"),
        (["check", "photos", "--annotations", "train.json"], "--annotations goes with --task detection"),
        (["bench", "--data", "photos", "--workers", "many"], "--workers takes numbers such as 0,4,8, not 'many'"),
        (["bench", "--data", "photos", "--workers", "-1"], "must not be negative"),
        (["bench", "--data", "photos", "--needed", "fast"], "--needed takes a number or a file"),
        (["bench", "--data", "photos", "--needed", "0"], "--needed must be positive"),
        (["bench", "--data", "photos", "--seconds", "0"], "--seconds must be positive"),
        (["bench", "--data", "photos", "--set", "data.wrokers=1"], "did you mean 'data.workers'"),
        (["bench", "--data", "photos", "--set", "data.in_memory=true", "--workers", "1"], "is of no use with"),
        (["bench", "--data", "photos", "--needed", "photos/train/cat/0.png"], "holds no figures of"),
    ],
)
def test_mistakes_are_one_line(photos, capsys, arguments, message):
    captured = fails(arguments, capsys)
    assert captured.err.startswith("vmamba data: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
