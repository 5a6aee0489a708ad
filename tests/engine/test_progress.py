"""Progress: lines where no bar can be drawn, a log for all others, silence for short steps."""

import logging
import threading
import time

import pytest

from gossamer.engine import progress
from gossamer.engine.progress import track


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(progress, "PAUSE", 0.05)
    monkeypatch.setattr(progress, "_WORTH", 0.05)


def test_short_steps_say_nothing(capsys):
    with track(3, True, "packing") as step:
        step("a")
    assert capsys.readouterr() == ("", "")


def test_a_long_unit_shows_signs_of_life(soon, capsys):
    with track(4, True, "packing") as step:
        step("layer 0")
        time.sleep(0.2)
    out, err = capsys.readouterr()
    assert out == "" and "packing: 1 of 4, layer 0, 0 s" in err
    assert err.strip().splitlines()[-1].startswith("packing: 0.")


def test_what_is_not_enabled_goes_to_the_log(soon, capsys, caplog):
    with caplog.at_level(logging.INFO, logger="gossamer"), track(None, False, "reading") as step:
        time.sleep(0.06)
        step("half")
    assert capsys.readouterr().err == ""
    assert [r.name for r in caplog.records] == ["gossamer"] * 2
    assert "reading: half" in caplog.records[0].getMessage()


def test_a_terminal_gets_a_bar(soon, monkeypatch, capsys):
    pytest.importorskip("rich")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with track(2, True, "packing") as step:
        step("first")
        time.sleep(0.1)
    err = capsys.readouterr().err
    assert "packing: 0." in err and "1 of 2" not in err


def test_the_thread_ends_with_an_error(soon):
    before = set(threading.enumerate())
    with pytest.raises(ValueError, match="stop"), track(2, True):
        (beating,) = set(threading.enumerate()) - before
        assert beating.is_alive()
        raise ValueError("stop")
    assert not beating.is_alive()
