from rich.console import Console

import fheconv.progress


def test_a_bar_goes_over_the_items_on_a_terminal_only(monkeypatch, capsys):
    assert list(fheconv.progress.track([1, 2, 3], "Running…")) == [1, 2, 3]
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(
        "fheconv.progress.Console", lambda stderr: Console(stderr=stderr, force_terminal=True, width=100)
    )
    assert list(fheconv.progress.track([1, 2, 3], "Running…")) == [1, 2, 3]
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Running…" in shown.err
    assert "100%" in shown.err
