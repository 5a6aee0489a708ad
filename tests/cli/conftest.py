"""Commands find costs that say what the rules say, so that no test measures any."""

import pytest

from gossamer.core.costs import Costs
from gossamer.nn.costs import machine, store_costs


@pytest.fixture(autouse=True, scope="module")
def costs_like_the_rules(no_cached_costs, tmp_path_factory):
    dense = {1: (0.0, 0.0, 1e-9, 0.0, 0.0)}
    sparse = {1: (0.0, 0.0, 0.0, 1.1e-9, 0.0)}
    terms = {}
    for dtype in ("float32", "bfloat16"):
        terms |= {f"dense {dtype}": dense, f"bitmap-matvec {dtype}": sparse}
        terms[f"sell-spmm {dtype}"] = sparse
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("costs")))
        store_costs(Costs(machine(), terms))
        yield
