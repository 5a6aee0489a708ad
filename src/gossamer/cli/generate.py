"""gossamer generate."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Literal

from gossamer.api_activations import method_of, sparsify_activations
from gossamer.api_attention import attention_cache, serves_prompts, sparse_attention
from gossamer.cli.activations import calibration
from gossamer.cli.inputs import BUNDLED, BUNDLED_TEXT, read_model
from gossamer.cli.output import note, print_json
from gossamer.core.errors import UsageError
from gossamer.engine.progress import track
from gossamer.engine.serve.generate import generate


@dataclass
class Generate:
    """Continue a text by greedy decoding.

    Example: gossamer generate gossamer-out --prompt "def main(" --tokens 80
    """

    PLACES = ("model",)

    model: str = BUNDLED
    """folder of a model, compressed or ordinary, a hub name such as org/name, or testbed:lm"""
    prompt: str = "import "
    """text to continue"""
    tokens: int = 64
    """how many tokens to add at most; fewer where the model ends its text"""
    attention: str | None = None
    """method that chooses which pairs of the prompt's tokens are attended, such as
    blocksparse:density=0.3, or what new tokens read, such as quest:tokens=1024; see gossamer
    methods attention"""
    cache: str | None = None
    """method that keeps or reads a part of the cache for new tokens, beside one of --attention,
    such as snapkv:tokens=1024"""
    dense_below: int = 2048
    """tokens below which a prompt is attended densely, with --attention"""
    activations: str | None = None
    """method that chooses the inputs of layers that each new token reads, such as
    teal:density=0.5; see gossamer methods activations"""
    data: str = BUNDLED_TEXT
    """text to calibrate --activations with: a file, a folder of text files, or testbed:text"""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """dtype in which the model is read"""
    json: bool = False
    """print one JSON object"""

    def run(self) -> None:
        """Print the continued text on stdout and the speed on stderr."""
        if self.tokens < 1:
            raise UsageError(f"--tokens is at least 1, not {self.tokens}")
        if not self.prompt:
            raise UsageError("--prompt is empty; give at least one character")
        activations = None if self.activations is None else method_of(self.activations)
        subject = read_model(self.model, self.dtype)
        ids = subject.ids(self.prompt.encode()).unsqueeze(0)
        prompts, caches = self._methods()
        cache = None if caches is None else attention_cache(subject.model, caches)
        block = (
            nullcontext()
            if prompts is None
            else sparse_attention(subject.model, prompts, dense_below=self.dense_below)
        )
        choosing = (
            nullcontext()
            if activations is None
            else sparsify_activations(
                subject.model, activations, calibration(subject, self.data), progress=True
            )
        )
        with choosing as inputs, block as run, track(None, True, "generating"):
            start = time.perf_counter()
            out = generate(subject.model, ids, self.tokens, cache=cache)[0].tolist()
            rate = (len(out) - ids.shape[1]) / (time.perf_counter() - start)
        made = len(out) - ids.shape[1]
        if subject.tokenizer is None:
            text = bytes(out).decode("utf-8", "replace")
        else:
            text = subject.tokenizer.decode(out, skip_special_tokens=True)
        blocks: dict[str, Any] = {"attention": run, "cache": cache, "activations": inputs}
        results = {name: x.result for name, x in blocks.items() if x is not None}
        if self.json:
            found = {"text": text, "tokens": made, "tokens_per_second": rate}
            print_json(found | {name: asdict(result) for name, result in results.items()})
        else:
            print(text)
            note(f"{made} tokens, {rate:.1f} tokens/s with the prompt")
            for result in results.values():
                note(str(result))

    def _methods(self) -> tuple[str | None, str | None]:
        """What chooses in the prompt, and what keeps or reads the cache."""
        if self.attention is None or serves_prompts(self.attention):
            return self.attention, self.cache
        if self.cache is not None:
            raise UsageError(
                f"--attention {self.attention} and --cache {self.cache} are both for the cache; "
                "give one of them"
            )
        return None, self.attention
