"""Nothing grows faster than the method itself does: exponents of counted costs.

Those that are counted on the device are in `accounting/test_fake_cuda.py`.
"""

import pytest

from benchmarks import growth
from benchmarks.growth import Growth


def test_no_cost_of_the_host_is_quadratic_that_need_not_be() -> None:
    growths = growth.on_host(lengths=(2_048, 4_096), blocks=(4, 8), response=16)
    for found in growths:
        assert found.last_exponent <= found.nature + 0.1, found
    by_cost = {found.cost: found for found in growths}
    # Attention is quadratic in a document, not in a row of documents.
    assert by_cost["pairs of an update, one document"].last_exponent > 1.9
    assert by_cost["pairs of an update, documents of 1k"].last_exponent == pytest.approx(1)
    assert by_cost["forwards of a decoded token"].values == pytest.approx((1, 1))


def test_an_exponent_is_the_slope_of_the_logarithms() -> None:
    cubic = Growth("cost", "axis", 3, "", (2, 4, 8), (24.0, 192.0, 1536.0))
    assert (cubic.exponent, cubic.last_exponent) == pytest.approx((3, 3))
    turning = Growth("cost", "axis", 1, "", (1, 10, 100), (10.0, 10.0, 1000.0))
    assert turning.exponent == pytest.approx(1)
    assert turning.last_exponent == pytest.approx(2)
