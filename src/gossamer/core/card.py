"""The record by which a method is known to the registry, the docs and the command line."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """Eight facts of a method that a program may ask for.

    What the method does, what its paper claims and where it differs from the paper is the
    docstring of its module.

    Parameters
    ----------
    name : str
        In lower case, as the command line has it; unique within the topic.
    topic : str
        What becomes sparse: the folder and the public namespace, such as `weights`.
    role : str
        How it plugs in: `scorer`, `solver`, `topology`, `learned_mask`, `replacer`, `planner`,
        `gradient_source`, `recipe`, `key_scorer`, `cache`, `step_attention`, `input_scorer`,
        `neuron_selector`, `corrector` or `layer`.
    needs : tuple of str
        What it reads: the statistics `norm`, `hessian`, `sum` and `variance`, the `gradients` of
        the steps in which it changes supports, the `loss` before training,
        or some `inputs` of each layer.
    patterns : tuple of str
        The patterns it admits: `unstructured`, `nm`, `block`, `channel`.
    year : int
        Of the paper.
    link : str
        To the paper; empty where there is none.
    status : str
        `stable` or `experimental`.
    """

    name: str
    topic: str
    role: str
    needs: tuple[str, ...]
    patterns: tuple[str, ...]
    year: int
    link: str
    status: str
