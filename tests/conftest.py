"""What tests of several folders share."""

import os

import pytest
import torch
from hypothesis import settings

from gossamer.core.errors import UsageError
from gossamer.testbed.packaged import folder

settings.register_profile("repeatable", derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))
"""`make test` tries the same examples every time; `make fuzz` tries new ones."""


@pytest.fixture(autouse=True, scope="session")
def no_cached_latency(tmp_path_factory):
    """No test reads or writes the costs that this user has measured, or goes by speeds of now:
    `latency=None` is the rule. What measures is tested by hand. Gives the user's setting."""
    with pytest.MonkeyPatch.context() as patch:
        users = os.environ.get("XDG_CACHE_HOME", "")
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr("gossamer.nn.kernel_choice.machine.measure_here", lambda: None)
        yield users


@pytest.fixture(scope="session")
def packaged_folder(no_cached_latency):
    """packaged_folder(name): what `make test-models` fetches; skips where it is absent."""

    def find(name):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", no_cached_latency)
            try:
                return folder(name)
            except UsageError as error:
                pytest.skip(str(error))

    return find


@pytest.fixture(scope="session")
def over_threads():
    """over_threads(call, counts): what the call returns under each number of torch's threads."""

    def run(call, counts=(1, 2, 3)):
        before, results = torch.get_num_threads(), []
        try:
            for count in counts:
                torch.set_num_threads(count)
                results.append(call())
        finally:
            torch.set_num_threads(before)
        return results

    return run


@pytest.fixture(scope="session")
def tiny_llama():
    """tiny_llama(width, layers, positions): random weights for bytes, from a fixed seed."""
    transformers = pytest.importorskip("transformers")

    def build(width=64, layers=2, positions=512):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=256, hidden_size=width, intermediate_size=2 * width,
            num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=positions, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config).eval()

    return build
