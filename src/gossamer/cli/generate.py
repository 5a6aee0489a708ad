"""gossamer generate."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Literal

from gossamer.api_activations import method_of, sparsify_activations
from gossamer.api_attention import sparse_attention
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
    blocksparse:density=0.3; see gossamer methods attention"""
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
        block = (
            nullcontext()
            if self.attention is None
            else sparse_attention(subject.model, self.attention, dense_below=self.dense_below)
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
            out = generate(subject.model, ids, self.tokens)[0].tolist()
            rate = (len(out) - ids.shape[1]) / (time.perf_counter() - start)
        made = len(out) - ids.shape[1]
        if subject.tokenizer is None:
            text = bytes(out).decode("utf-8", "replace")
        else:
            text = subject.tokenizer.decode(out, skip_special_tokens=True)
        if self.json:
            found: dict[str, object] = {"text": text, "tokens": made, "tokens_per_second": rate}
            if run is not None:
                found["attention"] = asdict(run.result)
            if inputs is not None:
                found["activations"] = asdict(inputs.result)
            print_json(found)
        else:
            print(text)
            note(f"{made} tokens, {rate:.1f} tokens/s with the prompt")
            if run is not None:
                note(str(run.result))
            if inputs is not None:
                note(str(inputs.result))
