"""Examples in docstrings run and print what they say; every public function has one."""

import doctest
import inspect

import pytest
from docstrings import examples

import gossamer as gs

EXAMPLES = examples()


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_print_what_they_say(name):
    test = doctest.DocTestParser().get_doctest(EXAMPLES[name], {}, name, name, 0)
    said: list[str] = []
    failures, _ = doctest.DocTestRunner().run(test, out=said.append)
    assert not failures, "".join(said)


def test_every_public_function_has_an_example():
    functions = [name for name in gs.__all__ if inspect.isfunction(getattr(gs, name))]
    assert len(functions) > 20
    without = [n for n in functions if ">>> " not in (inspect.getdoc(getattr(gs, n)) or "")]
    assert without == ["push"], "push needs an account of the Hub"
