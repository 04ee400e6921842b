import copy
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SMALL
from conftest import flags as small_flags

from config import DEMO
from custom_resnet import build_resnet
from engine import checkpoints, datasets
from engine.training import make_optimizer, make_scheduler


@pytest.mark.parametrize("device", ["cpu"], indirect=True)  # one GPU is one process
def test_two_processes_agree_with_a_plain_loop_over_both_shards(tmp_path, config, digits):
    """Gradients and BatchNorm's statistics, averaged; the second part of 25 images is larger by one."""
    words = small_flags(tmp_path, "--only=student", "--student.epochs=1", "--student.train_size=50")
    command = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--", "custom_resnet.py", *words]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("epoch  1/1") == 1
    found = checkpoints.load_checkpoint(tmp_path / "checkpoints/demo/seed0/student.pt")
    assert found["environment"]["processes"] == "2"

    torch.manual_seed(0)
    model = build_resnet(SMALL["arch"], 10, pretrained=False).to(memory_format=torch.channels_last).train()
    optimizer = make_optimizer(model, replace(DEMO["student"], lr=0.01, schedule="constant"), config.device)
    scheduler = make_scheduler(optimizer, replace(DEMO["student"], lr=0.01, schedule="constant"), 2)
    losses = []
    for batch in datasets.batches(
        digits.train, digits.subset(50), replace(config, horizontal_flip=0.0), seed=0, epoch=0
    ):
        before, statistics, loss = copy.deepcopy(model.state_dict()), {}, 0.0
        optimizer.zero_grad()
        for part in (slice(0, 12), slice(12, 25)):
            model.load_state_dict(before)
            share = (part.stop - part.start) / 25
            part_loss = F.cross_entropy(model(batch.images[part]), batch.labels[part]) * share
            part_loss.backward()
            loss += part_loss.item()
            for name, value in model.state_dict().items():
                if "running" in name:
                    statistics[name] = statistics.get(name, 0) + value * share
        model.load_state_dict(statistics, strict=False)
        optimizer.step()
        scheduler.step()
        losses.append(loss)
    assert found["history"][0]["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(found["model"][name], tensor, atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.chaos
def test_torchrun_with_one_process_is_bit_equal_to_plain_python(tmp_path, trained, device):
    """The two dashes keep torchrun's own parser from reading --run as an abbreviation of --run-path."""
    words = small_flags(tmp_path, "--only=student", "--run", "other", device=device)
    command = ["-m", "torch.distributed.run", "--nproc_per_node=1", "--", "custom_resnet.py", *words]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    plain = checkpoints.load_checkpoint(trained / "checkpoints/demo/seed0/student.pt")
    one = checkpoints.load_checkpoint(tmp_path / "checkpoints/other/seed0/student.pt")
    assert all(torch.equal(plain["model"][name], one["model"][name]) for name in plain["model"])
