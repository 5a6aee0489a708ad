"""The file format: a folder of safetensors, config.json and gossamer.json; never pickle."""

from gossamer.io.card import push
from gossamer.io.export import export
from gossamer.io.load import load, verify
from gossamer.io.manifest import read_manifest
from gossamer.io.save import save

__all__ = ["export", "load", "push", "read_manifest", "save", "verify"]
