"""Evaluate the trained models: accuracy, significance of the differences, calibration, fidelity and cost.

    python evaluate.py                          # the default run, cifar10
    python evaluate.py --run NAME               # every model in checkpoints/NAME, with the settings that it records
    python evaluate.py --run NAME --predict IMAGE ...   # instead: each model's prediction for your own images
    python evaluate.py --run NAME --export      # instead: checkpoints/RUN/seedS/MODEL.pt2, which needs only PyTorch
    python evaluate.py --run NAME --export onnx

Writes imgs/RUN/results.md and its figures, results.json (every number) and predictions.npz (the logits behind them),
and prints the table. Three layers: logits from checkpoints; metrics, functions of arrays; figures and text from them.
"""

if __name__ == "__main__":  # before the imports, which take seconds
    import os
    import signal
    import sys

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends them without a traceback
    sys.path.insert(0, os.path.dirname(__file__))  # which python -P leaves out
    os.environ.pop("MPLBACKEND", None)  # figures are files; a backend of another version would be an error

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from engine.checkpoints import Checkpoint, load_finished, load_logits
from engine.console import log, print_result
from engine.datasets import Dataset, load_dataset
from engine.distributed import on_rank0, rank, world_size
from engine.errors import UserError
from engine.files import lock, write_durably
from engine.fingerprints import check_settings, check_teacher, load_teacher_state, logits_fingerprint, training_settings
from engine.flags import Parser
from engine.inference import predict
from engine.models import load_model, shorten
from engine.settings import Config, Model
from engine.sources import square
from report.comparisons import Models, TrainingLogits, distilled
from report.export import check_export, export_program, load_onnx, load_pt2, onnx_program
from report.markdown import summary
from report.metrics import Evaluated
from report.predict import predict_files
from report.write import write_report
from utils import load_config, run_script

FLAGS = {
    "--predict IMAGE ...": "no report: the class and the probabilities of these image files, and of those in these "
    "folders, from each trained model",
    "--csv FILE": "with --predict: write the classes and probabilities to this file, too",
    "--figures pdf": "write each figure as a PDF file, too",
    "--export [pt2|onnx]": "no report: write MODEL.pt2, which needs only PyTorch, or MODEL.onnx, for each distilled "
    "model (or each in --only)",
}
TRAIN_FIRST = "train first: python teacher_student_model.py, with the same flags"


def finished_checkpoints(
    config: Config, dataset: Dataset | None, missing: list[Path]
) -> Iterator[tuple[Model, Checkpoint, str]]:
    """Each trained model with its checkpoint and its digest, teachers first; the paths of the others go into `missing`.

    Raises UserError if a checkpoint is damaged, was trained with different settings, or was distilled from a teacher
    that has been retrained since. Without a data set the settings are not checked.
    """
    for model in config.models():
        checkpoint = load_finished(model.path)
        if not checkpoint:
            log.info(f"not trained yet, skipped: {model.path}")
            missing.append(model.path)
            continue
        if dataset:
            check_settings(model.path, checkpoint, training_settings(model, dataset))
            if tuple(checkpoint.classes) != dataset.classes:
                raise UserError(f"{model.path}: has other classes: {shorten(checkpoint.classes)}")
        else:
            check_teacher(model, checkpoint)
        yield model, checkpoint, checkpoint.digest


def logits_of(network: nn.Module, images: torch.Tensor, config: Config, title: str) -> np.ndarray:
    """(N, C) float32"""
    return predict(network, images, config.image_size, config.precision, title=title).cpu().numpy()


def logits_of_splits(model: Model, checkpoint: Checkpoint, dataset: Dataset) -> Iterator[tuple[str, np.ndarray]]:
    """Those of the validation and the test images, (N, C) float32, where there are such; computed or given.

    Given logits are stored by an image's place in the whole data set, which is unknown without the training images.
    """
    given, config = checkpoint.given_logits, model.config
    network = None if given is not None else load_model(checkpoint, config.device)
    for name, split in (("validation", dataset.validation), ("test", dataset.test)):
        if split and network is not None:
            yield name, logits_of(network, split.images, config, f"{model} {name} images")
        elif split and given is not None and dataset.has_training_images and given[split.ids].isfinite().all():
            yield name, given[split.ids].numpy()


