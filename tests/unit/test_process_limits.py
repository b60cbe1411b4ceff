"""The command line in a working folder that is gone, and with too few open files."""

from __future__ import annotations

import errno
import sys

import pytest

from minitron_mp import cli


def message_of_main(capsys) -> str:
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    return capsys.readouterr().err


def test_deleted_working_folder_is_named(tmp_path, monkeypatch, capsys):
    """Also if all paths are absolute, because libraries need the folder, too."""
    (tmp_path / "recipe.yaml").write_text("model: m\noutput: o\n")
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    monkeypatch.setattr(sys, "argv", ["minitron-mp", "plan", str(tmp_path / "recipe.yaml")])
    assert message_of_main(capsys).startswith("error: the working folder has been deleted or replaced")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at gloo/transport/tcp/device.cc:186] rv != -1. Too many open files"),
        ImportError("libtorch.so: cannot open shared object file: Too many open files"),
        OSError(errno.EMFILE, "Too many open files", "a.txt"),
    ],
)
def test_limit_of_open_files_is_named(monkeypatch, capsys, error):
    def app() -> None:
        raise error

    monkeypatch.setattr(cli, "app", app)
    message = message_of_main(capsys)
    assert message.lower().startswith(("error: too many open files; raise", "error: [errno 24]"))
    assert "raise the limit of open files with `ulimit -n 4096`" in message
