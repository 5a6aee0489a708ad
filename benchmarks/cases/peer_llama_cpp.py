"""Decoding and prompts against llama.cpp, class by class, in one process, two threads.

A Llama geometry with random weights, half of ours zero: bfloat16 against F16, 8 bits against Q8_0,
4 bits (the head 8) against Q4_0. Files go to a folder and are used again; decoding takes turns.
Writes benchmarks/results/llama_cpp.json. Needs llama-cpp-python and gguf.
Run: python benchmarks/cases/peer_llama_cpp.py FOLDER [--geometry llama-1b] [--prepare]
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import gguf
import llama_cpp
import torch

import gossamer as gs
from gossamer.bench.decode import GEOMETRIES, build
from gossamer.bench.measure import measure_limits
from gossamer.engine.decoder import Decoder

OUT = Path(__file__).parents[1] / "results" / "llama_cpp.json"
CLASSES = {"F16": None, "Q8_0": 8, "Q4_0": 4}
PARTS = {
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


def write_gguf(model: torch.nn.Module, path: Path) -> None:
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
        key = {"model.embed_tokens.weight": "token_embd.weight", "lm_head.weight": "output.weight",
               "model.norm.weight": "output_norm.weight"}.get(name)  # fmt: skip
        if key is None:
            _, _, layer, part = name.removesuffix(".weight").split(".", 3)
            key = f"blk.{layer}.{PARTS[part]}.weight"
        writer.add_tensor(key, (tensor.half() if tensor.dim() == 2 else tensor.float()).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def prepare(folder: Path, geometry: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if all((folder / f"{name}.ok").exists() for name in CLASSES):
        return
    dense = build(geometry, torch.bfloat16)
    write_gguf(dense, folder / "F16.gguf")
    for name, kind in (("Q8_0", 7), ("Q4_0", 2)):
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.nthread = kind, 2
        done = llama_cpp.llama_model_quantize(
            str(folder / "F16.gguf").encode(), str(folder / f"{name}.gguf").encode(), params
        )
        assert not done
    gs.prune(dense, gs.Magnitude(), density=0.5)
    for name, bits in CLASSES.items():
        model = copy.deepcopy(dense)
        gs.compress(model, bits=bits)
        gs.save(model, folder / f"ours-{name}", overwrite=True)
        (folder / f"{name}.ok").touch()


def stored(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def measure(folder: Path, name: str, repeats: int, steps: int = 16) -> dict[str, object]:
    model = gs.load(folder / f"ours-{name}")
    theirs = llama_cpp.Llama(
        str(folder / f"{name}.gguf"), n_ctx=512, n_batch=256, n_threads=2, n_threads_batch=2,
        verbose=False,
    )  # fmt: skip
    prompt = torch.randint(3, 32000, (1, 256), generator=torch.Generator().manual_seed(1))
    times: dict[str, list[float]] = {
        k: [] for k in ("ours", "theirs", "our prompt", "their prompt")
    }
    for repeat in range(repeats + 1):
        with torch.inference_mode():
            decoder = Decoder(model, 300)
            start = time.perf_counter()
            decoder.prefill(prompt)
            took = time.perf_counter() - start
            decoder.step(5)
            start = time.perf_counter()
            for token in range(steps):
                decoder.step(10 + token)
            ours = (time.perf_counter() - start) / steps
        theirs.reset()
        start = time.perf_counter()
        theirs.eval(prompt[0].tolist())
        their_prompt = time.perf_counter() - start
        theirs.eval([5])
        start = time.perf_counter()
        for token in range(steps):
            theirs.eval([10 + token])
        found = (time.perf_counter() - start) / steps
        if repeat:
            for key, value in zip(times, (ours, found, took, their_prompt), strict=True):
                times[key].append(value)
    middle = {key: statistics.median(value) for key, value in times.items()}
    return {
        "llama.cpp": name,
        "ours": "bfloat16 + 50%" if name == "F16" else f"int{CLASSES[name]} + 50%",
        "tokens_per_second": {"ours": 1 / middle["ours"], "llama.cpp": 1 / middle["theirs"]},
        "ratio": middle["theirs"] / middle["ours"],
        "prompt_tokens_per_second": {
            "ours": 256 / middle["our prompt"],
            "llama.cpp": 256 / middle["their prompt"],
        },
        "prompt_ratio": middle["their prompt"] / middle["our prompt"],
        "file_bytes": {
            "ours": stored(folder / f"ours-{name}"),
            "llama.cpp": (folder / f"{name}.gguf").stat().st_size,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--geometry", default="llama-1b", choices=list(GEOMETRIES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prepare", action="store_true", help="write the files only")
    args = parser.parse_args()
    prepare(args.folder, args.geometry)
    if args.prepare:
        return
    limits = measure_limits()
    record = {
        "geometry": f"{args.geometry}, random weights",
        "read_bytes_per_second": limits.read,
        "threads": limits.threads,
        "classes": [measure(args.folder, name, args.repeats) for name in CLASSES],
        "versions": {
            "llama-cpp-python": version("llama-cpp-python"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    OUT.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
