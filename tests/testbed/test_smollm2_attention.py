"""Sparse prefill on a real model: SmolLM2-135M, which `make test-models` fetches."""

import pytest
import torch

import gossamer as gs
from gossamer.testbed import heldout_text

pytestmark = pytest.mark.models
TOKENS = 1100


@pytest.fixture(scope="module")
def model(smollm2_folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        smollm2_folder, dtype=torch.float32, local_files_only=True
    ).eval()


@pytest.fixture(scope="module")
def ids(smollm2_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder, local_files_only=True)
    return tokenizer(heldout_text()[:20000].decode(), return_tensors="pt").input_ids[:, :TOKENS]


def loss(model, ids):
    with torch.no_grad():
        return float(model(ids, labels=ids).loss)


@pytest.mark.parametrize(
    ("method", "density", "recall", "slack"),
    [
        ("blocksparse:block=64,density=0.5", 0.5, 0.85, 0.25),
        ("streamingllm:window=512", 0.75, 0.9, 0.2),
        ("verticalslash:verticals=128,slashes=128", 0.65, 0.9, 0.1),
        ("anchorattention:theta=6,step=4", 0.9, 0.95, 0.05),
    ],
)
def test_most_of_attention_is_kept_and_the_text_is_still_read(
    model, ids, method, density, recall, slack
):
    dense = loss(model, ids)
    with gs.sparse_attention(model, method, dense_below=0, measure=True) as run:
        sparse = loss(model, ids)
    result = run.result
    assert result.calls == len(result.layers) == 30
    assert result.density < density and result.recall > recall
    assert abs(sparse - dense) < slack * dense


def test_a_prompt_below_the_break_even_is_the_dense_one(model, ids):
    with torch.no_grad():
        dense = model(ids).logits
        with gs.sparse_attention(model, "blocksparse") as run:
            assert torch.equal(model(ids).logits, dense)
    assert run.result.short_calls == 30 and run.result.calls == 0
