"""What a run says about its cells."""

import pytest

from harness.progress import Display


def test_a_cell_that_is_stopped_is_not_called_done(capsys):
    shown = Display([1.0, 1.0])
    with shown.cell("dense"):
        pass
    with pytest.raises(KeyboardInterrupt), shown.cell("teal 0.5"):
        raise KeyboardInterrupt
    said = capsys.readouterr().err
    assert "[1/2] dense: 0 s" in said
    assert "[2/2] teal 0.5: stopped after 0 s" in said
