"""The comparison of two files of a benchmark: what counts as a change, and what is no comparison."""

import json
import runpy
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
main = runpy.run_path(str(BENCHMARKS / "compare.py"))["main"]

BASE = [10.0, 11.0, 10.5]


def written(path: Path, values: list[float], *cases: str, better: str = "less", slower: int = 1, **about: str) -> str:
    """Write a file with a figure of each case beside their baseline; return its path."""
    found = {"bare": BASE[: len(values)]} | dict.fromkeys(cases or ("ours",), values)
    shared = {"table": "CPU per call", "unit": "us", "better": better, "baseline": "bare"}
    results = [shared | {"case": case, "values": [slower * value for value in found[case]]} for case in found]
    run = {"date": "today", "commit": "c0ffee", "machine": "quiet", "interpreter": "CPython", "versions": {}}
    path.write_text(json.dumps(run | about | {"results": results}))
    return str(path)


@pytest.mark.parametrize(
    ("values", "better", "verdict", "code"),
    [
        ([12.0, 13.2, 12.6], "less", "WORSE", 1),
        ([8.0, 8.8, 8.4], "less", "better", 0),
        ([8.0, 8.8, 8.4], "more", "WORSE", 1),
        ([10.2, 11.22, 10.71], "less", "same", 0),  # 2 %
        ([12.0, 13.2, 10.5], "less", "same", 0),  # one round was as before
        ([20.0, 22.0], "less", "too few rounds", 0),
    ],
)
def test_only_a_change_beyond_noise_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], values: list[float], better: str, verdict: str, code: int
) -> None:
    """Judge by the ranges and medians of the ratios, and by which direction is better."""
    old, new = written(tmp_path / "old", BASE, better=better), written(tmp_path / "new", values, better=better)
    assert main([old, new]) == code
    assert capsys.readouterr().out.startswith(f"{verdict} ")


def test_a_slower_machine_is_no_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Compare ratios, not times; name what differs between the runs."""
    old = written(tmp_path / "old", BASE, machine="quiet")
    new = written(tmp_path / "new", BASE, slower=3, machine="busy")
    assert main([old, new]) == 0
    shown = capsys.readouterr().out
    assert "machine: quiet -> busy" in shown
    assert "10.5 -> 31.5 us" in shown


def test_what_changes_all_peers_alike_is_noise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Judge our change beside that of three peers; none of a peer is worse."""
    names = ("a peer", "another", "a third")
    old = written(tmp_path / "old", BASE, "audiences_async", *names)
    slower = [1.5 * value for value in BASE]
    new = written(tmp_path / "new", slower, "audiences_async", *names)
    assert main([old, new]) == 0
    assert capsys.readouterr().out.count("(peer) ") == 3
    alone = written(tmp_path / "alone", slower, "audiences_async", *names[:2])
    assert main([old, alone]) == 1


def test_a_figure_of_one_file_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """List the figures that only one of the files has."""
    old, new = written(tmp_path / "old", BASE, "ours", "removed"), written(tmp_path / "new", BASE, "added", "ours")
    assert main([old, new]) == 0
    last = capsys.readouterr().out.splitlines()[-2:]
    assert [line.split()[2:] for line in last] == [
        ["NEW", "CPU", "per", "call;", "added", "to", "bare"],
        ["OLD", "CPU", "per", "call;", "removed", "to", "bare"],
    ]


@pytest.mark.parametrize("text", [None, "no JSON", "[]", '{"results": []}', '{"results": [{"table": 1}]}'])
def test_a_bad_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None) -> None:
    """Exit with 2 and the name of the file if it is missing, or is none of a benchmark."""
    old, new = written(tmp_path / "old", BASE), tmp_path / "new"
    if text is not None:
        new.write_text(text)
    with pytest.raises(SystemExit, match="2"):
        main([old, str(new)])
    assert f"{new} is not what a benchmark writes" in capsys.readouterr().err


def test_two_benchmarks_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit with 2 if the files have no figure in common."""
    with pytest.raises(SystemExit, match="2"):
        main([written(tmp_path / "old", BASE), written(tmp_path / "new", BASE, "audiences_async, other")])
    assert "no figure is in both files" in capsys.readouterr().err


def test_the_kept_results_can_be_compared() -> None:
    """Read each file of benchmarks/results, and find no change between it and itself."""
    kept = sorted((BENCHMARKS / "results").glob("*.json"))
    assert kept
    assert all(main([str(path), str(path)]) == 0 for path in kept)
