"""The card of a saved model, and what is sent to the Hub."""

import pytest
import torch
from torch import nn

import gossamer as gs
from gossamer.core.errors import FormatError


@pytest.fixture
def saved(tmp_path, tiny_llama):
    pruned = gs.prune(tiny_llama(positions=64), gs.weights.Magnitude(), density=0.4)
    facts = {"method": "magnitude", "bits per byte": 1.25, "note": "a | b\nc", "data": [1, 2]}
    gs.save(gs.compress(pruned), tmp_path / "out", provenance=facts)
    return tmp_path / "out"


def test_the_card_says_what_was_measured_and_given(saved):
    text = (saved / "README.md").read_text()
    model = gs.load(saved)
    dense = sum(p.numel() for p in model.parameters())
    kept = sum(m.values.numel() for m in model.modules() if hasattr(m, "bitmap"))
    total = dense + sum(m.in_features * m.out_features for m in model.modules()
                        if hasattr(m, "bitmap"))  # fmt: skip
    assert f"{dense + kept:,} of {total:,} weights" in text
    assert "| Method | magnitude |" in text and "| bits per byte | 1.25 |" in text
    assert r"| note | a \| b c |" in text and "data" not in text.split("```")[0]


def test_it_may_be_edited_or_left_out(saved, tmp_path):
    (saved / "README.md").write_text("mine")
    gs.load(saved)
    gs.save(gs.load(saved), tmp_path / "again", readme=False)
    assert not (tmp_path / "again/README.md").exists()
    gs.save(nn.Sequential(nn.Linear(4, 4)), tmp_path / "plain")
    assert not (tmp_path / "plain/README.md").exists()


def test_push_sends_a_whole_folder_or_nothing(saved, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    calls = []

    class Api:
        def __init__(self, token=None):
            calls.append(("token", token))

        def create_repo(self, repo_id, private, exist_ok):
            calls.append(("create", repo_id, private, exist_ok))
            return f"https://hub/{repo_id}"

        def upload_folder(self, repo_id, folder_path, commit_message):
            calls.append(("upload", repo_id, folder_path))

    monkeypatch.setattr(hub, "HfApi", Api)
    assert gs.push(saved, "me/x", private=True, token="t") == "https://hub/me/x"
    assert calls == [
        ("token", "t"), ("create", "me/x", True, True), ("upload", "me/x", str(saved)),
    ]  # fmt: skip
    calls.clear()
    (saved / "config.json").write_text("{}")
    with pytest.raises(FormatError, match=r"config\.json"):
        gs.push(saved, "me/x")
    assert calls == []


def test_a_pruned_model_has_a_card_and_a_dense_one_has_none(tmp_path, tiny_llama):
    model = tiny_llama(positions=64)
    gs.save(model, tmp_path / "dense")
    assert not (tmp_path / "dense/README.md").exists()
    gs.prune(model, gs.weights.Magnitude(), density=0.4)
    gs.save(model, tmp_path / "out")
    text = (tmp_path / "out/README.md").read_text()
    total = sum(p.numel() for p in model.parameters())
    kept = sum(int(p.count_nonzero()) for p in model.parameters())
    assert "not recorded" in text and "Packed" not in text
    assert f"{kept:,} of {total:,}" in text
    assert torch.equal(gs.load(tmp_path / "out").lm_head.weight, model.lm_head.weight)
