"""The state of a training run: optimizer, schedule, running loss and history, saved and restored exactly."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, OneCycleLR

from engine.console import duration
from engine.distributed import all_reduce_max, all_reduce_sum, rank, world_size
from engine.errors import Diverged
from engine.settings import Config, Recipe


def make_optimizer(model: nn.Module, recipe: Recipe, device: str) -> torch.optim.Optimizer:
    shared = {"weight_decay": recipe.weight_decay, "fused": torch.device(device).type in ("cpu", "cuda")}
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), recipe.lr, **shared)
    return torch.optim.SGD(model.parameters(), recipe.lr, recipe.momentum, nesterov=recipe.nesterov, **shared)


def make_scheduler(optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int) -> LRScheduler:
    """The recipe's schedule over `steps` steps of the optimizer."""
    if recipe.schedule == "cosine":
        return CosineAnnealingLR(optimizer, steps)
    if recipe.schedule == "onecycle":
        return OneCycleLR(optimizer, recipe.lr, total_steps=steps, cycle_momentum=False)
    return LambdaLR(optimizer, lambda step: 1.0)


def seed_dropout(*position: int) -> None:
    """Seed torch's generators for a step, by its seed, epoch and number, so that a resumed run draws the same masks."""
    torch.manual_seed(int(np.random.SeedSequence((*position, rank())).generate_state(1, np.uint64)[0]))


class Meter:
    """Loss, accuracy and finiteness over an epoch, accumulated on the device; only reading them synchronises."""

    def __init__(self, device: str, sums: torch.Tensor | None = None):
        self.sums = (
            torch.zeros(2, device=device) if sums is None else sums.to(device)
        )  # of batch losses, and of correct predictions
        self.names: list[str] = []
        self.nonfinite = torch.zeros(1, device=device)  # steps in which the logits, and each term, were not finite

    @torch.no_grad()
    def update(self, logits: torch.Tensor, labels: torch.Tensor, terms: dict[str, torch.Tensor], share: float) -> None:
        """Add a step: logits (B, C), labels (B,), the terms of their loss, and their share of the whole batch."""
        self.sums += torch.stack([sum(terms.values()) * share, (logits.argmax(1) == labels).sum()])
        self.names = ["logits", *terms]
        self.nonfinite = self.nonfinite + ~torch.stack([logits.float().sum(), *terms.values()]).isfinite()

    def check(self, where: str) -> None:
        """Raise Diverged, naming what became NaN or infinite first: what has been so for the most steps."""
        counts = all_reduce_max(*self.nonfinite.int().tolist())
        if any(counts):
            diverged(self.names[counts.index(max(counts))], where)


def diverged(what: str, where: str) -> None:
    raise Diverged(
        f"{where}: the {what} became NaN or infinite. The last good checkpoint is kept; train again with a lower lr "
        "(and --overwrite, or another --run)"
    )


class Training:
    """The state of a training run: everything needed to resume it exactly, and its progress."""

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        config: Config,
        images: int,
        title: str,
        state: dict[str, Any] | None,
    ):
        self.model, self.recipe, self.config, self.title = model, recipe, config, title
        self.steps = images // config.batch_size  # per epoch
        self.optimizer = make_optimizer(model, recipe, config.device)
        self.scheduler = make_scheduler(self.optimizer, recipe, recipe.epochs * self.steps)
        self.meter = Meter(config.device)
        self.history: list[dict[str, float]] = []  # a record for each epoch
        self.step = 0  # done of the current epoch
        self.started = self.saved = time.perf_counter()
        if state:
            self.load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}
        return {
            **{name: part.state_dict() for name, part in parts.items()},
            "history": list(self.history),
            "step": self.step,
            "totals": all_reduce_sum(self.meter.sums).cpu(),
            "seconds": time.perf_counter() - self.started if self.step else 0.0,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("model", "optimizer", "scheduler"):
            getattr(self, name).load_state_dict(state[name])
        self.history, self.step = state["history"], state["step"]
        self.meter = Meter(self.config.device, state["totals"] * (rank() == 0))
        self.started -= state["seconds"]

    def begin_epoch(self) -> None:
        if self.step == 0:
            self.meter, self.started = Meter(self.config.device), time.perf_counter()
        self.model.train()

    @property
    def save_due(self) -> bool:
        return time.perf_counter() - self.saved > 60 * self.config.checkpoint_minutes

    @property
    def averages(self) -> tuple[float, float]:
        """Mean loss and accuracy of the epoch so far."""
        loss, hits = all_reduce_sum(self.meter.sums).tolist()
        return loss / self.step, hits / (self.step * self.config.batch_size)

    def check(self) -> None:
        """Raise Diverged if the logits or a term of the loss has not been finite."""
        self.meter.check(self.position)

    @property
    def position(self) -> str:
        return f"{self.title}: epoch {len(self.history) + 1}, step {self.step}, lr = {self.recipe.lr:g}"

    def save(self, write: Callable[[dict[str, Any]], None]) -> None:
        """Pass the state to `write`, unless it has diverged; the weights can diverge a step before the logits do."""
        self.check()
        if not torch.stack([parameter.detach().sum() for parameter in self.model.parameters()]).isfinite().all():
            diverged("weights", self.position)
        write(self.state_dict())
        self.saved = time.perf_counter()

    def describe(self, rate: float, later: float) -> str:
        """The loss, and the time left at this many images per second, with `later` seconds of other models after it."""
        left = (self.recipe.epochs - len(self.history)) * self.steps - self.step
        seconds = left * self.config.batch_size / world_size() / max(rate, 1e-9)
        run = f" of this model, {duration(seconds + later)} of the run" if later else ""
        return "loss {:.4f}, accuracy {:.2%}, ".format(*self.averages) + f"{duration(seconds)} left{run}"
