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
