import pytest
import torchvision

from engine.models import Architecture
from report.cost import count_cost, time_inference


@pytest.mark.parametrize(("arch", "giga"), [("resnet50", 4.09), ("resnet18", 1.81), ("resnext50_32x4d", 4.23)])
def test_parameters_and_multiply_accumulates_match_the_literature(arch, giga):
    published = torchvision.models.get_model_weights(arch).DEFAULT.meta
    cost = count_cost(Architecture(arch, "imagenet"), 1000, 224)
    assert cost["parameters"] == published["num_params"]
    assert cost["multiply_accumulates"] / 1e9 == pytest.approx(giga, abs=0.006)
    assert cost["multiply_accumulates"] / 1e9 == pytest.approx(published["_ops"], abs=0.001)


def test_each_architecture_is_timed_at_least_three_times(config, digits):
    arch = Architecture("resnet18", "imagenet")
    cost = time_inference([arch], config, digits, batch_size=600, seconds=0)[arch]
    assert (cost["latency_ms"]["n"], cost["images_per_second"]["n"]) == (15, 3)
    assert cost["images_per_second"]["batch_size"] == 600  # more than there are test images
    for entry in (cost["latency_ms"], cost["images_per_second"]):
        low, high = entry["quartiles"]
        assert 0 < low <= entry["median"] <= high
