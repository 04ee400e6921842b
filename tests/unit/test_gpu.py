"""The measurements on a GPU, as far as a CPU shows them: that they run, stop in time, resume, and are on the page."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from benchmarks import gpu
from benchmarks.gpu_measurements import KERNELS, SECTIONS, Options, Section, compare_logits, measure, records
from engine.errors import UserError

SPEED = {"rate": 1234.5, "min": 1200.0, "max": 1300.0, "n": 3, "first_seconds": 9.0, "peak_bytes": 2**31}
FOUND = {
    "smoke": {"fit, bf16": {"loss": 2.25}},
    "ceilings": {"copy, bytes/s": {"rate": 2.15e12}, "matrix product, FLOP/s": {"rate": 7.9e14}},
    "training_speed": {
        "resnet50: fit": {**SPEED, "rate": 1725.0},
        "resnet18: fit": {**SPEED, "rate": 10_000.0},
        "resnet18: fit, distilled, stored logits": {**SPEED, "rate": 8000.0},
        "resnet18: fit, crop": {"error": "RuntimeError: a | b"},
    },
    "evaluation_speed": {"resnet50: batches of 500": SPEED},
    "step_profile": {"resnet50": {"step_milliseconds": 20.8, "shares": {"BatchNorm": 0.3, "other": 0.1}}},
    "synchronisations": {"plain": {"steps": 50, "places": {"training.py:74": 2}}},
    "exact_resize": {
        "32 to 224 px": {"values": 10_000, "different": 7},
        "normalised": {"largest_difference": 2e-7},
    },
    "stored_against_online": {
        "resnet50": {
            "images": 5000,
            "largest_difference": 0.03,
            "standard_deviation_of_logits": 1.5,
            "same_class": 0.998,
            "kl_at_temperature_5": 2e-6,
        }
    },
    "exact_resume": {"deterministic": {"repeats": True, "resumes": True, **SPEED}},
    "device_tests": {"unit": {"passed": 800, "errors": 1, "seconds": 99.5, "failures": ["ERROR test_a.py::test_b"]}},
    "experiment": {
        "experiment": {
            "flags": "--preset original",
            "wall_seconds": {"evaluate.py": 20.4},
            "models": {"teacher/seed0": {"seconds": 60.0, "first_epoch": 14.0, "last_epoch": 11.5}},
            "accuracies": {"teacher": 0.812},
        }
    },
    "original_way": {
        "benchmarks.speed": {"ratios": [{"ours": "ResNet18 training", "plain": "the original's way", "ratio": 5.25}]}
    },
}


@pytest.fixture
def options(tmp_path) -> Options:
    return Options("cpu", 32, 4, 2, 3, "--preset demo", str(tmp_path))


def test_the_page_shows_what_was_measured(options):
    environment = {"device": "NVIDIA H200", "python": "3.12", "torch": "2.11.0", "torchvision": "0.26"}
    stopped = {"compiled_speed": "stopped after 9 s; missing: fit"}
    options = options._replace(image_size=224)
    written = {"options": options._asdict(), "environment": environment, "sections": FOUND, "stopped": stopped}
    page = gpu.page(written)
    for number in ("2.15e+12", "| 60% or more | 50% |", "| 1,200 to 1,300 | 3 | 9.0 s | 2.0 GiB |", "| 1.250 |"):
        assert number in page  # half an H200's copy rate has half its roofline, 3,450 images/s
    for number in ("| 30.0% |", "training.py:74 (2)", "7 of 10,000", "2e-07", "0.03 apart", "99.80%", "loss 2.25"):
        assert number in page
    assert "- training_speed, resnet18: fit, crop: RuntimeError: a | b" in page
    assert "800 passed, 1 errors" in page
    assert "ERROR test_a.py::test_b" in page
    assert "teacher 81.20%" in page
    assert "compiled_speed: stopped after 9 s" in page


def test_the_seconds_of_the_original_experiment():
    """5 epochs of the teacher and 25 of ResNet18s; 10,000 images evaluated after each; 100,000 logits."""
    teacher, students = 5 * (50_000 / 100 + 10_000 / 200), 25 * (50_000 / 1000 + 10_000 / 500)
    found = gpu.experiment_seconds({"resnet50": 100, "resnet18": 1000}, {"resnet50": 200, "resnet18": 500})
    assert found == pytest.approx(teacher + students + 100_000 / 200)


def sleepy(options: Options) -> dict:
    """Two variants, of which the second never ends."""
    return {"fast": dict, "slow": lambda: time.sleep(100) or {}}


def test_what_succeeds_is_kept_and_the_rest_repeated(options, monkeypatch):
    asked, fails = [], {"slow"}
    monkeypatch.setitem(SECTIONS, "sleepy", Section(sleepy, 60))

    def run_section(name, variants, options, seconds, record):
        asked.extend(variants)
        for variant in variants:
            record(variant, {"error": "RuntimeError: no"} if variant in fails else {"loss": 1.0})
        return ""

    monkeypatch.setattr(gpu, "run_section", run_section)
    assert gpu.run_sections(["sleepy"], options, time.monotonic() + 60)["sections"]["sleepy"]["fast"] == {"loss": 1.0}
    assert "sleepy, slow: RuntimeError: no" in Path(options.folder, "gpu.md").read_text()
    fails.clear()
    written = gpu.run_sections(["sleepy"], options, time.monotonic() + 60)
    assert asked == ["fast", "slow", "slow"]
    assert written == json.loads(Path(options.folder, "gpu.json").read_text())
    with pytest.raises(UserError, match="measured with other options"):
        gpu.run_sections(["sleepy"], options._replace(steps=5), 0.0)


def test_what_there_is_no_time_for_is_not_started(options):
    written = gpu.run_sections(["exact_resize", "smoke"], options, time.monotonic() + 1)
    assert written["sections"] == {}
    assert set(written["stopped"]) == {"exact_resize", "smoke"}


def test_missing_images_are_refused_and_not_downloaded(options, tmp_path):
    with pytest.raises(UserError, match="cifar10 is not in"):
        gpu.check_data(f"--preset cifar10 --data_path {tmp_path}")


@pytest.mark.chaos
def test_the_rehearsal_ends_at_its_deadline_with_its_page(options, tmp_path):
    """In an interpreter that has packages called benchmarks, tests and config, and no network."""
    for name in ("benchmarks", "tests", "engine", "config"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('not ours')")
    forbidden = "import socket\ndef refuse(*_): raise OSError('no network')\nsocket.socket.connect = refuse\n"
    (tmp_path / "sitecustomize.py").write_text(forbidden)
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--folder", str(tmp_path / "out")]
    started = time.monotonic()
    done = subprocess.run([*command, "--deadline", "45"], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert time.monotonic() - started < 55
    assert done.returncode == 1
    written = json.loads((tmp_path / "out/gpu.json").read_text())
    assert written["sections"]["smoke"]["fit, fp32"]["loss"] > 0
    assert len(written["stopped"]) > 5
    assert "not started, for lack of time" in (tmp_path / "out/gpu.md").read_text()
    processes = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(tmp_path) not in processes  # neither the section nor pytest-xdist's workers go on


def test_a_cpu_computes_stored_and_online_logits_alike(options):
    record = compare_logits(options)
    assert record["images"] == 8
    assert record["largest_difference"] < 0.1 * record["standard_deviation_of_logits"]


def test_a_rate_leaves_the_first_call_out(options, monkeypatch):
    times = iter([0.0, 8.0, 10.0, 12.0, 20.0, 21.0, 30.0, 34.0])
    monkeypatch.setattr("benchmarks.gpu_measurements.time.perf_counter", lambda: next(times))
    assert measure(lambda: None, 4, options) == {"rate": 2.0, "min": 1.0, "max": 4.0, "n": 3, "first_seconds": 8.0}


def test_a_rate_is_that_of_the_seconds_that_a_function_returns(options):
    seconds = iter([9.0, 2.0, 4.0, 1.0])
    record = measure(lambda: next(seconds), 4, options)
    assert record == {"rate": 2.0, "min": 1.0, "max": 4.0, "n": 3, "first_seconds": 9.0}


def test_a_variant_that_fails_leaves_the_others():
    def fails():
        raise RuntimeError("needs CUDA\nand more")

    assert dict(records({"a": fails, "b": lambda: {"rate": 1.0}})) == {
        "a": {"error": "RuntimeError: needs CUDA"},
        "b": {"rate": 1.0},
    }


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        (
            "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128",
            "convolution and matrix product",
        ),
        ("void cudnn::batchnorm_fwtr_nhwc_semiPersist<__nv_bfloat16>", "BatchNorm"),
        ("void at::native::batch_norm_backward_elemt_channels_last_kernel<4>", "BatchNorm"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedSgdMathFunctor>", "optimizer"),
        ("void at::native::max_pool_backward_nhwc", "pooling"),
        ("void at::native::vectorized_elementwise_kernel<4, threshold>", "elementwise"),
        ("void at::native::bfloat16_copy_kernel_cuda", "copy and cast"),
    ],
)
def test_kernels_are_told_apart(kernel, kind):
    assert next(k for k, pattern in KERNELS.items() if re.search(pattern, kernel, re.IGNORECASE)) == kind