def evaluate_checkpoints(config: Config, dataset: Dataset) -> tuple[dict[str, Evaluated], list[Path]]:
    """Every trained model on the test images, in the order of config.recipes, and the paths of the missing ones."""
    models: dict[str, Evaluated] = {}
    missing: list[Path] = []
    for model, checkpoint, digest in finished_checkpoints(config, dataset, missing):
        seed, logits = model.seed, dict(logits_of_splits(model, checkpoint, dataset))
        if "test" not in logits:
            unknown = "" if dataset.has_training_images else " that can be found without the training images"
            log.info(f"{model}  has no logits of the test images{unknown} and is not in the report")
            continue
        found = models.get(model.name, Evaluated(model.recipe, {}, {}))
        validation = {seed: logits["validation"]} if "validation" in logits else {}
        models[model.name] = found._replace(
            logits={**found.logits, seed: logits["test"]},
            history={**found.history, seed: checkpoint.history},
            validation_logits={**found.validation_logits, **validation},
            digests={**found.digests, seed: digest},
            environments={**found.environments, seed: checkpoint.environment},
        )
    return {name: models[name] for name in config.recipes if name in models}, missing


def logits_for_student(
    student: Model, teacher: Model, digest: str, dataset: Dataset, most: int = 2_000
) -> tuple[np.ndarray, np.ndarray]:
    """The teacher's logits (M, C) on a student's training images, not mirrored, and the labels (M,).

    Those of all images if training has stored them for weights with this digest; otherwise at most `most` are computed.
    """
    config = student.config
    subset, labels = dataset.subset(student.recipe.train_size, student.recipe.train_subset), dataset.train.labels.cpu()
    if teacher.recipe.logits_file:
        given = load_teacher_state(teacher, dataset).weights["logits"][dataset.train.ids]
        return given[subset].numpy(), labels[subset].numpy()
    fingerprint = logits_fingerprint(digest, config, dataset)
    shape = (2, len(labels), len(dataset.classes))
    stored = load_logits(teacher.logits_path, fingerprint, shape)
    if stored[0, subset].isfinite().all():
        return stored[0, subset].numpy(), labels[subset].numpy()
    by_class = subset[labels[subset].argsort(stable=True)]  # evenly spaced picks keep the classes in proportion
    chosen = by_class[torch.linspace(0, len(by_class) - 1, min(most, len(by_class))).long()]
    images = dataset.train.images[chosen.to(dataset.train.images.device)]
    network = load_model(load_teacher_state(teacher, dataset), config.device)
    return logits_of(network, images, config, f"{teacher} training images"), labels[chosen].numpy()


def training_logits(config: Config, dataset: Dataset, models: Models) -> TrainingLogits:
    """The teacher's logits on the training images of each distilled model."""
    logits: dict[str, dict[int, tuple[np.ndarray, np.ndarray]]] = {}
    if not dataset.has_training_images:
        return logits
    for name, (_, seeds) in distilled(models).items():
        logits[name] = {}
        for student in (Model(name, seed, config) for seed in seeds):
            if teacher := student.teacher:
                digest = models[teacher.name].digests[teacher.seed]
                logits[name][student.seed] = logits_for_student(student, teacher, digest, dataset)
    return logits


def evaluate(config: Config, dataset: Dataset, pdf: bool = False) -> None:
    """Write the report, with figures in PDF if asked for, and print its table and its verdicts."""
    with lock(Path(config.imgs_path, config.run)):
        if not dataset.has_training_images:
            log.info(f"{config.dataset}: has no training images, so that these test images go with them is not checked")
        models, missing = evaluate_checkpoints(config, dataset)
        if not models:
            raise UserError(f"nothing to evaluate; {TRAIN_FIRST}")
        for (first, one), (second, other) in itertools.combinations(models.items(), 2):
            if one.digests == other.digests:  # as after a row was renamed
                log.info(f"{first} and {second} have the same weights, and each counts among the comparisons")
        logits = training_logits(config, dataset, models)
        if rank() == 0:
            results = write_report(config, dataset, models, logits, missing, pdf)
            print_result(summary(results))
            log.info(f"The report: {Path(config.imgs_path, config.run, 'results.md')}")


