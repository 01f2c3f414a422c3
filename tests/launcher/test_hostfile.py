import pytest

from launcher.hostfile import main


def test_outside_of_a_job_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    assert main(["--slots", "2"]) == 2
    error = capsys.readouterr().err
    assert "inside a Slurm job" in error
    assert error.count("\n") == 1
