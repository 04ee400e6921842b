import json
import os
import shlex
import socket
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.distributed.run
from conftest import ROOT
from torch import nn

import config as settings
from engine import distributed
from engine.datasets import batches
from engine.distributed import (
    OrderlyStop,
    PeerLost,
    RankError,
    all_reduce_max,
    all_reduce_sum,
    average_batchnorm_statistics,
    data_parallel,
    main_process_first,
    on_rank0,
    process_group,
    shard,
)
from engine.errors import UserError


def as_rank(monkeypatch, rank: int, world_size: int) -> None:
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(distributed, "world_size", lambda: world_size)


# The parts of several processes


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_shards_partition_the_range(monkeypatch, world_size):
    for n in (0, 1, 5, 100, 10_000):
        parts = []
        for rank in range(world_size):
            as_rank(monkeypatch, rank, world_size)
            parts.append(range(n)[shard(n)])
        assert [number for part in parts for number in part] == list(range(n))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("augment", ["none", "crop", "randomerasing", "trivialaugment"])
def test_the_shards_of_a_batch_add_up_to_it(config, digits, monkeypatch, augment):
    config, subset = replace(config, augment=augment), digits.subset(75)
    alone = list(batches(digits.train, subset, config, seed=1, epoch=2))
    shares = []
    for rank in range(3):
        as_rank(monkeypatch, rank, 3)
        shares.append(list(batches(digits.train, subset, config, seed=1, epoch=2)))
    for batch, *parts in zip(alone, *shares, strict=True):
        for whole, *pieces in zip(batch, *parts, strict=True):
            assert whole is None or torch.equal(whole.cpu(), torch.cat(pieces).cpu())


# One process


def test_in_a_single_process_every_function_is_the_identity(device):
    model = nn.BatchNorm1d(2).to(device)
    model.running_mean.fill_(3.0)
    average_batchnorm_statistics(model, 0.5)
    assert model.running_mean.tolist() == [3.0, 3.0]
    assert data_parallel(model, device) is model
    assert on_rank0(lambda: "result")() == main_process_first(lambda: "result") == "result"
    assert all_reduce_max(3, False, -1) == [3, False, -1]
    tensor = torch.ones(2, device=device)
    total = all_reduce_sum(tensor)
    assert total.tolist() == [1.0, 1.0]
    total += 1
    assert tensor.tolist() == [1.0, 1.0]
    with process_group():
        assert not dist.is_initialized()


# Two processes

WORKER = """
import json, os, sys
from pathlib import Path

import torch
from torch import nn

from engine.console import configure_logging, log
from engine.distributed import *
from engine.distributed import local_rank, rank, world_size
from engine.errors import UserError, exit_on_error

folder, found, calls = Path(sys.argv[1]), {}, []


def refuse():
    raise UserError(f"rank {rank()} refuses")


def raised_by(function):
    try:
        function()
    except (UserError, SystemExit) as error:
        return f"{type(error).__name__} {error}"


def download():
    there = (folder / "downloaded").exists()
    (folder / "downloaded").touch()
    return there


configure_logging()
torch.set_num_threads(1)
with exit_on_error(), process_group():
    found["place"] = [rank(), local_rank(), world_size()]
    found["broadcast"] = on_rank0(lambda: (calls.append(1), "of rank", rank())[1:])()
    found["calls"] = len(calls)
    found["broadcast error"] = raised_by(on_rank0(refuse))
    found["broadcast exit"] = raised_by(on_rank0(lambda: sys.exit(143)))
    found["downloaded before"] = main_process_first(download)
    found["first one's error"] = raised_by(lambda: main_process_first(refuse if rank() == 0 else int))
    found["second one's error"] = raised_by(lambda: main_process_first(refuse if rank() == 1 else int))
    found["max"] = all_reduce_max(rank(), 5 - rank(), rank() == 1, -1)
    own = torch.full((2,), 1.0 + rank())
    found["sum"], found["own"] = all_reduce_sum(own).tolist(), own.tolist()

    model = nn.Linear(1, 1, bias=False)
    model.register_buffer("own", torch.tensor(float(rank())))
    parallel = data_parallel(model, "cpu")
    parallel(torch.full((1, 1), 1.0 + rank())).sum().backward()
    found["gradient"], found["buffer"] = model.weight.grad.item(), model.own.item()
    norm = nn.BatchNorm1d(2)
    norm.running_mean.fill_(rank()), norm.running_var.fill_(1 + rank()), norm.num_batches_tracked.fill_(7)
    average_batchnorm_statistics(norm, [0.25, 0.75][rank()])
    found["statistics"] = [norm.running_mean.tolist(), norm.running_var.tolist(), norm.num_batches_tracked.item()]

    log.info(f"logged by rank {rank()}")
    (folder / f"{rank()}.json").write_text(json.dumps(found))
    if rank() == 1:
        os._exit(9)  # as if it had been killed
    all_reduce_max(0)
"""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What each of two processes found, with their exit statuses and stderr; rank 1 ends without a word."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    shared = {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    shared |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    started = []
    for rank in ("0", "1"):
        variables = {**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank}
        command = [sys.executable, "-c", WORKER, str(folder)]
        started.append(subprocess.Popen(command, cwd=folder, env=variables, stderr=subprocess.PIPE, text=True))
    try:
        messages = [process.communicate(timeout=120)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert all((folder / f"{rank}.json").exists() for rank in (0, 1)), messages
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]
    return found, [process.returncode for process in started], messages


