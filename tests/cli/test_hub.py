"""Names of the hub: the local cache, offline too; never code, never pickles."""

import pytest

import gossamer as gs
from gossamer.cli.hub import model_folder

hub = pytest.importorskip("huggingface_hub")


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A folder that the cache gives for `org/name`; every other name is not there."""
    folder = tmp_path / "cached"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    calls = []

    def snapshot(name, **options):
        calls.append((name, options))
        if name == "org/name":
            return str(folder)
        raise OSError("no such repository\non any line")

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    return folder, calls


def test_the_cache_is_asked_first(cached):
    folder, calls = cached
    (folder / "model.safetensors").write_bytes(b"")
    assert model_folder("org/name") == folder
    assert calls == [("org/name", {"local_files_only": True})]


def test_an_incomplete_copy_is_fetched_without_code_or_pickles(cached):
    _, calls = cached
    with pytest.raises(gs.FormatError, match="no weights"):
        model_folder("org/name")
    (_, options) = calls[-1]
    allowed = options["allow_patterns"]
    assert "*.safetensors" in allowed and not any("py" in x or "bin" in x for x in allowed)


def test_offline_and_not_cached(cached, monkeypatch):
    _, calls = cached
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(gs.UsageError, match="HF_HUB_OFFLINE is set"):
        model_folder("org/other")
    assert all(options == {"local_files_only": True} for _, options in calls)


def test_a_name_that_the_hub_does_not_know(cached):
    with pytest.raises(gs.UsageError, match=r"no such folder.*the hub did not give it \(OSError"):
        model_folder("org/other", "--dense")


def test_folders_and_what_is_none(cached, tmp_path):
    with pytest.raises(gs.UsageError, match="no such folder"):
        model_folder("/missing/place")
    with pytest.raises(gs.UsageError, match=r"config\.json"):
        model_folder(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(gs.UsageError, match="no pickles"):
        model_folder(str(tmp_path))
    with pytest.raises(gs.UsageError, match="is a file"):
        model_folder(str(tmp_path / "config.json"))
    assert not cached[1]
