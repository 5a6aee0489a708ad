"""The names that model families use. Structure decides first; these settle what it cannot."""

from __future__ import annotations

BLOCK_LISTS: dict[str, str] = {
    "model.layers": "Llama, Mistral, Qwen, Gemma, Phi",
    "transformer.h": "GPT-2, GPT-J, BLOOM, Falcon",
    "decoder.layers": "OPT",
    "gpt_neox.layers": "GPT-NeoX, Pythia",
    "encoder.layer": "BERT, RoBERTa, MiniLM, ViT before transformers 5",
    "vit.layers": "ViT",
    "encoder.layers": "CLIP, SigLIP",
}
"""Ends of the dotted names of block lists, trusted even with one block or mixed classes."""

HEADS = frozenset(
    {
        "lm_head",
        "embed_out",
        "classifier",
        "score",
        "pooler",
        "head",
        "heads",
        "qa_outputs",
        "cls",
        "predictions",
    }
)
"""Components of a dotted name that mark an output head: left dense unless named in."""


def is_head(name: str) -> bool:
    """Whether a dotted module name lies in an output head."""
    return any(part in HEADS for part in name.split("."))


def is_block_list(name: str) -> bool:
    """Whether a dotted name ends as a known family's list of blocks does."""
    return any(name == end or name.endswith("." + end) for end in BLOCK_LISTS)
