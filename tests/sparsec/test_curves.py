from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from sparsec import cli
from sparsec.artifact import load
from sparsec.budget import Judge, Part, Point
from sparsec.cli.curves import budget_table, front_table, show_fronts, show_points
from sparsec.data import load_data
from sparsec.loading.load import load_model
from sparsec.models.demo import demo
from sparsec.models.demo_data import write_data
from sparsec.ports import input_spec

FRONT = {
    "allocation": "search", "budget": "weights", "measure": "y: KL of the softmax, 5 classes", "samples": 64,
    "chosen": {"share": 0.3, "damage": 0.5, "changed": 0.25},
    "front": [{"share": 0.1, "predicted": 0.125, "damage": 0.1}, {"share": 0.3, "damage": 0.5, "changed": 0.25}],
}  # fmt: skip
POINTS = [
    Point("4x1", 0.3, 0.31, 0.01, 1.4, holds=True),
    Point("1x1", 0.5, 0.52, 0.0725, 1.9, recovered=True, measured=1.75),
]


def text(table) -> list[list[str]]:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table)
    return [line.split() for line in console.export_text().replace("│", " ").replace("┃", " ").splitlines()]


def test_a_front_shows_what_was_removed_and_the_damage() -> None:
    rows = text(front_table(FRONT))
    assert ["10%", "0.125", "0.1", "-"] in rows
    assert ["30%", "-", "0.5", "25.0%"] in rows


def test_a_budget_shows_every_point() -> None:
    facts = {"budget": "accuracy=2%", "drop": "samples whose top class changed", "samples": 50,
             "curve": [p.record() for p in POINTS], "chosen": POINTS[0].record()}  # fmt: skip
    rows = text(budget_table(facts))
    assert ["4x1", "31.0%", "1.00%", "1.40x", "yes"] in rows
    assert ["1x1", "52.0%", "7.25%", "1.90x", "yes"] in rows  # recovered, does not hold
    assert not any("measured" in row for row in rows)


def test_what_was_tried_in_vain_is_printed_with_times_and_fronts_only_on_a_terminal(capsys) -> None:
    show_points(POINTS)
    shown = capsys.readouterr()
    assert "1.75x" in shown.err
    assert not shown.out
    show_fronts([{"details": [FRONT]}])
    assert not capsys.readouterr().err


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("budget")
    (folder / "demo.onnx").write_bytes(demo().SerializeToString())
    write_data(folder / "calibration.npz", 120, "train")
    return folder


@pytest.fixture
def run(files, capsys):
    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.run(["compile", str(files / "demo.onnx"), "-o", str(files / "out"), "--overwrite", *arguments])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return call


def test_compile_holds_a_budget_and_keeps_the_curve(files, run) -> None:
    arguments = ["--budget", "accuracy=30%", "--calibration", str(files / "calibration.npz")]
    code, out, _ = run(*arguments, "--dump", str(files / "dump"), "--json")
    assert code == 0
    facts = json.loads(out)["budget"]
    assert facts["chosen"]["drop"] <= 0.3
    assert facts["chosen"] in facts["curve"]
    artifact = load(files / "out" / "demo.sparsec")
    last = artifact.manifest["passes"][-1]
    assert last["name"] == "prune"
    assert last["budget"] == facts
    assert "state" not in last["options"]  # a file that is gone
    assert "sparsec-budget" not in (artifact.path / "manifest.json").read_text()
    model = load_model(demo())
    calibration = load_data(files / "calibration.npz", [input_spec(value) for value in model.graph.inputs])
    judge = Judge(model, Part(calibration, held_out=True), None)
    drop = judge.drop((artifact.path / "model.onnx").read_bytes())
    assert drop == pytest.approx(facts["chosen"]["drop"], abs=1e-6)
    dumped = {path.name: path.read_bytes() for path in (files / "dump").iterdir()}
    assert dumped["20-budget.onnx"] == (artifact.path / "model.onnx").read_bytes()
    assert judge.drop(dumped["10-load.onnx"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "accuracy=1%"], "needs --calibration"),
        (["--budget", "faster"], "expected accuracy=1%"),
        (["--budget-data", "x.npz"], "there is none"),
        (
            ["--budget", "accuracy=1%", "--pass", "prune:sparsity=0.5", "--calibration", "DATA"],
            "leave out the pass prune",
        ),
        (["--budget", "speedup=900x", "--calibration", "DATA"], "speedup=900x is out of reach"),
    ],
)
def test_a_wrong_budget_is_one_line(files, run, arguments: list[str], message: str) -> None:
    code, out, err = run(*[str(files / "calibration.npz") if a == "DATA" else a for a in arguments])
    assert code == (1 if "reach" in message else 2)
    assert not out
    assert err.count("\n") == 1
    assert message in err
