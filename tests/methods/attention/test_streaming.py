"""StreamingLLM keeps the first keys and the window, pair by pair."""

import pytest
import torch
from maps import attended, normal_call

import gossamer as gs


@pytest.mark.parametrize("window", [1, 5, 16, 17, 40, 200])
@pytest.mark.parametrize("sinks", [0, 4, 20])
@pytest.mark.parametrize(("queries", "past"), [(70, 0), (64, 0), (10, 51)])
def test_pairs_are_the_sinks_and_the_window(window, sinks, queries, past):
    call = normal_call(queries, past=past, batch=2)
    mask = attended(gs.attention.StreamingLLM(window, sinks, block=16).layout(call), call)
    key, query = torch.arange(call.keys), torch.arange(queries).unsqueeze(1) + past
    wanted = (key <= query) & ((key < sinks) | (key > query - window))
    assert torch.equal(mask, wanted.expand_as(mask))
