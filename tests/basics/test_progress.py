import logging
import threading

import pytest
from rich.console import Console

import fheconv.basics.progress


def test_a_bar_goes_over_the_items_on_a_terminal_only(monkeypatch, capsys):
    assert list(fheconv.basics.progress.track([1, 2, 3], "Running…")) == [1, 2, 3]
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(
        "fheconv.basics.progress.Console",
        lambda stderr: Console(stderr=stderr, force_terminal=True, width=100),
    )
    assert list(fheconv.basics.progress.track([1, 2, 3], "Running…")) == [1, 2, 3]
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Running…" in shown.err
    assert "100%" in shown.err


def test_a_bar_of_bytes_goes_over_pieces_of_them(monkeypatch, capsys):
    chunks = [b"head", bytes(range(256)) * 2**12, b""]
    pieces = list(fheconv.basics.progress.track_bytes(chunks, "Sending…"))
    assert b"".join(pieces) == b"".join(chunks)
    assert max(map(len, pieces)) == fheconv.basics.progress.PIECE
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(
        "fheconv.basics.progress.Console",
        lambda stderr: Console(stderr=stderr, force_terminal=True, width=100),
    )
    assert b"".join(fheconv.basics.progress.track_bytes(chunks, "Sending…")) == b"".join(chunks)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Sending…" in shown.err
    assert "1.0/1.0 MB" in shown.err


def test_a_bar_shows_what_is_done_of_what_is_still_being_found(monkeypatch, capsys):
    with fheconv.basics.progress.counting("Running…") as counter:
        counter.expect(3)
        counter.finish()
    assert (counter.done, counter.total) == (1, 3)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(
        "fheconv.basics.progress.Console",
        lambda stderr: Console(stderr=stderr, force_terminal=True, width=100),
    )
    with fheconv.basics.progress.counting("Running…") as counter:
        counter.expect(1)
        counter.expect(1)
        counter.finish()
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Running…" in shown.err
    assert "50%" in shown.err


@pytest.fixture
def lines(monkeypatch):
    """The lines of the log, which come quickly, and a function that waits for the next one."""
    told, came = [], threading.Event()

    class Handler(logging.Handler):
        def emit(self, record):
            told.append(record.getMessage())
            came.set()

    def wait():
        came.clear()
        assert came.wait(60)
        return told[-1]

    monkeypatch.setattr("fheconv.basics.progress.SECONDS", 0.01)
    handler, logger = Handler(), fheconv.basics.progress.LOGGER
    logger.addHandler(handler)
    yield told, wait
    logger.removeHandler(handler)


@pytest.fixture
def asked_for():
    fheconv.basics.progress.LOGGER.setLevel(logging.INFO)
    yield
    fheconv.basics.progress.LOGGER.setLevel(logging.NOTSET)


@pytest.mark.usefixtures("asked_for")
def test_without_a_terminal_a_line_comes_now_and_then(lines, capsys):
    _, wait = lines
    with fheconv.basics.progress.status("Working…"):
        assert wait().startswith("Working… 0 s")
    for number, item in enumerate(fheconv.basics.progress.track("abc", "Running…")):
        assert item == "abc"[number]
        assert wait().startswith(f"Running… {number} of 3, ")
    wait_for = fheconv.basics.progress.track_bytes([b"12", b"345"], "Sending…")
    assert next(wait_for) == b"12"
    assert wait().startswith("Sending… 0 of 5 bytes, ")
    assert list(wait_for) == [b"345"]
    with fheconv.basics.progress.counting("Spreading…") as counter:
        counter.expect(4)
        counter.finish()
        assert wait().startswith("Spreading… 1 of 4, ")
    assert capsys.readouterr() == ("", "")


@pytest.mark.usefixtures("asked_for")
def test_no_line_comes_after_the_work(lines):
    before = threading.active_count()
    for item in fheconv.basics.progress.track([1, 2, 3], "Running…"):
        if item == 2:
            break
    with pytest.raises(ZeroDivisionError), fheconv.basics.progress.status("Working…"):
        raise ZeroDivisionError
    assert threading.active_count() == before


def test_nobody_who_has_not_asked_gets_lines(lines):
    before = threading.active_count()
    with fheconv.basics.progress.status("Working…"):
        assert threading.active_count() == before
    assert lines[0] == []
