"""The whole random family of losses, and those outside it: `make chaos`."""

import pytest
from known_losses import check_family_member, check_outside_member

pytestmark = pytest.mark.chaos


@pytest.mark.parametrize("seed", range(20, 200))
def test_a_random_member_of_the_family_is_recovered(seed):
    check_family_member(seed)


@pytest.mark.parametrize("seed", range(20, 50))
def test_another_loss_is_not_misnamed(seed):
    check_outside_member(seed)
