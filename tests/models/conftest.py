"""What tests of models compare gradients with."""

import pytest
import torch


@pytest.fixture
def assert_equal():
    """Fails where two dicts of tensors differ in a bit, and names them."""

    def check(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
        assert actual.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []

    return check


@pytest.fixture
def relative_error():
    """L2 norm of the difference of two dicts of tensors over that of the expected one."""

    def measure(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
        difference = sum((actual[n].double() - expected[n].double()).square().sum() for n in expected)
        return (difference / sum(g.double().square().sum() for g in expected.values())).sqrt().item()

    return measure