def test_rank_world_size_and_local_rank(two_processes):
    assert [found["place"] for found in two_processes[0]] == [[0, 0, 2], [1, 1, 2]]


def test_broadcast_returns_rank_0s_result_or_error_on_all_ranks(two_processes):
    for found, calls in zip(two_processes[0], (1, 0), strict=True):
        assert found["broadcast"] == ["of rank", 0]
        assert found["calls"] == calls
        assert found["broadcast error"] == "UserError rank 0 refuses"
        assert found["broadcast exit"] == "SystemExit 143"


def test_main_process_first_orders_the_ranks_and_shares_errors(two_processes):
    assert [found["downloaded before"] for found in two_processes[0]] == [False, True]
    for found in two_processes[0]:
        assert found["first one's error"] == "UserError rank 0 refuses"
        assert found["second one's error"] == "UserError rank 1 refuses"


def test_reductions_are_over_all_ranks_and_leave_the_input_unchanged(two_processes):
    for rank, found in enumerate(two_processes[0]):
        assert found["max"] == [1, 5, 1, -1]
        assert found["sum"] == [3.0, 3.0]
        assert found["own"] == [1.0 + rank] * 2


def test_gradients_are_averaged_and_batchnorm_statistics_weighted_by_the_shares(two_processes):
    for rank, found in enumerate(two_processes[0]):
        assert found["gradient"] == 1.5  # of 1 and 2
        assert found["buffer"] == rank  # not sent
        assert found["statistics"] == [[0.75, 0.75], [1.75, 1.75], 7]


def test_only_rank_0_logs_and_a_lost_peer_is_reported(two_processes):
    _, statuses, (first, second) = two_processes
    assert statuses == [1, 9], first
    assert "logged by rank 0" in first
    assert "logged by" not in second
    assert first.count("error: rank 0 of 2 lost contact with another process") == 1
    assert "run the same command again to resume" in first.lower()
    assert "Traceback" not in first


# Who reports an error


@pytest.fixture
def torchrun(monkeypatch):
    """As if torchrun had started this process with a rank: torchrun(1)."""
    joined = []
    monkeypatch.setattr(dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(dist.HashStore(), 0, 2)]))
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: joined.append("joined"))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: joined.append("left"))

    def start(rank: int) -> list[str]:
        as_rank(monkeypatch, rank, 2)
        return joined

    return start


def test_an_error_on_all_ranks_is_reported_only_by_rank_0(torchrun):
    torchrun(1)
    with pytest.raises(SystemExit) as exit, process_group():
        raise UserError("met by all")
    assert exit.value.code == 2
    joined = torchrun(0)
    with pytest.raises(UserError, match="met by all"), process_group():
        raise UserError("met by all")
    assert "left" not in joined  # it would wait for ranks that do not know of the error


def test_an_error_on_one_rank_is_reported_by_that_rank(torchrun):
    torchrun(1)
    with pytest.raises(RankError, match="out of memory"), process_group():
        raise RankError("out of memory")


def test_gloo_errors_mean_a_lost_peer_and_others_are_bugs(torchrun):
    torchrun(0)
    with pytest.raises(PeerLost) as error, process_group():
        raise RuntimeError("[/pytorch/third_party/gloo/pair.cc:534] Connection closed by peer [::1]:5. More")
    assert error.value.status == 1
    assert "rank 0 of 2 lost contact with another process (Connection closed by peer [::1]:5)" in str(error.value)
    with pytest.raises(PeerLost), process_group():
        raise dist.DistBackendError("NCCL error")
    with pytest.raises(RuntimeError, match="shape"), process_group():
        raise RuntimeError("shape mismatch")


def test_the_process_group_is_destroyed_at_the_end(torchrun):
    joined = torchrun(1)
    with process_group():
        assert joined == ["joined"]
    assert joined == ["joined", "left"]


def test_a_stop_that_all_ranks_agree_on_destroys_the_process_group(torchrun):
    joined = torchrun(1)
    with pytest.raises(SystemExit) as exit, process_group():
        raise OrderlyStop(143)
    assert exit.value.code == 143
    assert joined == ["joined", "left"]
    with pytest.raises(SystemExit), process_group():
        raise SystemExit(143)
    assert joined == ["joined", "left", "joined"]


def test_gpus_wait_minutes_for_each_other_and_downloads_hours(torchrun, monkeypatch):
    torchrun(0)
    limits = {}
    note = lambda backend, timeout, **_: limits.update({backend: timeout})  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(dist, "init_process_group", note)
    monkeypatch.setattr(dist, "new_group", note)
    monkeypatch.setattr(distributed, "gpu_group", None)
    with process_group():
        pass
    assert limits["gloo"] >= timedelta(hours=1)
    assert limits["nccl"] <= timedelta(minutes=30)


# torchrun's own command line


def test_the_documented_torchrun_commands_pass_every_flag_to_the_script():
    """Without the -- before the script, torchrun takes --run for an abbreviation of an option of its own."""
    lines = [line for line in (ROOT / "docs/processes.md").read_text().splitlines() if line.startswith("    torchrun ")]
    assert any("--run " in line for line in lines)
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        found = torch.distributed.run.parse_args(words)
        script = words.index(found.training_script)
        assert (ROOT / found.training_script).exists()
        assert found.training_script_args == words[script + 1 :]
        assert settings.parse(found.training_script_args)
