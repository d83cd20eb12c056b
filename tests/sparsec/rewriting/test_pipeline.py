"""Passes from everywhere: specs, objects, plugin files, installed packages; checks, records and dumps."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper
from onnx_ir.passes import common
from onnxscript import rewriter

from sparsec import __version__
from sparsec.errors import CheckError, RecipeError, UsageError
from sparsec.loading.load import load_model, model_bytes
from sparsec.passes import BUILT_IN, Prune
from sparsec.rewriting.pass_options import option_values
from sparsec.rewriting.pass_registry import describe_passes, pass_registry
from sparsec.rewriting.pass_specs import parse_spec, resolve_passes
from sparsec.rewriting.passes_api import Context, Pass, PassResult
from sparsec.rewriting.pipeline import check_equal, relative_error, run_passes

RNG = np.random.default_rng(5)
PLUGIN = '''
"""A pass of one's own."""
from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
import sparsec


@dataclass(frozen=True)
class Halve(sparsec.Pass):
    """Multiply every weight by a factor.

    More text.
    """

    name = "halve"
    factor: float = 0.5
    names: tuple[str, ...] = ()

    def call(self, model):
        for value in model.graph.initializers.values():
            value.const_value = ir.tensor(value.const_value.numpy() * self.factor, name=value.name)
        return sparsec.PassResult(model, True)
