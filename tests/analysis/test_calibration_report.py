"""The script that makes the report on calibration, at a small size."""

import pytest

from benchmarks import calibration


@pytest.mark.slow
def test_the_report_is_of_its_inputs(tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "OVERLAPS", (0.2, 0.5))
    options = ["--simulations", "3", "--others", "2", "--samples", "6", "--out", str(tmp_path)]
    calibration.main(options)
    page = (tmp_path / "calibration_report.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith(("| ind", "| SVGP", "| LCGP"))]
    assert len(rows) == 18
    assert len(list((tmp_path / "figures").glob("calibration_*.png"))) == 9
    assert calibration.hash_of_package() in page
    sizes = calibration.asdict(calibration.Sizes(samples=6))
    settings = {"sizes": sizes, "overlaps": (0.2, 0.5), "simulations": 3, "others": 2}
    assert calibration.hash_of_inputs(settings) in page
    other = {**settings, "sizes": {**sizes, "seed": 1}}
    assert calibration.hash_of_inputs(other) not in page
