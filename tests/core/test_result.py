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
