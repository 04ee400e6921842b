"""An engineer's day: a folder of photographs as people keep them, a service that teaches, and a file for a product.

The file is run by the lines of docs/usage.md, in a process that cannot import this repository.
"""

import csv
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, flags, override
from PIL import Image, features

import evaluate
import teacher_student_model

CLASSES = ("boat", "cup", "\u732b")  # a cat, in Japanese
COLOURS = {"boat": (30, 60, 200), "cup": (200, 60, 30), "\u732b": (60, 180, 60)}
EXIF_ORIENTATION = 0x0112


def photograph(random: np.random.Generator, name: str, size: tuple[int, int]) -> Image.Image:
    """Noise about the colour of a class, darker towards the bottom and the right, so that how it lies matters."""
    x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    pixels = np.array(COLOURS[name]) * (1 - 0.4 * x - 0.4 * y)[..., None] + random.normal(0, 25, (*x.shape, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def save_as_people_do(image: Image.Image, path: Path, kind: int) -> None:
    """One of many formats and modes."""
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6  # lies on its side
    transparent = image.copy()
    transparent.putalpha(Image.linear_gradient("L").resize(image.size))
    ways = [
        lambda: image.save(path.with_suffix(".JPG"), quality=90),
        lambda: image.save(path.with_suffix(".jpeg"), exif=exif),
        lambda: transparent.save(path.with_suffix(".png")),
        lambda: image.convert("L").save(path.with_suffix(".jpg")),
        lambda: image.convert("CMYK").save(path.with_suffix(".jpg")),
        lambda: image.quantize(16).save(path.with_suffix(".gif"), save_all=True, append_images=[image.rotate(180)]),
        lambda: image.save(path.with_suffix(".tiff")),
        lambda: image.save(path.with_suffix(".webp" if features.check("webp") else ".bmp")),
    ]
    ways[kind % len(ways)]()


@pytest.fixture
def photographs(tmp_path) -> Path:
    """42 training, 12 validation and 25 test images that can be read, and what else lies in such a folder."""
    random, root = np.random.default_rng(0), tmp_path / "photos"
    counts = {"Training": (20, 12, 10), "Validation": (4, 4, 4), "Testing": (8, 8, 8)}
    for split, of_class in counts.items():
        for name, count in zip(CLASSES, of_class, strict=True):
            for i in range(count):
                folder = root / split / name / ("2024/summer", "phone", "")[i % 3]
                folder.mkdir(parents=True, exist_ok=True)
                size = ((60, 40), (40, 60), (33, 33), (64, 21))[random.integers(4)]
                save_as_people_do(photograph(random, name, size), folder / f"IMG_{i:03}", i)
    first = sorted((root / "Training/boat").glob("*.*"))[0]
    (root / "Testing/boat" / f"copy{first.suffix}").write_bytes(first.read_bytes())
    (root / "Training/cup/phone/broken.jpg").write_bytes(first.read_bytes()[:300])
    (root / "Testing/cup/empty.png").touch()
    Image.new("1", (9_600, 10_000), 1).save(root / "Training/cup/scan.png")  # 96 megapixels
    for waste in ("Training/Thumbs.db", "Training/cup/notes.txt", "Training/.DS_Store", "raw/1.CR2"):
        (root / waste).parent.mkdir(exist_ok=True)
        (root / waste).write_bytes(b"waste")
    return root


def a_service(root: Path, path: Path) -> None:
    """Its logits for the training images, by their names, of more classes than ours and in another order."""
    training = root / "Training"
    names = [file.relative_to(root).as_posix() for file in (*training.rglob("IMG_*"), *training.rglob("scan.png"))]
    columns = {"\u732b": 0, "boat": 2, "cup": 3}
    logits = 0.1 * np.random.default_rng(1).normal(size=(len(names), 5))
    for row, name in zip(logits, names, strict=True):
        row[columns[name.split("/")[1]]] += 4
    np.savez(path, train=logits.astype(np.float32), train_names=names)


def product(model: Path, files: list[str]) -> list[str]:
    """The class of each image file by the program in docs/usage.md, in a process that cannot import this repository."""
    usage = (ROOT / "docs/usage.md").read_text()
    program = textwrap.dedent(re.search(r"^    import json\n.*?print\(.*?\n", usage, re.DOTALL | re.MULTILINE)[0])
    load, start, classify = program.replace("student_kd.onnx", str(model)).partition("image = ")
    code = f"{load}import sys\nfor file in sys.argv[1:]:\n" + textwrap.indent(start + classify, "    ")
    command = [sys.executable, "-P", "-c", code.replace('"cat.png"', "file"), *files]
    run = subprocess.run(command, cwd=model.parent, capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def test_from_a_folder_of_photographs_to_a_product(photographs, tmp_path, capsys):
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    service = tmp_path / "service.npz"
    a_service(photographs, service)
    words = override(
        flags(tmp_path),
        *("--dataset", str(photographs), "--run", "photos", "--only", "teacher", "student", "student_kd"),
        *("--teacher.weights", str(service), "--teacher.epochs", "0"),
        *("--teacher.class_names", "\u732b", "dog", "boat", "cup", "horse", "--train_size", "none", "--epochs", "3"),
        *("--image_size", "24", "--resize", "crop", "--largest_image", "100", "--batch_size", "8"),
        *("--horizontal_flip", "0.5", "--mean", "0.5", "0.5", "0.5", "--std", "0.25", "0.25", "0.25"),
        *("--keep", "best", "--class_weights", "balanced", "--clip_norm", "5"),
    )

    with pytest.raises(SystemExit) as stopped:
        teacher_student_model.main(words)
    message = capsys.readouterr().err
    assert stopped.value.code == 2
    assert "broken.jpg" in message
    assert "empty.png" in message
    assert "--skip_unreadable" in message

    words += ["--skip_unreadable"]
    teacher_student_model.main(words)
    log = capsys.readouterr().err
    assert "43 training, 12 validation and 25 test images" in log
    assert "raw/" in log
    assert "Thumbs.db" in log
    assert "1 of 25 test images" in log

    (photographs / "Training").rename(tmp_path / "archived")
    evaluate.main(words)
    folder = tmp_path / "imgs/photos"
    assert "empty.png" in (folder / "results.md").read_text()
    results = json.loads((folder / "results.json").read_text())
    assert list(results["models"]["student"]["per_class"]) == list(CLASSES)
    with open(folder / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 25
    right = np.mean([row["label"] == row["student_kd/seed0"] for row in rows])
    assert right == pytest.approx(results["models"]["student_kd"]["accuracy"]["mean"])
    assert right > 0.6
    with open(folder / "history.csv", newline="") as file:
        epochs = [(row["model"], row["epoch"]) for row in csv.DictReader(file)]
    assert epochs == [(name, epoch) for name in ("student", "student_kd") for epoch in "123"]

    evaluate.main([*words, "--predict", str(photographs / "Testing"), "--csv", str(tmp_path / "ours.csv")])
    with open(tmp_path / "ours.csv", newline="") as file:
        ours = {row["file"]: row["student_kd/seed0"] for row in csv.DictReader(file)}
    assert len(ours) == 25
    assert len(set(ours.values())) > 1

    evaluate.main([*override(words, "--only", "student_kd"), "--export", "onnx"])
    assert product(tmp_path / "checkpoints/photos/seed0/student_kd.onnx", list(ours)) == list(ours.values())
