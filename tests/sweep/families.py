"""The model families of the sweep: small instances with random weights, and batches for each."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Batch = Tensor | Mapping[str, Any]
VOCABULARY = 96
NEW_TOKENS = 5
PAD = 0


@dataclass(frozen=True)
class Family:
    """One family: how to build a small instance, and what to call it with.

    build: a new instance whose weights `settle` fills. batches: the calibration data, which the
    checks of outputs use too; the last one is a single short row where the model takes text.
    decodes: `generate` of transformers serves it. needs: packages beside torch and gossamer.
    """

    name: str
    kind: str
    build: Callable[[], nn.Module]
    batches: Callable[[], list[Batch]]
    decodes: bool = False
    needs: tuple[str, ...] = ()

    def make(self, seed: int = 0) -> nn.Module:
        """A new instance in eval mode with weights from `seed`."""
        torch.manual_seed(seed)
        return settle(self.build(), seed).eval()

    def data(self) -> list[Batch]:
        """The batches, the same at every call."""
        torch.manual_seed(zlib.crc32(self.name.encode()))
        return self.batches()

    def prompt(self) -> dict[str, Any]:
        """What `generate` of transformers is given: the last batch less the decoder's tokens."""
        last = self.data()[-1]
        assert isinstance(last, Mapping)
        return {k: v for k, v in last.items() if not k.startswith("decoder_")}


@torch.no_grad()
def settle(model: nn.Module, seed: int) -> nn.Module:
    """Random weights large enough that every layer shows in the output.

    Small initial weights and zero-initialised branches would hide a wrong layer.
    """
    source = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=source)
        if parameter.dim() < 2:
            parameter.add_(noise, alpha=0.1)
        elif parameter.numel():
            fan = parameter[0].numel() if parameter.dim() != 3 else parameter.shape[-1]
            parameter.copy_(noise * fan**-0.5)
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            module.weight[module.padding_idx] = 0.0
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None:
            module.running_mean.normal_(0.0, 0.3, generator=source)
            module.running_var.uniform_(0.5, 1.5, generator=source)
    return model


def tokens(*, labels: str = "", names: bool = True) -> list[Batch]:
    """Three batches of token ids: padded on the right, full and longer, and one short row.

    labels: also pass as many ids under this name, for encoder-decoders.
    """
    batches: list[Batch] = []
    for rows, length, padding in ((3, 12, 5), (2, 16, 0), (1, 6, 0)):
        ids = torch.randint(3, VOCABULARY, (rows, length))
        mask = torch.ones_like(ids)
        if padding:
            mask[1:, -padding:] = 0
            ids = ids.masked_fill(mask == 0, PAD)
        batch: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if labels:
            batch[labels] = torch.randint(3, VOCABULARY, (rows, length // 2))
        batches.append(batch if names else ids)
    return batches


def bare() -> list[Batch]:
    """Token ids as plain tensors."""
    return tokens(names=False)


def pair() -> list[Batch]:
    """Token ids for an encoder and for a decoder."""
    return tokens(labels="decoder_input_ids")


def floats(
    *shape: int, name: str = "", rows: tuple[int, ...] = (4, 3)
) -> Callable[[], list[Batch]]:
    """Batches of normal numbers, each `shape`; passed by `name` where there is one."""

    def make() -> list[Batch]:
        drawn = [torch.randn(count, *shape) for count in rows]
        return [{name: x} for x in drawn] if name else list(drawn)

    return make


def images(side: int = 32, channels: int = 4) -> Callable[[], list[Batch]]:
    """Pictures for a transformers vision model. Four channels, so that 2:4 fits the first layer."""
    return floats(channels, side, side, name="pixel_values")


def hf(
    name: str, kind: str, model: str, batches: Callable[[], list[Batch]] = tokens,
    decodes: bool = False, **config: Any,
) -> Family:  # fmt: skip
    """A class of transformers with this configuration."""

    def build() -> nn.Module:
        import transformers

        made = getattr(transformers, model)
        return made(made.config_class(**config))

    return Family(name, kind, build, batches, decodes, ("transformers",))


def every() -> list[Family]:
    """All families, in the order of the page."""
    import plain
    import sights
    import texts

    return [*texts.FAMILIES, *sights.FAMILIES, *plain.FAMILIES]
