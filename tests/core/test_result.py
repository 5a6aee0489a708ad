"""Results unwrap to their model; strangers are refused."""

import pytest
import torch
from torch import nn

from gossamer.core.errors import GossamerError, MissingExtra, UsageError
from gossamer.core.pattern import Unstructured
from gossamer.core.result import CompressResult, PruneResult, unwrap
from gossamer.core.support import Support


def test_unwrap():
    model = nn.Linear(2, 2)
    pruned = PruneResult(model, {}, (), "magnitude", "unstructured", 0.5, 0.5)
    assert unwrap(model) is unwrap(pruned) is unwrap(CompressResult(model, (), "avx2", 1)) is model
    with pytest.raises(UsageError, match="dict"):
        unwrap({})


def test_missing_extra_names_the_extra():
    error = MissingExtra("rich", "cli")
    assert "gossamer[cli]" in str(error)
    assert isinstance(error, GossamerError) and isinstance(error, ImportError)


def test_support_mask_is_bool():
    with pytest.raises(UsageError, match="bool"):
        Support(torch.ones(2, 2), Unstructured(), 0.5)


def test_a_result_of_compress_is_one_line_until_it_is_printed():
    from torch import nn

    from gossamer.core.result import CompressResult, LayerRecord

    layers = (
        LayerRecord("a", (4, 4), 0.5, 0.5, kernel="bitmap-matvec/avx2"),
        LayerRecord("b", (4, 4), 1.0, 1.0, reason="no zeros"),
        LayerRecord("<c>", (4, 4), 0.5, 0.5, reason="no kernel wins: predicted dense 1 ms"),
        LayerRecord("d", (4, 4), 1.0, 1.0, reason="no zeros"),
    )
    result = CompressResult(nn.Sequential(), layers, "avx2", 1)
    line = "1 of 4 layers run sparse, 3 dense (2 no zeros; 1 no kernel wins)"
    assert result.summary == line and repr(result) == f"CompressResult(Sequential: {line})"
    assert str(result).splitlines()[1] == line and "d: 4 x 4" in str(result)
    page = result._repr_html_()
    assert page.count("<tr>") == 5 and "&lt;c&gt;" in page and line in page
