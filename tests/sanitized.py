"""Runs tests with the sanitized kernels: `python tests/sanitized.py FOLDER pytest-arguments`.

FOLDER holds a copy of the package beside the sanitized extension; an editable installation would
come first, so its finder is taken out of the way.
"""

import sys

if __name__ == "__main__":
    sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in type(f).__module__]
    sys.path.insert(0, sys.argv[1])
    import pytest

    import gossamer

    assert gossamer.__file__.startswith(sys.argv[1]), gossamer.__file__
    sys.exit(pytest.main(sys.argv[2:]))
