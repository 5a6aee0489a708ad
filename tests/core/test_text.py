"""gs.text_batches: windows of running text, padded rows of a list, and clear refusals."""

import pytest
import torch

import gossamer as gs
from gossamer.core.text import windows

TEXT = "".join(f"sentence {n} about weights. " for n in range(60))


class Words:
    """A tokenizer of words: ids count from 1; 0 pads."""

    pad_token_id = 0

    def __call__(self, text, truncation=False, max_length=None):
        ids = [1 + sum(word.encode()) % 90 for word in text.split()]
        return {"input_ids": ids[:max_length] if truncation else ids}


def test_windows_come_from_the_text_and_from_the_seed():
    batches = gs.text_batches(Words(), TEXT, samples=10, length=12, batch=4, seed=3)
    assert [tuple(b["input_ids"].shape) for b in batches] == [(4, 12), (4, 12), (2, 12)]
    ids = Words()(TEXT)["input_ids"]
    for row in torch.cat([b["input_ids"] for b in batches]).tolist():
        assert any(ids[at : at + 12] == row for at in range(len(ids)))
    again = gs.text_batches(Words(), TEXT, samples=10, length=12, batch=4, seed=3)
    other = gs.text_batches(Words(), TEXT, samples=10, length=12, batch=4, seed=4)
    assert torch.equal(again[0]["input_ids"], batches[0]["input_ids"])
    assert not torch.equal(other[0]["input_ids"], batches[0]["input_ids"])


def test_text_bytes_files_and_folders_give_the_same(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    forms = [TEXT, TEXT.encode(), tmp_path / "a.txt", str(tmp_path / "a.txt"), tmp_path]
    found = [gs.text_batches(None, form, samples=4, length=20)[0]["input_ids"] for form in forms]
    assert all(torch.equal(one, found[0]) for one in found)
    raw = TEXT.encode()
    assert bytes(found[0][0].tolist()) in raw


def test_a_list_gives_a_padded_row_for_each_text():
    lines = ["one two three", "four", "five six seven eight nine ten"]
    (batch,) = gs.text_batches(Words(), lines, samples=8, length=4)
    lengths = sorted(batch["attention_mask"].sum(1).tolist())
    assert tuple(batch["input_ids"].shape) == (3, 4) and lengths == [1, 3, 4]
    assert not batch["input_ids"][batch["attention_mask"] == 0].any()
    assert len(gs.text_batches(Words(), lines, samples=2)[0]["input_ids"]) == 2


def test_tokenizers_of_transformers_without_a_padding_token(tiny_llama):
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    vocabulary = {word: n for n, word in enumerate(["?", *sorted(set(TEXT.split()))])}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=16)
    batch = gs.text_batches(tokenizer, TEXT, samples=4, length=16)[0]
    assert tokenizer.decode(batch["input_ids"][0]) in TEXT
    (rows,) = gs.text_batches(tokenizer, TEXT.split(". ")[:5], length=6)
    assert tuple(rows["input_ids"].shape) == tuple(rows["attention_mask"].shape)
    result = gs.prune(tiny_llama(layers=1), gs.weights.Wanda(), density=0.5, data=[rows])
    assert result.measured_density == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((None, "too short"), "9 tokens; windows of 512"),
        ((None, "notes/missing.txt"), "there is no file"),
        ((None, b""), "0 tokens"),
        ((None, []), "none of them empty"),
        ((None, ["a", ""]), "none of them empty"),
        ((None, 3), "text, a path or a list"),
        ((None, TEXT, 0), "at least 1"),
        ((3, TEXT), "tokenizer is one of transformers"),
    ],
    ids=str,
)
def test_bad_text_is_a_usage_error(arguments, says):
    with pytest.raises(gs.UsageError, match=says):
        gs.text_batches(*arguments)


def test_missing_paths_and_folders_without_text(tmp_path):
    with pytest.raises(gs.UsageError, match="no such file"):
        gs.text_batches(None, tmp_path / "missing.txt")
    with pytest.raises(gs.UsageError, match="ends in"):
        gs.text_batches(None, tmp_path)
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(gs.UsageError, match="holds no text"):
        gs.text_batches(None, tmp_path)


def test_windows_reach_the_end_but_no_further():
    rows = windows(torch.arange(10), 200, 7, 0)
    assert rows.min() == 0 and rows[:, 0].max() <= 3 and rows.shape == (200, 7)
