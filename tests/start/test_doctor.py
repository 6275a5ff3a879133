"""doctor: what it finds, and its status when the main job cannot run."""

from __future__ import annotations

from lowdft.start import doctor


def test_this_machine_can_run(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "PROBE_TOKENS", 16)
    assert doctor.main() == 0
    shown = capsys.readouterr().out
    assert "ok" in shown and "NF4" in shown and "works" in shown and "tokens/s" in shown


def test_a_missing_package_is_status_1_with_the_command(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "PROBE_TOKENS", 16)
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda _: ["no-such-package>=3", "torch>=2.6"])
    assert doctor.main() == 1
    assert "pip install 'no-such-package>=3'" in capsys.readouterr().err


def test_largest_base():
    assert "7B" in doctor.largest_base(6.5) and "0.5B" in doctor.largest_base(2.6)
    assert "32B" in doctor.largest_base(24) and doctor.largest_base(1) == "too little for QLoRA"
