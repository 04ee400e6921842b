"""The measurements on a GPU, as far as a CPU shows them: that they run, resume, and end up on the page."""

import json
import re

import pytest

from benchmarks import gpu
from benchmarks.gpu_measurements import KERNELS, Options, measure, stored_against_online, try_each
from engine.errors import UserError

OPTIONS = Options("cpu", 32, 4, 2, 3, "--preset demo")
SPEED = {"rate": 1234.5, "min": 1200.0, "max": 1300.0, "n": 3, "first_seconds": 9.0, "peak_bytes": 2**31}
FOUND = {
    "ceilings": {
        "environment": {"device": "NVIDIA H200", "torch": "2.11.0"},
        "bytes_per_second": 4.3e12,
        "flop_per_second": 7.9e14,
    },
    "training_speed": {"resnet50: fit": SPEED, "resnet18: step, CUDA graph": {"error": "RuntimeError: a | b"}},
    "evaluation_speed": {"resnet50: batches of 500": SPEED},
    "step_profile": {"resnet50": {"step_milliseconds": 20.8, "shares": {"BatchNorm": 0.3, "other": 0.1}}},
    "synchronisations": {"steps": 50, "places": {"training.py:74": 2}},
    "exact_resize": {
        "sizes": {"32 to 224 px": {"values": 10_000, "different": 7}},
        "normalised_largest_difference": 2e-7,
    },
    "stored_against_online": {
        "images": 5000,
        "largest_difference": 0.03,
        "standard_deviation_of_logits": 1.5,
        "same_class": 0.998,
        "kl_at_temperature_5": 2e-6,
    },
    "exact_resume": {"deterministic": {"repeats": True, "resumes": True, **SPEED}},
    "suite": {"passed": 800, "error": 1, "seconds": 99.5, "failures": ["tests/test_a.py::test_b"]},
    "experiment": {
        "flags": "--preset original",
        "wall_seconds": {"evaluate.py": 20.4},
        "training_seconds": 107.6,
        "models": {"teacher/seed0": {"seconds": 60.0, "first_epoch": 14.0, "last_epoch": 11.5}},
        "accuracies": {"teacher": 0.812},
    },
    "original_way": {
        "distilled_over_plain_epoch": 1.0123,
        "ratios": [{"ours": "ResNet18 training", "plain": "the original's way", "ratio": 5.25}],
    },
}


def test_the_page_shows_what_was_measured():
    page = gpu.page(FOUND, OPTIONS._asdict())
    for number in ("4.30 TB/s", "790 TFLOP/s", "| 4,800 | 1,234 | 18% |", "| 1,200 to 1,300 | 3 | 9.0 s | 2.0 GiB |"):
        assert number in page
    for number in ("| 30.0% |", "training.py:74 (2)", "7 of 10,000", "2e-07", "0.03 apart", "99.80%", "| 1.012 |"):
        assert number in page
    assert "RuntimeError: a / b" in page
    assert "800 passed, 1 error" in page
    assert "teacher 81.20%" in page


def test_sections_are_resumed_and_failures_repeated(tmp_path, monkeypatch):
    path, asked, fails = tmp_path / "gpu.json", [], {"ceilings"}

    def run_section(name, options):
        asked.append(name)
        return (None, "exit status 1") if name in fails else ({"of": name}, "")

    monkeypatch.setattr(gpu, "run_section", run_section)
    found = gpu.run_sections(["ceilings", "exact_resize"], OPTIONS, path)
    assert found == {"exact_resize": {"of": "exact_resize"}, "failed": {"ceilings": "exit status 1"}}
    assert "- ceilings: exit status 1" in gpu.page({"failed": found["failed"]}, OPTIONS._asdict())
    fails.clear()
    found = gpu.run_sections(["ceilings", "exact_resize"], OPTIONS, path)
    assert asked == ["ceilings", "exact_resize", "ceilings"]
    assert found == json.loads(path.read_text())["sections"]
    assert "failed" not in found
    with pytest.raises(UserError, match="measured with other options"):
        gpu.run_sections(["ceilings"], OPTIONS._replace(steps=5), path)
    path.write_text(path.read_text().replace('"python": "', '"python": "0.'))
    with pytest.raises(UserError, match="measured with other environment"):
        gpu.run_sections(["ceilings"], OPTIONS, path)


def test_a_section_runs_in_a_process_of_its_own():
    record, error = gpu.run_section("exact_resize", OPTIONS)
    assert not error
    assert all(size["different"] == 0 for size in record["sizes"].values())


def test_a_cpu_computes_stored_and_online_logits_alike():
    record = stored_against_online(OPTIONS)
    assert record["images"] == 8
    assert record["largest_difference"] < 0.1 * record["standard_deviation_of_logits"]


def test_a_rate_leaves_the_first_call_out(monkeypatch):
    times = iter([0.0, 8.0, 10.0, 12.0, 20.0, 21.0, 30.0, 34.0])
    monkeypatch.setattr("benchmarks.gpu_measurements.time.perf_counter", lambda: next(times))
    assert measure(lambda: None, 4, OPTIONS) == {"rate": 2.0, "min": 1.0, "max": 4.0, "n": 3, "first_seconds": 8.0}


def test_a_rate_is_that_of_the_seconds_that_a_function_returns():
    seconds = iter([9.0, 2.0, 4.0, 1.0])
    record = measure(lambda: next(seconds), 4, OPTIONS)
    assert record == {"rate": 2.0, "min": 1.0, "max": 4.0, "n": 3, "first_seconds": 9.0}


def test_a_variant_that_fails_leaves_the_others():
    def fails():
        raise RuntimeError("needs CUDA\nand more")

    assert try_each({"a": fails, "b": lambda: {"rate": 1.0}}) == {
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
