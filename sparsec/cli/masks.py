"""`sparsec mask` and `sparsec soup`: zeros as a file, and the average of models that share them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparsec.cli.options import PREPROCESS, REPORT, SHAPES, Fixed
from sparsec.errors import UsageError
from sparsec.terminal import listing, note, print_json, progress

if TYPE_CHECKING:
    import onnx_ir

    from sparsec.masks_io import MaskRow
    from sparsec.soup import Damage


@click.group("mask")
def mask_verb() -> None:
    """Masks of a pruned model as an .npz, for retraining in your own code."""


@mask_verb.command("export")
@click.argument("model", metavar="MODEL.onnx")
@click.option("-o", "--output", required=True, metavar="MASKS.npz", help="One boolean array a layer.")
@click.option("--all", "every", is_flag=True, help="Dense layers too.")
@click.option("--overwrite", is_flag=True, help="Replace an existing file.")
@SHAPES
@REPORT
def export_verb(
    model: str, output: str, every: bool, overwrite: bool, fixed: Fixed, as_json: bool, verbose: bool
) -> None:
    """Write which weights are not zero, by initializer name."""
    from sparsec.staging import staged_file

    with staged_file(Path(output), overwrite) as stage:
        from sparsec.masks_io import export_masks, write_masks

        masks, rows = export_masks(_load(model, fixed), every)
        write_masks(stage, masks)
    _print_rows("masks", output, rows, as_json)


@mask_verb.command("apply")
@click.argument("model", metavar="MODEL.onnx")
@click.argument("masks", metavar="MASKS.npz")
@click.option("-o", "--output", required=True, metavar="OUT.onnx", help="The model with the masks' zeros.")
@click.option("--overwrite", is_flag=True, help="Replace an existing file.")
@SHAPES
@REPORT
def apply_verb(
    model: str, masks: str, output: str, overwrite: bool, fixed: Fixed, as_json: bool, verbose: bool
) -> None:
    """Zero the weights that the masks exclude."""
    from sparsec.staging import staged_file

    with staged_file(Path(output), overwrite) as stage:
        from sparsec.loading.load import model_bytes
        from sparsec.masks_io import apply_masks, read_masks

        read = read_masks(masks)
        loaded = _load(model, fixed)
        rows = apply_masks(loaded, read, masks)
        stage.write_bytes(model_bytes(loaded))
    _print_rows("model", output, rows, as_json)


@click.command("soup")
@click.argument("models", nargs=-1, required=True, metavar="MODEL.onnx MODEL.onnx ...")
@click.option("-o", "--output", required=True, metavar="OUT.onnx", help="Their average.")
@click.option(
    "--against", metavar="DENSE.onnx", help="The original: take only models that bring the mean nearer to it."
)
@click.option("--data", metavar="DATA", help="Samples for --against: an .npz, or a folder with --preprocess.")
@PREPROCESS
@click.option("--overwrite", is_flag=True, help="Replace an existing file.")
@SHAPES
@REPORT
def soup_verb(
    models: tuple[str, ...], output: str, against: str | None, data: str | None, preprocess: str | None, overwrite: bool,
    fixed: Fixed, as_json: bool, verbose: bool,
) -> None:  # fmt: skip
    """Average models that were recovered from one pruned model."""
    if len(models) < 2:
        raise UsageError("give at least two models", "soup")
    if (against is None) != (data is None):
        raise UsageError("--against and --data go together: the original, and samples to compare on", "soup")
    from sparsec.staging import staged_file

    with staged_file(Path(output), overwrite) as stage:
        from sparsec.loading.load import model_bytes
        from sparsec.proving.ort_session import limited
        from sparsec.soup import soup

        with progress() as say:
            say("loading")
            loaded = [_load(path, fixed) for path in models]
            damage = None
            with limited(fixed.limits):
                if against is not None and data is not None:
                    damage = _damage(_load(against, fixed), data, preprocess, say)
                made, ingredients = soup(loaded, models, damage)
        stage.write_bytes(model_bytes(made))
    facts: dict[str, Any] = {"model": output, "taken": [models[i] for i in ingredients.taken]}
    if ingredients.damage is not None:
        facts |= {"damage": ingredients.damage, "damages": dict(zip(models, ingredients.damages, strict=True))}
    if as_json:
        print_json(facts)
        return
    click.echo(f"{output}  the mean of {len(facts['taken'])} of {len(models)} models: {', '.join(facts['taken'])}")
    for path, value in facts.get("damages", {}).items():
        click.echo(f"  {path}  {value:.4g} from the original")
    if ingredients.damage is not None:
        click.echo(f"  {output}  {ingredients.damage:.4g}")


def _load(path: str, fixed: Fixed) -> onnx_ir.Model:
    from sparsec.loading.load import load_model

    notes: list[str] = []
    model = load_model(path, fixed.shapes, fixed.bind, notes, fixed.limits)
    for text in notes:
        note(text)
    return model


def _damage(original: onnx_ir.Model, data: str, preprocess: str | None, say: Any) -> Damage:
    """Mean damage of a model's outputs against the original's on the samples."""
    import numpy as np

    from sparsec.data import load_data
    from sparsec.loading.load import model_bytes
    from sparsec.passes.measure.fidelity import Fidelity
    from sparsec.ports import input_spec
    from sparsec.proving.ort_session import open_session

    samples = load_data(data, [input_spec(x) for x in original.graph.inputs], preprocess)
    names = [str(y.name) for y in original.graph.outputs]

    def outputs(model: onnx_ir.Model) -> list[np.ndarray]:
        session = open_session(model_bytes(model), optimize=False)
        rows = [session.run(names, sample) for sample in samples]
        return [np.stack([np.asarray(row[i]) for row in rows]) for i in range(len(names))]

    fidelity = Fidelity(names, outputs(original))
    count = 0

    def damage(model: onnx_ir.Model) -> float:
        nonlocal count
        count += 1
        say(f"comparing, {count}")
        return float(fidelity.damages(outputs(model)).mean())

    return damage


def _print_rows(kind: str, output: str, rows: list[MaskRow], as_json: bool) -> None:
    if as_json:
        print_json({kind: output, "layers": [dataclasses.asdict(row) for row in rows]})
        return
    table = [
        {"layer": r.layer, "weight": r.weight, "shape": "x".join(map(str, r.shape)), "structure": r.structure}
        | ({"changed": f"{r.changed:,}"} if kind == "model" else {})
        for r in rows
    ]
    columns = ("layer", "weight", "shape", "structure", *(("changed",) if kind == "model" else ()))
    listing("layers", table, False, columns)
    zeros, weights = sum(r.zeros for r in rows), sum(r.weights for r in rows)
    click.echo(f"{output}  {len(rows)} layers, {100 * zeros / max(weights, 1):.1f}% of their weights are zero")
