"""Model types that transformers can build are types that a folder can describe: one in twelve.

All of them take about half an hour: EVERY=1.
"""

import json
import os

import pytest
import torch

from gossamer.core.errors import FormatError
from gossamer.io.fill import check_tensors
from gossamer.io.skeleton import LARGEST_BUFFERS, computed_bytes, outline, skeleton

tf = pytest.importorskip("transformers")
EVERY = int(os.environ.get("EVERY", "12"))
ENDINGS = ("Model", "ForCausalLM", "ForConditionalGeneration")


def configs():
    """config.json at the defaults of public classes that build with them."""
    names = [n for n in dir(tf) if n.endswith(ENDINGS) and not n.startswith("Auto")]
    for name in names[::EVERY]:
        kind = getattr(tf, name, None)
        if not (isinstance(kind, type) and issubclass(kind, tf.PreTrainedModel)):
            continue
        if kind is tf.PreTrainedModel or kind.config_class is None:
            continue
        try:
            config = kind.config_class()
            with torch.device("meta"):
                kind(config)
        except Exception:  # its defaults describe no whole model
            continue
        yield name, {**json.loads(config.to_json_string()), "architectures": [name]}


@pytest.mark.slow
def test_types_are_rebuilt_with_real_buffers_and_without_weights():
    tf.logging.set_verbosity_error()
    tried, failed = 0, {}
    for name, config in configs():
        tried += 1
        try:
            drawn, built = outline(config), skeleton(config)
            present = {k: (tuple(t.shape), t.is_floating_point())
                       for k, t in drawn.state_dict().items()}  # fmt: skip
            check_tensors(built, (), present)
            assert computed_bytes(drawn) < LARGEST_BUFFERS / 4
            assert all(parameter.is_meta for parameter in built.parameters())
            assert not any(buffer.is_meta for buffer in built.buffers())
        except (FormatError, AssertionError) as error:
            failed[name] = str(error)[:200]
    assert tried > 1000 // EVERY and not failed, failed
