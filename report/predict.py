"""The predictions of every trained model for the user's own image files."""

import itertools
from collections.abc import Iterable
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from engine.checkpoints import load_finished
from engine.console import log
from engine.errors import UserError
from engine.files import write_durably
from engine.fingerprints import check_teacher
from engine.inference import predict
from engine.models import load_model
from engine.settings import Config, Model
from engine.sources import find_images, open_image
from report.markdown import escape_markdown, markdown_table, percent
from report.write import as_csv


def predict_files(paths: list[str], config: Config, csv: str | None = None) -> list[str]:
    """A table for each image file, also of folders: the class and the probabilities (%) by every trained model.

    `csv` is a file to write: a line for each image file, with each model's class and its probability.
    Classes and image size are those of the checkpoints. At most 20 classes are shown, the likeliest under any model.
    Empty if no model is trained. What cannot be read in a folder is left out, with a line in the log. Raises UserError
    for a file of `paths` that cannot be read, and for a checkpoint that is not the model of its name or was distilled
    from a teacher that has been retrained since.
    """
    files = [file for path in paths for file in find_images(path)]
    resized: dict[tuple[int, str], torch.Tensor] = {}  # the images by size and resize (files, 3, size, size)
    predicted: dict[Model, list[dict[str, float]]] = {}  # model -> for each file the probability of each class
    recipes = config.selected()
    for model in sorted(config.models(), key=lambda model: recipes.index(model.name)):
        checkpoint = load_finished(model.path)
        if not checkpoint:
            log.info(f"not trained yet, skipped: {model.path}")
            continue
        if checkpoint.given_logits is not None:
            log.info(f"{model}  is only logits of the data set's images, skipped")
            continue
        check_teacher(model, checkpoint)
        network, size = load_model(checkpoint, config.device), checkpoint.config["image_size"]
        view = size, checkpoint.config["resize"]
        if view not in resized:
            resized[view] = read(files, view, config.largest_image, named=[*map(Path, paths)])
        logits = predict(network, resized[view], size, config.precision, title=f"{model} image files")
        rows = torch.softmax(logits, 1).tolist()
        predicted[model] = [dict(zip(checkpoint.classes, row, strict=True)) for row in rows]
    if not predicted:
        return []
    if csv:
        head = [f"{model.name}/seed{model.seed}{what}" for model in predicted for what in ("", "/probability")]
        lines = [["file", *head]]
        for file, *of_models in zip(files, *predicted.values(), strict=True):
            likeliest = [max(p.items(), key=lambda entry: entry[1]) for p in of_models]
            lines.append([str(file), *(cell for name, p in likeliest for cell in (name, f"{p:.4f}"))])
        write_durably(Path(csv), as_csv(lines))
        log.info(f"written: {csv}")
    return [table(file, predicted, p) for file, *p in zip(files, *predicted.values(), strict=True)]


def read(files: list[Path], view: tuple[int, str], megapixels: float, named: list[Path]) -> torch.Tensor:
    """(files, 3, size, size) uint8. Those that cannot be read are removed from `files`, unless they are `named`."""
    size, how = view
    images = []
    for file in list(files):
        try:
            image = open_image(file, megapixels, how).resize((size, size), Image.Resampling.BILINEAR)
            images.append(pil_to_tensor(image))
        except UserError as error:
            if file in named:
                raise
            log.info(f"left out: {error}")
            files.remove(file)
    if not images:
        raise UserError(f"{' and '.join(map(str, named))}: no image can be read")
    return torch.stack(images)


def table(file: Path, models: Iterable[Model], predicted: list[dict[str, float]]) -> str:
    """The class that each model predicts, and below it the probability of each class."""
    classes = dict.fromkeys(itertools.chain(*predicted))
    likeliest = sorted(classes, key=lambda c: max(p.get(c, 0.0) for p in predicted), reverse=True)[:20]
    rows = [["**class**", *(f"**{escape_markdown(max(p, key=p.__getitem__))}**" for p in predicted)]]
    rows += [[escape_markdown(c), *(percent(p.get(c)) for p in predicted)] for c in classes if c in likeliest]
    return markdown_table([escape_markdown(file), *models], rows)
