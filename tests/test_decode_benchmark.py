"""The decoding benchmark, tried out on a CPU: what it checks, records and writes."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def decode(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import decode

    return decode


def test_what_is_written(decode, tmp_path):
    """Every contender is checked; all repeats of it and of a copy are kept, with bytes and speed."""
    options = ["--output", str(tmp_path), "--device", "cpu", "--batches", "1", "2"]
    decode.main([*options, "--seconds", "0.01"])
    result = json.loads((tmp_path / "decode.json").read_text())
    assert len(result["checks"]) == 6 and all(c["ok"] for c in result["checks"].values())
    assert [part["batch"] for part in result["step"]] == [1, 2]
    names = {*result["checks"], "copy, U float32", "copy, U bfloat16"}
    for part in result["step"]:
        assert part["rows"].keys() == names
        for name, row in part["rows"].items():
            repeats = [x for times in row["ms"] for x in times]
            assert row["min"] == min(repeats) <= row["median"] <= row["max"] == max(repeats)
            words = 4 + (4 if name.endswith("float32") else 2)
            assert row["bytes"] == 2 * part["batch"] * 2 * 16 * 16 * words
            assert row["gbps"] == pytest.approx(row["bytes"] / row["median"] / 1e6)
    table = (tmp_path / "decode.md").read_text()
    assert all(f"| {name} | " in table for name in names)
    assert (tmp_path / "decode.png").stat().st_size > 0


def test_a_wrong_kernel_is_not_timed(decode, tmp_path, monkeypatch):
    """A contender whose result is off is named with its errors and left out."""
    right = decode.fused_recurrent_gka_

    def wrong(*args, **kwargs):
        o = right(*args, **kwargs)
        return o * 1.1 if kwargs["num_iter"] == 10 and kwargs["q"].dtype.itemsize == 2 else o

    monkeypatch.setattr(decode, "fused_recurrent_gka_", wrong)
    options = ["--output", str(tmp_path), "--device", "cpu", "--batches", "1"]
    decode.main([*options, "--seconds", "0.01"])
    result = json.loads((tmp_path / "decode.json").read_text())
    failed = {name for name, check in result["checks"].items() if not check["ok"]}
    assert failed == {f"torch, chebyshev 10, U {stored}" for stored in ("float32", "bfloat16")}
    assert not failed & result["step"][0]["rows"].keys()
    assert "not timed: torch, chebyshev 10, U float32" in (tmp_path / "decode.md").read_text()
