"""``llkd status``, ``llkd runs`` and ``llkd report`` on runs as the loop leaves them."""

from __future__ import annotations

import pytest
from report_runs import make_run

from llkd_ray.cli.main import main
from llkd_ray.storage.lock import Session


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "runs/done")
    make_run(tmp_path / "runs/half way", rounds=2, finished=False)
    (tmp_path / "runs/other").mkdir()
    return tmp_path / "runs"


def test_status_says_how_far_a_run_is_and_what_comes_next(runs, capsys):
    assert main(["status", str(runs / "half way")]) == 0
    said = capsys.readouterr().out
    assert "stopped, 2 of 4 rounds done" in said
    assert "2,000 labelled, 320 trained on" in said
    assert f"llkd resume '{runs / 'half way'}'" in said
    assert main(["status", str(runs / "done")]) == 0
    assert f"model:   {runs / 'done/model'}" in capsys.readouterr().out


def test_a_run_with_a_live_driver_is_running(runs, capsys):
    from llkd_ray.storage.run_dir import RunStore

    session = Session(RunStore(str(runs / "half way")))
    session.begin()
    try:
        main(["status", str(runs / "half way")])
        assert "running" in capsys.readouterr().out
    finally:
        session.end()
    main(["status", str(runs / "half way")])
    assert "stopped" in capsys.readouterr().out


def test_runs_lists_them(runs, capsys):
    assert main(["runs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("done" in line and "finished" in line for line in lines)
    assert any("half way" in line and "2/4" in line for line in lines)
    assert not any("other" in line for line in lines)
    assert max(map(len, lines)) <= 80 + len(str(runs))
    assert main(["runs", str(runs / "other")]) == 0
    assert "no runs in" in capsys.readouterr().out


def test_report_is_written_again(runs, capsys):
    (runs / "done/report.html").unlink(missing_ok=True)
    assert main(["report", str(runs / "done"), "--baseline", str(runs / "half way")]) == 0
    assert (runs / "done/report.html").exists()
    assert main(["report", str(runs / "other")]) == 2
    assert "RUN:" in capsys.readouterr().err