'''


@pytest.fixture
def model() -> ir.Model:
    proto = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 18]>
        g (float[N,6] x) => (float[N,5] y) { a = MatMul(x, u) r = Relu(a) b = MatMul(r, v) s = Relu(b) y = MatMul(s, w) }""")
    for name, shape in (("u", (6, 8)), ("v", (8, 8)), ("w", (8, 5))):
        proto.graph.initializer.append(numpy_helper.from_array(RNG.standard_normal(shape).astype(np.float32), name))
    return load_model(proto)


@dataclass(frozen=True)
class Negate(Pass):
    """Turn the sign of every weight."""

    name: ClassVar[str] = "negate"
    exact: ClassVar[bool] = False
    parts: tuple[int, ...] = ()
    mode: Literal["all", "some"] = "all"
    limit: float | None = None
    wide: bool = False

    def call(self, model: ir.Model) -> PassResult:
        context = Context.of(model)
        for value in model.graph.initializers.values():
            value.const_value = ir.tensor(-value.const_value.numpy(), name=value.name)
            context.records.append({"weight": value.name})
        return PassResult(model, True)


@dataclass(frozen=True)
class NegateAndClaim(Negate):
    """Claims what is not true."""

    name: ClassVar[str] = "liar"
    exact: ClassVar[bool] = True


@dataclass(frozen=True)
class Break(Pass):
    """Leaves an invalid model, or fails."""

    name: ClassVar[str] = "break"
    how: str = "raise"

    def call(self, model: ir.Model) -> PassResult:
        if self.how == "raise":
            raise KeyError("no such thing\nsecond line")
        if self.how == "operator":
            model.graph[0].op_type = "NoSuchOperator"
        if self.how == "shape":
            model.graph.initializers["u"].const_value = ir.tensor(np.ones((3, 8), np.float32), name="u")
            model.graph.initializers["u"].shape = ir.Shape([3, 8])
        return PassResult(model, True)


# ---- specs


def test_spec_values_are_typed() -> None:
    step = parse_spec("prune:sparsity=0.75,block=8x1,include=layer3.*+head,scope=global,floor=0")
    assert step == Prune(sparsity=0.75, block="8x1", include=("layer3.*", "head"), scope="global", floor=0.0)
    assert parse_spec("prune:nm=2:4") == Prune(nm="2:4")
    assert parse_spec("prune") == Prune(sparsity=0.5)


SPECS = {
    "": r"unknown pass ''",
    "prnue": r"--pass: unknown pass 'prnue'; did you mean 'prune'\?",
    "prune:sparsty=0.8": r"has no option 'sparsty'; did you mean 'sparsity'\?",
    "prune:sparsity=high": r"sparsity must be a number, got 'high'",
    "prune:sparsity=nan": r"sparsity must be a number",
    "prune:sparsity": r"expected NAME\[:key=value,...\], got 'sparsity'",
    "prune:": r"expected NAME\[:key=value,...\]",
    "prune:sparsity=0.1,sparsity=0.2": r"given twice",
    "prune:scope=model": r"scope must be one of layer, global, got 'model'",
    "remove-no-ops:x=1": r"has no option 'x'; it has no options",
}


@pytest.mark.parametrize(("spec", "message"), SPECS.items())
def test_bad_spec(spec: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        parse_spec(spec)
    assert "\n" not in str(caught.value)


def test_passes_must_be_a_list() -> None:
    with pytest.raises(RecipeError, match=r"write \['prune'\]"):
        resolve_passes("prune")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"parts": "1+x"}, "parts must be a list of an integer"),
        ({"parts": [1.5]}, "parts must be a list of an integer"),
        ({"wide": "maybe"}, "wide must be true or false"),
        ({"limit": True}, "limit must be a number"),
        ({"mode": "none"}, "mode must be one of all, some"),
    ],
)
def test_option_types(tmp_path: Path, given: dict, message: str) -> None:
    from sparsec.rewriting.pass_registry import Registered
    from sparsec.rewriting.pass_specs import build_step

    entry = Registered("negate", "test", "", lambda: Negate)
    with pytest.raises(RecipeError, match=message):
        build_step(entry, given, "test")
    made = build_step(entry, {"parts": "1+2", "wide": "yes", "limit": "0.5", "mode": "some"}, "test")
    assert made.run == Negate(parts=(1, 2), wide=True, limit=0.5, mode="some")
    assert made.options == {"parts": [1, 2], "mode": "some", "limit": 0.5, "wide": True}


def test_every_built_in_pass_describes_itself() -> None:
    table = {row["name"]: row for row in describe_passes()}
    for cls in BUILT_IN:
        row = table[cls.name]
        assert row["summary"].endswith(".")
        assert row["origin"] == "built-in"
        recorded = option_values(cls())  # all options but those that say where something lies
        assert recorded == {name: value for name, value in row["options"].items() if name in recorded}
        assert set(row["options"]) - set(recorded) <= {"state"}
        json.dumps(row)


# ---- plugins and entry points


@pytest.fixture
def plugin(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "halve.py"
    path.write_text(PLUGIN)
    yield path
    for name in [n for n in sys.modules if n.startswith("sparsec_plugin_")]:
        del sys.modules[name]


def test_plugin_runs_and_is_recorded(model: ir.Model, plugin: Path) -> None:
    before = model.graph.initializers["v"].const_value.numpy().copy()
    steps = resolve_passes(["halve:factor=0.25"], plugins=[plugin])
    changed, (record,) = run_passes(model, steps)
    np.testing.assert_array_equal(changed.graph.initializers["v"].const_value.numpy(), before * np.float32(0.25))
    assert record["name"] == "halve"
    assert record["origin"] == "plugin halve.py"
    assert record["version"].startswith("sha256:")
    assert record["options"] == {"factor": 0.25, "names": []}
    assert record["modified"] is True
    assert str(plugin.parent) not in json.dumps(record)
    (row,) = (r for r in describe_passes([plugin]) if r["name"] == "halve")
    assert row["summary"] == "Multiply every weight by a factor."


def test_plugin_given_twice_is_one(plugin: Path) -> None:
    assert pass_registry([plugin, plugin])["halve"].origin == "plugin halve.py"


BAD_PLUGINS = {
    "syntax": ("def f(:\n", r"fails at import at line 1: SyntaxError"),
    "exception": ("x = 1\nraise RuntimeError('no\\nno')\n", r"fails at import at line 2: RuntimeError: no$"),
    "nothing": ("x = 1\n", r"no subclass of sparsec.Pass with a `name`"),
    "no name": (PLUGIN.replace('name = "halve"', ""), r"no subclass of sparsec.Pass"),
    "taken": (PLUGIN.replace('"halve"', '"prune"'), r"pass name 'prune' is already taken by built-in"),
    "exit": ("import sys\nsys.exit(3)\n", r"fails at import at line 2: SystemExit"),
}


@pytest.mark.parametrize(("source", "message"), BAD_PLUGINS.values(), ids=BAD_PLUGINS)
def test_bad_plugin_is_one_line(tmp_path: Path, source: str, message: str) -> None:
    path = tmp_path / "bad.py"
    path.write_text(source)
    with pytest.raises(RecipeError, match=message) as caught:
        resolve_passes(["prune"], plugins=[path])
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"--plugin {path}: ")


def test_missing_plugin(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot read the plugin: No such file"):
        resolve_passes([], plugins=[tmp_path / "none.py"])


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package, as importlib.metadata sees one."""
    (tmp_path / "acme_passes.py").write_text(PLUGIN.replace('"halve"', '"acme-halve"'))
    info = tmp_path / "acme_passes-2.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-passes\nVersion: 2.1\n")
    points = [
        "acme-halve = acme_passes:Halve",
        "broken = acme_passes:Nothing",
        "dedup = onnx_ir.passes.common:DeduplicateInitializersPass",
    ]
    (info / "entry_points.txt").write_text("[sparsec.passes]\n" + "\n".join(points) + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "acme_passes", raising=False)
    return tmp_path


def test_entry_point_runs_and_is_recorded(model: ir.Model, package: Path) -> None:
    _, records = run_passes(model, resolve_passes(["acme-halve:factor=0.5", "dedup:size_limit=10"]))
    assert [(r["name"], r["origin"], r["version"]) for r in records] == [
        ("acme-halve", "entry point acme-passes", "2.1"),
        ("dedup", "entry point acme-passes", "2.1"),
    ]
    assert [r["modified"] for r in records] == [True, False]


def test_broken_entry_point_only_hurts_who_uses_it(package: Path) -> None:
    assert resolve_passes(["prune"])
    with pytest.raises(RecipeError, match=r"broken: cannot be loaded from entry point acme-passes: AttributeError"):
        resolve_passes(["broken"])
    (row,) = (r for r in describe_passes() if r["name"] == "broken")
    assert "cannot be loaded" in row["summary"]


# ---- objects


def test_pass_objects_and_classes_of_others(model: ir.Model) -> None:

    rule = rewriter.pattern.RewriteRule(lambda op, x: op.Relu(x), lambda op, x: op.LeakyRelu(x, alpha=0.0))
    steps = [
        Negate(),
        Negate,
        common.DeduplicateInitializersPass(),
        rewriter.pattern.RewriteRuleSet([rule]),
        Prune(sparsity=0.5),
    ]
    changed, records = run_passes(model, steps)
    assert [r["name"] for r in records] == [
        "negate", "negate", "DeduplicateInitializersPass", "RewriteRuleSet", "prune"
    ]  # fmt: skip
    assert records[2]["origin"].startswith("object onnx_ir.passes.common.")
    assert records[4]["origin"] == "built-in"
    assert records[4]["version"] == __version__
    assert [r["modified"] for r in records] == [True, True, False, True, True]
    assert "LeakyRelu" in [n.op_type for n in changed.graph]
    assert records[0]["details"] == [{"weight": "u"}, {"weight": "v"}, {"weight": "w"}]


def test_what_is_no_pass_is_refused(model: ir.Model) -> None:
    with pytest.raises(RecipeError, match=r"expected a pass .*, got int"):
        run_passes(model, [3])


def test_functional_pass_returns_another_model(model: ir.Model) -> None:
    functional = ir.passes.functionalize(Negate())
    before = model.graph.initializers["u"].const_value.numpy().copy()
    changed, (record,) = run_passes(model, [functional])
    assert changed is not model
    np.testing.assert_array_equal(model.graph.initializers["u"].const_value.numpy(), before)
    assert record["modified"]


# ---- checks


def test_context_reaches_the_pass_and_leaves_the_model(model: ir.Model) -> None:
    seen = []

    @dataclass(frozen=True)
    class Look(Pass):
        """Look around."""

        name: ClassVar[str] = "look"

        def call(self, model: ir.Model) -> PassResult:
            context = Context.of(model)
            context.tell("looking", 1, 2)
            assert context.calibration is not None
            again = [list(context.calibration), list(context.calibration)]  # a stream that can be read twice
            seen.append((len(context.calibration), again, context.target, model.meta["sparsec"] is context))
            return PassResult(model, False)

    told = []
    data = {"x": np.arange(12, dtype=np.float32).reshape(2, 6)}
    changed, _ = run_passes(
        model,
        [Look()],
        calibration=data,
        target="host",
        progress=lambda what, done, total: told.append((what, done, total)),
    )
    ((count, streams, target, same),) = seen
    assert (count, target, same) == (2, "host", True)
    for samples in streams:
        np.testing.assert_array_equal(np.concatenate([s["x"] for s in samples]), data["x"])
    assert ("looking", 1, 2) in told
    assert "sparsec" not in changed.meta


def test_a_false_claim_of_equality_is_caught(model: ir.Model) -> None:
    with pytest.raises(
        CheckError, match=r"pass liar: claims equal outputs: output 'y' differs by .*, rounding explains"
    ):
        run_passes(model, [NegateAndClaim()])


def test_changed_signature_breaks_the_claim(model: ir.Model) -> None:
    @dataclass(frozen=True)
    class Rename(Pass):
        """Rename the output."""

        name: ClassVar[str] = "rename"
        exact: ClassVar[bool] = True

        def call(self, model: ir.Model) -> PassResult:
            model.graph.outputs[0].name = "other"
            return PassResult(model, True)

    with pytest.raises(CheckError, match="changed the model's inputs or outputs"):
        run_passes(model, [Rename()])


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("raise", RecipeError, r"pass break: failed with KeyError: .*no such thing"),
        ("operator", CheckError, r"pass break: left an invalid ONNX model: .*NoSuchOperator"),
        ("shape", CheckError, r"pass break: left "),
    ],
)
def test_broken_pass_is_one_line(model: ir.Model, how: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        run_passes(model, [Break(how)])
    assert "\n" not in str(caught.value)


def test_nothing_to_do_is_an_error_of_the_pass(model: ir.Model) -> None:
    with pytest.raises(RecipeError, match=r"pass prune: 0 of 3 layers matched: 3 are not named by include=conv"):
        run_passes(model, resolve_passes(["prune:include=conv*"]))


# ---- records and dump


def test_records_are_deterministic_and_json(model: ir.Model) -> None:
    source = model.clone()
    runs = []
    for _ in range(2):
        _, records = run_passes(source.clone(), resolve_passes(["prune:sparsity=0.5", "prune:sparsity=0.5"]))
        runs.append(json.dumps(records, sort_keys=True))
    assert runs[0] == runs[1]
    first, second = json.loads(runs[0])
    assert first["modified"]
    assert first["details"][0] == {"layer": "MatMul_0", "weights": 48, "zeros": 24, "changed": True}
    assert not second["modified"]
    assert not any(detail["changed"] for detail in second["details"])


def test_dump_has_every_step(model: ir.Model, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "dump"
    run_passes(model, resolve_passes(["prune:sparsity=0.5", "prune:sparsity=0.5", "prune:sparsity=0.8"]), dump=folder)
    names = sorted(p.name for p in folder.iterdir())
    assert names == ["10-load.onnx", "20-prune.onnx", "30-prune.unchanged.txt", "40-prune.onnx"]
    assert (folder / "30-prune.unchanged.txt").read_text() == "prune changed nothing\n"
    onnx.checker.check_model(onnx.load(folder / "40-prune.onnx"))


def test_dump_into_a_file_is_refused(model: ir.Model, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="--dump: cannot make the folder"):
        run_passes(model, [], dump=tmp_path / "file")


@pytest.mark.parametrize(("factor", "fine"), [(1 + 2.0**-23, True), (1.0005, False)])
def test_comparer_can_fail(model: ir.Model, factor: float, fine: bool) -> None:
    """One unit in the last place passes, the two thousandth part of the weights does not."""
    before = model_bytes(model)
    weight = model.graph.initializers["w"]
    weight.const_value = ir.tensor(weight.const_value.numpy() * np.float32(factor), name="w")
    after = model_bytes(model)
    if fine:
        assert check_equal(before, after, "test") < 1e-6
        return
    with pytest.raises(CheckError, match=r"differs by 0\.0005"):
        check_equal(before, after, "test")


def test_relative_error() -> None:
    a = np.array([1.0, -4.0], np.float32)
    assert relative_error(a, a) == 0
    assert relative_error(a, a + np.float32(1)) == 0.25
    assert relative_error(a, a.astype(np.float64)) == float("inf")
    assert relative_error(a, a[:1]) == float("inf")
    assert relative_error(a, np.array([1, np.nan], np.float32)) == float("inf")
    nan = np.array([1, np.nan], np.float32)
    assert relative_error(nan, nan) == 0
    assert relative_error(np.zeros(2, np.float32), np.full(2, 1e-9, np.float32)) == float("inf")


def test_importing_everything_leaves_the_public_names(model: ir.Model) -> None:
    """A submodule called like a public function would replace it."""
    import sparsec.artifact
    import sparsec.loading.load

    assert callable(sparsec.load)
    assert sparsec.Pass is Pass
