"""Runs tests with the sanitized kernels: `python tests/sanitized.py FOLDER pytest-arguments`.

FOLDER holds a copy of the package beside the sanitized extension; an editable installation would
come first, so its finder is taken out of the way. Tests that choose a set of instructions by
themselves run in the pass of that set alone: GOSSAMER_ISA names the pass.
"""

import os
import sys


class OnePass:
    """Leaves out what another pass runs."""

    def pytest_collection_modifyitems(self, items):
        from gossamer.ops._dispatch import ISAS

        own = os.environ["GOSSAMER_ISA"]
        others = {*ISAS, "reference"} - {own} - ({"reference"} if own == ISAS[0] else set())
        items[:] = [item for item in items if asked(item) not in others]


def asked(item):
    """The instructions that a test asks for, if it does."""
    return item.callspec.params.get("isa") if hasattr(item, "callspec") else None


if __name__ == "__main__":
    sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in type(f).__module__]
    sys.path.insert(0, sys.argv[1])
    import pytest

    import gossamer

    assert gossamer.__file__.startswith(sys.argv[1]), gossamer.__file__
    sys.exit(pytest.main(sys.argv[2:], plugins=[OnePass()]))
