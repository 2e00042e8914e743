"""What the table of kernels prints of a machine's limits."""

from lablib.bench import kernels
from lablib.kernels.cases import Case


def test_each_way_has_its_own_share_of_the_bandwidth():
    ways = {"ours": lambda: None, "float32 matmul": lambda: None}
    case = Case("a product", ways, moved=1e9, other_moved={"float32 matmul": 4e9})
    limits = {"flops": 1.0, "bandwidth": 1e10}
    assert kernels._shares(case, "ours", 1.0, limits) == ["  10% of bandwidth"]
    assert kernels._shares(case, "float32 matmul", 1.0, limits) == ["  40% of bandwidth"]