def export(config: Config, dataset: Dataset | None, suffix: str) -> None:
    """Write MODEL.pt2 or .onnx for each distilled model, or each that `only` names.

    It is checked on the test images, or on noise if there are none.
    """
    selected = config.selected()
    names = selected if config.only else [n for n in selected if config.recipes[n].teacher] or selected
    exported, generator = 0, torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (100, 3, 64, 64), dtype=torch.uint8, generator=generator)
    images, kind = (dataset.test.images.cpu(), "test images") if dataset else (noise, "images of noise")
    photographs = [torch.cat([*images[:2]], axis)[None] for axis in (1, 2)]  # (1, 3, 2H, W) and (1, 3, H, 2W)
    with lock(Path(config.checkpoints_path, config.run)):
        for model, checkpoint, digest in finished_checkpoints(replace(config, only=tuple(names)), dataset, missing=[]):
            if checkpoint.given_logits is not None:
                log.info(f"{model}  is only logits, not exported")
                continue
            network, path = load_model(checkpoint, "cpu"), model.path.with_suffix(f".{suffix}")
            size, how = checkpoint.config["image_size"], checkpoint.config["resize"]
            squares = [pil_to_tensor(square(to_pil_image(image[0]), how))[None] for image in photographs]
            logits = torch.cat([predict(network, group, size, title=str(model)) for group in (images, *squares)])
            about = {"name": model.name, "seed": model.seed, "classes": checkpoint.classes}
            about |= {"image_size": size, "resize": how, "weights": digest}
            content = export_program(network, size, how, about)
            if suffix == "onnx":
                content = onnx_program(content, about)
            program = load_onnx(content) if suffix == "onnx" else load_pt2(content)
            largest = check_export(program, path, [images, *photographs], torch.softmax(logits, dim=1))
            write_durably(path, content)
            log.info(
                f"{model}  exported: {path}, {len(content) / 1e6:.1f} MB. Loaded back, it predicts the "
                f"checkpoint's class on all {len(images):,} {kind}, and a wide and a tall one, with probabilities "
                f"at most {largest:.1g} apart"
            )
            exported += 1
    if not exported:
        raise UserError(
            f"nothing to export: no {' and no '.join(names)} is trained. Name others with --only, or {TRAIN_FIRST}"
        )


def dataset_if_there(config: Config) -> Dataset | None:
    try:
        return load_dataset(config, trained=True)
    except UserError as error:
        log.info(f"{error}; so exports are checked on noise, and not on test images")
        return None


@on_rank0
def script_flags(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """This script's own flags, and the rest of the command line."""
    parser = Parser(add_help=False, allow_abbrev=False)
    one_of = parser.add_mutually_exclusive_group()
    one_of.add_argument("--predict", nargs="+")
    one_of.add_argument("--export", nargs="?", const="pt2", choices=("pt2", "onnx"))
    parser.add_argument("--csv")
    parser.add_argument("--figures", choices=("png", "pdf"), default="png")
    return parser.parse_known_args(argv)


def chosen_precision(argv: list[str]) -> str:
    """fp32, unless this command line says bf16: logits in bfloat16 have ties, so training's precision is not used."""
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--precision")
    return "bf16" if parser.parse_known_args(argv)[0].precision == "bf16" else "fp32"


def main(argv: list[str] | None = None) -> None:
    with run_script():
        own, rest = script_flags(argv)
        config = load_config(rest, FLAGS)
        if world_size() > 1 and (own.predict or own.export):
            raise UserError("--predict and --export run in a single process: python evaluate.py, without torchrun")
        if own.csv is not None and not own.predict:
            raise UserError("--csv: goes with --predict; a report writes predictions.csv by itself")
        config = replace(config, precision=chosen_precision(rest))
        if own.export and config.precision == "bf16":
            log.info("--precision bf16 has no effect: exports are float32 programs")
        if own.predict:
            tables = predict_files(own.predict, config, own.csv)
            if not tables:
                raise UserError(f"nothing to predict with; {TRAIN_FIRST}")
            print_result("\n".join(tables).rstrip())
            return
        if own.export:
            export(config, dataset_if_there(config), own.export)
        else:
            evaluate(config, load_dataset(config, trained=True), pdf=own.figures == "pdf")


if __name__ == "__main__":
    main()
