"""What tests of the commands share."""

import os
import signal
import subprocess
import sys
import time

import pytest

from gossamer.io.load import read_content
from gossamer.io.stored import unpack
from gossamer.nn.kernel_choice.latency import LatencyModel
from gossamer.nn.kernel_choice.machine import machine, store_latency


@pytest.fixture(autouse=True, scope="module")
def costs_like_the_rules(no_cached_latency, tmp_path_factory):
    """Commands find costs that say what the rules say, so that no test measures any."""
    dense = {1: (0.0, 0.0, 1e-9, 0.0, 0.0)}
    sparse = {1: (0.0, 0.0, 0.0, 1.1e-9, 0.0)}
    terms = {}
    for dtype in ("float32", "bfloat16"):
        terms |= {f"dense {dtype}": dense, f"bitmap-matvec {dtype}": sparse}
        terms[f"sell-spmm {dtype}"] = sparse
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("costs")))
        store_latency(LatencyModel(machine(), terms))
        yield


@pytest.fixture(scope="session")
def kill_at():
    """kill_at(file, argv): runs the command with one thread, killed as soon as the file is there."""

    def run(file, argv):
        command = [sys.executable, "-m", "gossamer", *argv]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        killed = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment)
        limit = time.monotonic() + 100
        while not file.exists() and time.monotonic() < limit:
            time.sleep(0.001)
        killed.send_signal(signal.SIGKILL)
        killed.wait()

    return run


@pytest.fixture(scope="session")
def stored_tensors():
    """stored_tensors(folder): what a folder without packed layers holds, as a state dict."""

    def read(folder):
        content = read_content(folder, verify=True, given=True)
        parts = {n: unpack(n, f, *content.parts[n]) for n, f in content.stored.items()}
        return content.tensors | parts

    return read
