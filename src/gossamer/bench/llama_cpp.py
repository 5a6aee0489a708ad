"""llama.cpp as a baseline of whole models: the same random weights, class by class, in one process.

Half of our weights are zero: bfloat16 against F16, 8 bits against Q8_0, 4 bits (the head 8) against
Q4_0, both integers with 2:4 zeros too; then our dense integers, which any zeros have to beat. Model
files go to a folder and are used again.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gossamer.bench.decode import build
from gossamer.bench.measure import Limits
from gossamer.core.errors import GossamerError, MissingExtra
from gossamer.core.pattern import Pattern, parse_pattern
from gossamer.core.select import select
from gossamer.engine.serve.compress import compress
from gossamer.engine.serve.decoder import Decoder
from gossamer.io import load, save
from gossamer.nn import BitmapLinear, QuantizedLinear
from gossamer.nn.serving import serves


@dataclass(frozen=True)
class Class:
    """What meets what: bits None for bfloat16, pattern "" for dense."""

    baseline: str
    bits: int | None
    pattern: str

    @property
    def folder(self) -> str:
        """The name of the folder that holds our side."""
        return f"ours-{self.baseline}-{(self.pattern or 'dense').replace(':', '-')}"


CLASSES = (
    Class("F16", None, "unstructured:row"),
    Class("Q8_0", 8, "unstructured:row"),
    Class("Q8_0", 8, "2:4"),
    Class("Q4_0", 4, "unstructured:row"),
    Class("Q4_0", 4, "2:4"),
    Class("Q8_0", 8, ""),
    Class("Q4_0", 4, ""),
)
_KINDS = {"F16": None, "Q8_0": 7, "Q4_0": 2}
PROMPT, STEPS = 256, 16
_NAMES = {
    "model.embed_tokens": "token_embd",
    "lm_head": "output",
    "model.norm": "output_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def missing() -> str | None:
    """What to install before llama.cpp can be compared with; None when it is there."""
    absent = [name for name in ("llama_cpp", "gguf") if importlib.util.find_spec(name) is None]
    return f"llama.cpp is not compared: {MissingExtra(absent[0], 'baselines')}" if absent else None


def prepare(folder: Path, geometry: str) -> None:
    """Write the models of every class that are not there yet; random weights, seed 0."""
    baselines = [kind for kind in _KINDS if not (folder / f"{kind}.gguf").exists()]
    wanted = [each for each in CLASSES if not (folder / each.folder).exists()]
    if not baselines and not wanted:
        return
    folder.mkdir(parents=True, exist_ok=True)
    dense = build(geometry, torch.bfloat16)
    for kind in baselines:
        _write_peer(dense, folder, kind)
    for each in wanted:
        model = copy.deepcopy(dense)
        if each.pattern:
            _prune(model, parse_pattern(each.pattern))
        compress(model, bits=each.bits, latency="rule")
        save(model, folder / each.folder)


def _prune(model: nn.Module, pattern: Pattern) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            support = select(module.weight.detach().float().abs(), pattern, 0.5)
            module.weight.data *= support.mask


def _write_peer(dense: nn.Module, folder: Path, kind: str) -> None:
    """A file has its name only once it is whole."""
    library: Any = importlib.import_module("llama_cpp")
    target, part = folder / f"{kind}.gguf", folder / f"{kind}.part"
    if _KINDS[kind] is None:
        _write_gguf(dense, part)
    else:
        params = library.llama_model_quantize_default_params()
        params.ftype, params.nthread = _KINDS[kind], torch.get_num_threads()
        source = str(folder / "F16.gguf").encode()
        if library.llama_model_quantize(source, str(part).encode(), params):
            raise GossamerError(f"llama.cpp could not write {target}")
    part.rename(target)


def _write_gguf(model: Any, path: Path) -> None:
    gguf: Any = importlib.import_module("gguf")
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    words = ["<unk>", "<s>", "</s>"] + [f"w{i}" for i in range(config.vocab_size - 3)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * len(words))
    writer.add_token_types([2, 3, 3] + [1] * (len(words) - 3))
    for name, tensor in model.state_dict().items():
        part = name.removesuffix(".weight")
        if part.startswith("model.layers."):
            _, _, layer, part = part.split(".", 3)
            key = f"blk.{layer}.{_NAMES[part]}.weight"
        else:
            key = f"{_NAMES[part]}.weight"
        writer.add_tensor(key, (tensor.half() if tensor.dim() == 2 else tensor.float()).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def measure(
    folder: Path, geometry: str, each: Class, limits: Limits, repeats: int = 5
) -> dict[str, Any]:
    """Tokens per second of decoding and of a prompt, ours and llama.cpp's in turns.

    Raises GossamerError where our compiled step differs from the model run layer by layer.
    """
    library: Any = importlib.import_module("llama_cpp")
    model = load(folder / each.folder)
    theirs = library.Llama(
        str(folder / f"{each.baseline}.gguf"),
        n_ctx=2 * PROMPT,
        n_batch=PROMPT,
        n_threads=torch.get_num_threads(),
        n_threads_batch=torch.get_num_threads(),
        verbose=False,
    )
    prompt = torch.randint(3, 32000, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        _check(model, prompt[:, :16], each.folder)
        turns = [(_ours(model, prompt), _theirs(theirs, prompt)) for _ in range(repeats + 1)][1:]
    baseline = f"llama.cpp {each.baseline}"
    (our_step, our_prompt), (step, whole) = (
        [statistics.median(turn[who][what] for turn in turns) for what in (0, 1)] for who in (0, 1)
    )
    return {
        "case": {
            "geometry": geometry,
            "dtype": "bfloat16" if each.bits is None else f"int{each.bits}",
            "density": 0.5 if each.pattern else 1.0,
            "pattern": each.pattern or "dense",
            "batch": 1,
            "baseline": baseline,
        },
        "tokens_per_second": {"gossamer": 1 / our_step, baseline: 1 / step},
        "best_dense": baseline,
        "ratio": step / our_step,
        "prompt_tokens_per_second": {"gossamer": PROMPT / our_prompt, baseline: PROMPT / whole},
        "prompt_ratio": whole / our_prompt,
        "file_bytes": {
            "gossamer": sum(f.stat().st_size for f in (folder / each.folder).glob("*.safe*")),
            baseline: (folder / f"{each.baseline}.gguf").stat().st_size,
        },
        "fraction_of_limit": limits.seconds(_bytes(model), 0.0)[0] / our_step,
        "limit": "bytes",
        "kernel": _kernel(model),
    }


def _kernel(model: nn.Module) -> str:
    """What serves most layers."""
    packed = (m for m in model.modules() if isinstance(m, BitmapLinear | QuantizedLinear))
    return Counter(serves(layer)[0] for layer in packed).most_common(1)[0][0]


def _check(model: nn.Module, prompt: torch.Tensor, name: str) -> None:
    """No speed for a step that computes something else than the layers do."""
    decoder = Decoder(model, prompt.shape[1] + 1)
    decoder.prefill(prompt[:, :-1])
    found = decoder.step(int(prompt[0, -1])).clone()
    call: Callable[..., Any] = model
    expected = call(input_ids=prompt, logits_to_keep=1).logits[0, -1].float()
    error = float((found - expected).norm() / expected.norm())
    if not error < 0.1:  # bfloat16 layers and rounded inputs against float32 sums
        raise GossamerError(f"decoding is wrong for {name}: relative error {error:.1e}")


def _ours(model: nn.Module, prompt: torch.Tensor) -> tuple[float, float]:
    """Seconds of a step and of the prompt."""
    decoder = Decoder(model, PROMPT + STEPS + 1)
    start = time.perf_counter()
    decoder.prefill(prompt)
    whole = time.perf_counter() - start
    decoder.step(5)
    start = time.perf_counter()
    for token in range(STEPS):
        decoder.step(10 + token)
    return (time.perf_counter() - start) / STEPS, whole


def _theirs(model: Any, prompt: torch.Tensor) -> tuple[float, float]:
    model.reset()
    start = time.perf_counter()
    model.eval(prompt[0].tolist())
    whole = time.perf_counter() - start
    model.eval([5])
    start = time.perf_counter()
    for token in range(STEPS):
        model.eval([10 + token])
    return (time.perf_counter() - start) / STEPS, whole


def _bytes(model: nn.Module) -> int:
    """Of the weights that a step reads."""
    total = 0
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            total += module.matrix.nbytes
        elif isinstance(module, BitmapLinear):
            total += module.values.nbytes + module.bitmap.nbytes
        elif isinstance(module, nn.Linear):
            total += module.weight.nbytes
    return total
