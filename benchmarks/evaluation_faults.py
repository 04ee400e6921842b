"""What the original's two faults of evaluation do to the accuracy of a finished run.

    python -m benchmarks.evaluation_faults --run ablation --precision bf16 --json docs/data/evaluation_faults.json

Its evaluation script never calls eval(), so that BatchNorm normalises with the statistics of each test batch, and its
test images are flipped at random. Here both are repeated on checkpoints of this repository, several times each, as
their outcome is random; models that the JSON file has are not measured again. They are no mode of evaluate.py, which
always evaluates correctly.
"""

import argparse
import copy
import json
from collections.abc import Container, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from engine.checkpoints import load_finished
from engine.datasets import Split, load_dataset
from engine.device import configure_backends, forward_pass, resolve_device
from engine.errors import UserError, exit_on_error
from engine.files import write_durably
from engine.images import prepare
from engine.models import load_model
from engine.recorded import recorded_config
from engine.settings import Config

FAULTS = {
    "none": {"training_mode": False, "flip": 0.0},
    "training mode": {"training_mode": True, "flip": 0.0},
    "flips": {"training_mode": False, "flip": 0.5},
    "both": {"training_mode": True, "flip": 0.5},
}


def faulty_accuracy(
    model: nn.Module,
    split: Split,
    image_size: int,
    training_mode: bool,
    flip: float,
    seed: int,
    precision: str = "fp32",
    batch_size: int = 100,
) -> float:
    """The accuracy on shuffled test batches, with BatchNorm in training mode or images flipped; the model is kept."""
    generator = torch.Generator().manual_seed(seed)
    model, correct = copy.deepcopy(model).train(training_mode), 0
    order = torch.randperm(len(split.labels), generator=generator).to(split.labels.device)
    flipped = (torch.rand(len(order), generator=generator) < flip).to(order.device)
    with torch.no_grad():
        for index in order.split(batch_size):
            images = split.images[index]
            images = torch.where(flipped[index].view(-1, 1, 1, 1), images.flip(3), images)
            with forward_pass(images.device, precision):
                logits = model(prepare(images, image_size)).float()
            correct += int((logits.argmax(1) == split.labels[index]).sum())
    return correct / len(order)


def measure(config: Config, repeats: int, skip: Container[str] = ()) -> Iterator[tuple[str, dict[str, list[float]]]]:
    """Each finished model that is not in `skip`, as MODEL/seedS, and its accuracies under each fault.

    An evaluation is repeated `repeats` times where it is random.
    """
    dataset = load_dataset(config)
    for model in config.models():
        title = f"{model.name}/seed{model.seed}"
        if title in skip or not (checkpoint := load_finished(model.path)):
            continue
        network = load_model(checkpoint, config.device)

        def accuracy(how: dict, repeat: int, network=network) -> float:
            return faulty_accuracy(
                network, dataset.test, config.image_size, **how, seed=repeat, precision=config.precision
            )

        faults = {
            fault: [accuracy(how, repeat) for repeat in range(repeats if any(how.values()) else 1)]
            for fault, how in FAULTS.items()
        }
        yield title, faults


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True)
    parser.add_argument("--checkpoints_path", type=Path, default="checkpoints")
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    own = parser.parse_args(argv)
    with exit_on_error():
        config = recorded_config(own.checkpoints_path / own.run)
        config = resolve_device(replace(config, only=tuple(own.only), precision=own.precision))
        configure_backends(config)
        how = {"run": own.run, "precision": own.precision, "repeats": own.repeats}
        written = json.loads(own.json.read_text()) if own.json and own.json.exists() else {**how, "models": {}}
        if {key: written[key] for key in how} != how:
            raise UserError(f"{own.json}: was measured with another run, precision or number of repeats; delete it")
        for title, faults in measure(config, own.repeats, written["models"].copy()):
            written["models"][title] = faults
            for fault, accuracies in faults.items():
                mean, lowest, highest = np.mean(accuracies), min(accuracies), max(accuracies)
                print(f"{title:24}  {fault:14}  {mean:.2%}, {len(accuracies)} times: {lowest:.2%} to {highest:.2%}")
            if own.json:
                write_durably(own.json, (json.dumps(written, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
