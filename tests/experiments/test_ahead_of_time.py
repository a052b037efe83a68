"""Programs compile for devices that are not attached; counts come from their text."""

import json
import os
import site
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from experiments import benchmark
from experiments.suites import ahead_of_time, llo, ptx, report, targets
from experiments.suites.hlo import Cost, Module, array_bytes
from tests.helpers import run_command

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / ".github" / "ahead_of_time.json"
PROGRAMS = {
    "value_and_grad",
    "clipped_value_and_grad",
    "ntk",
    "ggn_vp",
    "fit",
    "sweep",
}


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("f32[30,16]", 1920),
        ("f32[30,16]{1,0}", 1920),
        ("f32[8,30]{1,0:T(8,128)}", 4096),
        ("f32[8,30]{0,1:T(8,128)}", 16384),
        ("bf16[10,129]{1,0:T(8,128)(2,1)}", 8192),
        ("pred[4,128]{1,0:T(32,128)(4,1)}", 4096),
        ("f32[16]{0:T(1024)}", 4096),
        ("f32[3,16,1]{0,2,1:T(1,128)}", 8192),
        ("f32[8,128]{1,0:T(8,128)S(1)}", 0),  # on the chip
        ("f32[1]{0:T(128)}", 0),  # a single number
        ("u32[]", 0),
        ("(f32[8,128]{1,0:T(8,128)}, /*index=1*/s32[4]{0}, token[])", 4112),
    ],
)
def test_bytes_of_an_array_include_its_padding(shape, expected):
    assert array_bytes(shape) == expected


def test_bytes_of_an_array_without_padding_and_in_any_memory():
    shape = "f32[8,30]{1,0:T(8,128)S(1)}"
    assert array_bytes(shape, anywhere=True) == 4096
    assert array_bytes(shape, anywhere=True, padded=False) == 960


# An evaluation loop of a forward product, and a training loop within an outer one.
TEXT = """HloModule jit_train, is_scheduled=true

%add (a.1: f32[], b.1: f32[]) -> f32[] {
  %a.1 = f32[] parameter(0)
  %b.1 = f32[] parameter(1)
  ROOT %sum.1 = f32[] add(%a.1, %b.1)
}

%forward (p.1: f32[64,32], p.2: f32[32,16], p.3: s32[]) -> f32[8,16] {
  %p.2 = f32[32,16]{1,0} parameter(1)
  %p.1 = f32[64,32]{1,0} parameter(0)
  %p.3 = s32[] parameter(2)
  %zero = s32[] constant(0)
  %rows = f32[8,32]{1,0} dynamic-slice(%p.1, %p.3, %zero), dynamic_slice_sizes={8,32}
  %turned = f32[32,16]{1,0} transpose(%p.2), dimensions={0,1}
  ROOT %product = f32[8,16]{1,0} dot(%rows, %turned), lhs_contracting_dims={1}
}

%update (q.1: f32[32,16], q.2: f32[1,16]) -> BOTH {
  %q.1 = f32[32,16]{1,0} parameter(0)
  %q.2 = f32[1,16]{1,0} parameter(1)
  %at = s32[] constant(1)
  %stored = f32[32,16]{1,0} dynamic-update-slice(%q.1, %q.2, %at, %at)
  %flat = f32[16]{0} reshape(%q.2)
  ROOT %both = BOTH tuple(%stored, %flat)
}

%more (c: DATA) -> pred[] {
  %c = DATA parameter(0)
  %i.1 = s32[] get-tuple-element(%c), index=0
  %three = s32[] constant(3)
  ROOT %less = pred[] compare(%i.1, %three), direction=LT
}

%evaluate (d: DATA) -> DATA {
  %d = DATA parameter(0)
  %i.2 = s32[] get-tuple-element(%d), index=0
  %x.1 = f32[64,32]{1,0} get-tuple-element(%d), index=1
  %w.1 = f32[32,16]{1,0} get-tuple-element(%d), index=2
  %h.1 = f32[8,16]{1,0} fusion(%x.1, %w.1, %i.2), calls=%forward
  ROOT %next.1 = DATA tuple(%i.2, %x.1, %w.1)
}

%until (e: STATE) -> pred[] {
  %e = STATE parameter(0)
  %i.3 = s32[] get-tuple-element(%e), index=0
  %end = s32[] get-tuple-element(%e), index=1
  ROOT %less.1 = pred[] compare(%i.3, %end), direction=LT
}

%step (f: STATE) -> STATE {
  %f = STATE parameter(0)
  %i.4 = s32[] get-tuple-element(%f), index=0
  %end.1 = s32[] get-tuple-element(%f), index=1
  %x.2 = f32[64,32]{1,0} get-tuple-element(%f), index=2
  %w.2 = f32[32,16]{1,0} get-tuple-element(%f), index=3
  %h.2 = f32[8,16]{1,0} fusion(%x.2, %w.2, %i.4), calls=%forward
  %row = f32[1,16]{1,0} slice(%h.2), slice={[0:1], [0:16]}
  %pair = BOTH fusion(%w.2, %row), calls=%update
  %w.3 = f32[32,16]{1,0} get-tuple-element(%pair), index=0
  ROOT %next.2 = STATE tuple(%i.4, %end.1, %x.2, %w.3)
}

%train (g: STATE) -> f32[32,16] {
  %g = STATE parameter(0)
  %steps = STATE while(%g), condition=%until, body=%step, backend_config={COUNT}
  ROOT %w.4 = f32[32,16]{1,0} get-tuple-element(%steps), index=3
}

%same (k: STATE) -> f32[32,16] {
  %k = STATE parameter(0)
  ROOT %w.5 = f32[32,16]{1,0} get-tuple-element(%k), index=3
}

ENTRY %main (x: f32[64,32], w: f32[32,16], t: s32[]) -> f32[32,16] {
  %x = f32[64,32]{1,0} parameter(0)
  %w = f32[32,16]{1,0} parameter(1)
  %t = s32[] parameter(2)
  %begin = DATA tuple(%t, %x, %w)
  %losses = DATA while(%begin), condition=%more, body=%evaluate
  %part = ((f32[64,32]{1,0}), f32[8,32]{1,0:S(1)}, s32[]) slice-start(%x)
  %rows_on_chip = f32[8,32]{1,0:S(1)} slice-done(%part)
  %copied = (f32[64,32]{1,0:S(1)}, f32[64,32]{1,0}, u32[]) copy-start(%x)
  %on_chip = f32[64,32]{1,0:S(1)} copy-done(%copied)
  %go = STATE tuple(%t, %t, %x, %w)
  ROOT %w.6 = f32[32,16]{1,0} conditional(%t, %go, %go), BRANCHES
}
"""
for _name, _text in {
    "STATE": "(s32[], s32[], f32[64,32]{1,0}, f32[32,16]{1,0})",
    "DATA": "(s32[], f32[64,32]{1,0}, f32[32,16]{1,0})",
    "BOTH": "(f32[32,16]{1,0}, f32[16]{0})",
    "BRANCHES": "branch_computations={%same, %train}",
    "COUNT": '"known_trip_count":{"n":"5"}',
}.items():
    TEXT = TEXT.replace(_name, _text)
FORWARD = 4 * (8 * 32 + 32 * 16 + 8 * 16)  # bytes: a slice of x, w and the result
UPDATE = 4 * (16 + 16 + 16)  # bytes: a row, twice written; w stays where it is


def test_the_training_loop_is_found_and_counted():
    module = Module(TEXT)
    loop = module.step_loop()
    assert loop is not None
    assert loop.name == "steps"
    assert module.trip_count(loop) == 5
    assert module.cost(module.body(loop)) == Cost(
        kernels=3,
        products=1,
        transposes=1,
        copies=0,
        bytes=FORWARD + 4 * (16 + 16) + UPDATE,
    )


def test_a_program_costs_what_its_loops_and_larger_branches_cost():
    assert Module(TEXT).cost() == Cost(
        kernels=3 * 1 + 2 + 5 * 3,
        products=3 + 5,
        transposes=3 + 5,
        copies=1,
        bytes=3 * FORWARD
        + 4 * (8 * 32 + 64 * 32)
        + 5 * (FORWARD + 4 * (16 + 16) + UPDATE),
    )


def test_the_number_of_iterations_is_read_off_the_condition_or_unknown():
    unknown = Module(TEXT.replace('"known_trip_count":{"n":"5"}', ""))
    loop = unknown.step_loop()
    assert loop is not None
    assert unknown.trip_count(loop) is None
    other = TEXT.replace("%end = s32[] get-tuple-element(%e), index=1", "%end = X")
    other = other.replace("%end = X", "%end = s32[] constant(7)")
    module = Module(other.replace('"known_trip_count":{"n":"5"}', ""))
    loop = module.step_loop()
    assert loop is not None
    assert module.trip_count(loop) == 7


def test_buffers_that_are_only_allocated_are_not_kernels():
    text = """ENTRY %main (a: f32[8,128]) -> f32[8,128] {
  %a = f32[8,128]{1,0} parameter(0)
  %b = f32[8,128]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %c = f32[8,128]{1,0} custom-call(%a, %b), custom_call_target="other_gemm"
}
"""
    cost = Module(text).cost()
    assert (cost.kernels, cost.products, cost.bytes) == (1, 1, 3 * 4096)


def test_single_numbers_of_a_tpu_are_not_kernels():
    text = """ENTRY %main (a: s32[]) -> s32[] {
  %a = s32[]{:T(128)S(6)} parameter(0)
  %b = s32[]{:T(128)S(6)} add(%a, %a)
  ROOT %c = s32[]{:T(128)} fusion(%b), kind=kLoop, calls=%fused
}

%fused (d: s32[]) -> s32[] {
  %d = s32[]{:T(128)} parameter(0)
  ROOT %e = s32[]{:T(128)} negate(%d)
}
"""
    assert Module(text).cost().kernels == 1


def test_custom_calls_of_one_target_are_counted_apart():
    call = 'custom-call(%w.2), custom_call_target="kernel"'
    text = TEXT.replace("slice(%h.2), slice={[0:1], [0:16]}", call)
    cost = Module(text).cost("", "kernel")
    assert cost == Cost(kernels=5, bytes=5 * 4 * (32 * 16 + 16))


BUNDLES = """
// a comment: { not a bundle }
     0   :  { %a = inlined_call }
   0x1   :  { %b = inlined_call ;; %c = inlined_call }
   0x2 LH: > { %d = inlined_call }
   0x3 LB: > > { %e = inlined_call }
   0x4   : > > { %f = inlined_call
                 ;; %g = inlined_call }
   0x5 PF: > > { %h = inlined_call }
   0x6   : > { %i = inlined_call }
"""


def test_the_bundles_of_the_innermost_loop_are_counted(tmp_path):
    for name in ("train.2-01-final", "other.5-01-final", "train.2-00-analysis_final"):
        text = BUNDLES if name.startswith("train.2-01") else BUNDLES + BUNDLES
        (tmp_path / f"123-{name}_bundles.txt").write_text(text)
    assert llo.innermost_loop_bundles(tmp_path, "train") == 3


PTX = """
.visible .entry train(
\t.param .u64 train_param_0
)
{
\t.reg .pred \t%p<3>;
\tld.param.b64 \t%rd1, [train_param_0];
$L__BB0_1:
\t.loc\t1 0 50
\tadd.s64 \t%rd2, %rd1, 4;
\t// begin inline asm
\t@%p1 mov.b32 \t%r1, 0;
\t// end inline asm
$L__BB0_2:
\tadd.f32 \t%f1, %f1, %f2;
\tsetp.ne.s32 \t%p2, %r2, 8;
\t@%p2 bra \t$L__BB0_2;
\t@%p1 bra \t$L__BB0_1;
\tbra.uni \t$L__BB0_3;
$L__BB0_3:
\tret;
}
"""
PTXAS = """
ptxas info    : Compiling entry function 'train' for 'sm_90a'
    0 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 255 registers, used 2 barriers, 1 bytes smem
"""


def test_the_instructions_of_each_loop_are_counted(tmp_path):
    assert ptx.loop_instructions(PTX) == [3, 3]
    (tmp_path / "train_0.ptx").write_text(PTX)
    (tmp_path / "train_0.ptxas").write_text(PTXAS)
    (tmp_path / "other_0.ptxas").write_text("")
    assert ptx.step_instructions(tmp_path, "train", passes=8) == 8 * 3 + 3
    resources = ptx.resources(tmp_path, "train")
    assert resources == {"registers": 255, "spilled_bytes": 12}


def test_a_compiled_program_of_this_version_is_read():
    def train(w, x):
        return jax.lax.scan(lambda w, _: (w + x.T @ (x @ w), None), w, length=7)[0]

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((9, 5), (8, 9))]
    module = Module(str(jax.jit(train).lower(*shapes).compile().as_text()))
    loop = module.step_loop()
    assert loop is not None
    assert module.trip_count(loop) == 7
    assert module.cost(module.body(loop)).kernels >= 2
    assert module.cost().bytes > 7 * 4 * 8 * 9


def counted(target="v5e", program="fit", **changes):
    return {
        "target": target,
        "program": program,
        "size": "small",
        "unit": "step",
        "implementation": "jaxbce",
        "error": None,
        "unavailable": None,
        "kernels": 12,
        "products": 2,
        "transposes": 0,
        "copies": 1,
        "hbm_bytes": 1526400000,
        "temp_bytes": 0,
        "trip_count": None,
        "padding": 1.25,
        "calls": 1,
    } | changes


ROWS = [
    counted(),
    counted(implementation="plain JAX", trip_count=17),
    counted(program="ntk", unit="call", padding=None),
    {
        "target": "v5e",
        "program": "ntk",
        "size": "small",
        "unit": "call",
        "implementation": "plain JAX",
        "error": "JaxRuntimeError: no memory",
        "unavailable": None,
    },
]


def fused(**changes):
    row = counted(program="sweep", implementation=ahead_of_time.FUSED, kernels=0.001)
    for key in ("products", "transposes", "copies", "trip_count", "padding"):
        del row[key]
    return row | changes


def test_a_step_of_the_fused_kernel_has_counts_of_its_own():
    both = [counted(program="sweep"), counted(program="sweep", trip_count=17)]
    (cells,) = report.compiled_table([*both, fused(bundles=377.25)])
    assert cells["kernels"] == "12 / 12 / 0.001"
    assert cells["products"] == "2 / 2 / –"
    assert cells["iterations"] == "unknown / 17 / –"
    assert cells["bundles"] == "377"
    (cells,) = report.compiled_table([*both, fused(instructions=1670, spilled_bytes=0)])
    assert cells["instructions"] == "1670"
    assert cells["spilled bytes"] == "0"
    assert "bundles" not in cells


def test_a_kernel_that_is_not_available_is_a_line_and_not_in_the_table():
    both = [counted(program="sweep"), counted(program="sweep")]
    row = fused(unavailable="it is for another device")
    assert report.compiled_line(row).endswith("not available: it is for another device")
    assert report.compiled_table([*both, row]) == report.compiled_table(both)


def test_a_table_has_the_counts_of_both_implementations():
    step, call = report.compiled_table(ROWS)
    assert "bundles" not in step
    assert step["kernels"] == "12 / 12"
    assert step["HBM MB"] == "1530 / 1530"
    assert step["iterations"] == "unknown / 17"
    assert step["padding"] == "1.25 / 1.25"
    assert call["kernels"] == "12 / fails"
    assert call["iterations"] == call["padding"] == "fails"


@pytest.fixture
def toy_compilers(monkeypatch):
    """All compilers are missing but that of v5e, whose rows are made up."""
    for name, target in targets.TARGETS.items():
        module = "json" if name == "v5e" else "no_such_package.module"
        monkeypatch.setitem(targets.TARGETS, name, target._replace(module=module))

    def run(target, *, quick, report):
        for row in ROWS:
            report(row)
        return ROWS

    monkeypatch.setattr(ahead_of_time, "run", run)


@pytest.mark.usefixtures("toy_compilers")
def test_a_missing_compiler_is_a_line_and_the_others_are_used(tmp_path):
    finished = run_command(
        "benchmark", "--suite=ahead_of_time", f"--output_dir={tmp_path}"
    )
    assert finished.status == 1  # one of the rows does not compile
    assert finished.err == ""
    lines = finished.out.splitlines()
    for name, extra in (("h100", "gpu"), ("a100", "gpu"), ("v6e", "tpu")):
        line = f"{name}: skipped; pip install '.[aot-{extra}]' installs its compiler"
        assert line in lines
    assert "does not compile: JaxRuntimeError: no memory" in finished.out
    document = json.loads((tmp_path / "ahead_of_time.json").read_text(encoding="utf-8"))
    assert document["rows"] == ROWS
    assert document["skipped"] == ["h100", "a100", "v6e"]
    assert document["configuration"]["targets"] == ["h100", "a100", "v5e", "v6e"]
    assert document["environment"]["jax"] == jax.__version__
    assert not (tmp_path / "benchmark.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--suite=ahead_of_time", "--accelerator=v4"), "v4"),
        (("--accelerator=v5e",), "--accelerator needs --suite=ahead_of_time"),
    ],
)
def test_a_bad_target_is_one_line_and_status_2(arguments, message):
    finished = run_command("benchmark", *arguments)
    assert (finished.status, finished.out) == (2, "")
    assert message in finished.err
    assert finished.err.count("\n") == 1


def test_a_process_that_fails_is_a_line(monkeypatch):
    monkeypatch.setattr(ahead_of_time, "__name__", "experiments.suites.no_such_module")
    v5e = targets.TARGETS["v5e"]._replace(module="json")
    monkeypatch.setitem(targets.TARGETS, "v5e", v5e)
    finished = run_command("benchmark", "--suite=ahead_of_time", "--accelerator=v5e")
    assert finished.status == 1
    assert "v5e: its process has failed: " in finished.out
    assert "No module named experiments.suites.no_such_module" in finished.out


PAGE = (
    "<!-- benchmark: fit -->\nas it was\n<!-- end -->\n"
    "<!-- benchmark: ahead_of_time -->\n<!-- end -->\n"
)


def document(**configuration):
    return {
        "environment": {"jax": "1.0"},
        "versions": {"libtpu": "2.0"},
        "configuration": {"suites": ["ahead_of_time"], "targets": ["v5e"]}
        | {"quick": False}
        | configuration,
        "rows": ROWS,
    }


def test_tables_are_written_to_their_own_block():
    text = report.with_tables(PAGE, document())
    assert text.startswith("<!-- benchmark: fit -->\nas it was\n<!-- end -->\n")
    assert "jax 1.0, libtpu 2.0." in text
    assert "| unknown / 17 |" in text
    assert report.with_tables(text, document()) == text


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"quick": True}, "a run of --quick"),
        ({"targets": ["v5e", "h100"]}, "no rows of target 'h100'"),
    ],
)
def test_tables_of_a_partial_run_are_refused(change, match):
    with pytest.raises(ValueError, match=match):
        report.with_tables(PAGE, document(**change))


def test_the_page_has_the_tables_of_the_run_in_the_repository():
    published = json.loads(DOCUMENT.read_text(encoding="utf-8"))
    text = benchmark.PAGE.read_text(encoding="utf-8")
    assert "<!-- benchmark: ahead_of_time -->" in text
    assert report.with_tables(text, published) == text
    assert {row["program"] for row in published["rows"]} == PROGRAMS
    assert {row["target"] for row in published["rows"]} == targets.TARGETS.keys()
    assert all(row["error"] is None for row in published["rows"])
    for count, names in {"bundles": {"v5e", "v6e"}, "instructions": {"h100"}}.items():
        assert {row["target"] for row in published["rows"] if count in row} == names


@pytest.fixture(scope="module")
def python_with_compilers(tmp_path_factory):
    """An environment that adds the extras to the packages of this one."""
    folder = tmp_path_factory.mktemp("compilers")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    find = "import sysconfig; print(sysconfig.get_path('purelib'))"
    found = subprocess.run([python, "-c", find], capture_output=True, text=True)
    packages = Path(found.stdout.strip())
    (packages / "parent.pth").write_text("\n".join(site.getsitepackages()))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = project["project"]["optional-dependencies"]
    required = [*extras["aot-gpu"], *extras["aot-tpu"]]
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", *required], check=True, timeout=900
    )
    return python


@pytest.mark.slow
@pytest.mark.parametrize("target", ["v5e", "v6e", "h100"])
def test_every_program_compiles(python_with_compilers, target, tmp_path):
    command = [python_with_compilers, "-m", "experiments.benchmark", "--quick"]
    command += ["--suite=ahead_of_time", f"--accelerator={target}"]
    done = subprocess.run(
        [*command, f"--output_dir={tmp_path}"],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, (done.stdout, done.stderr)
    document = json.loads((tmp_path / "ahead_of_time.json").read_text(encoding="utf-8"))
    rows = document["rows"]
    assert not any(row["unavailable"] for row in rows)
    compiled = {
        (row["program"], row["implementation"])
        for row in rows
        if row["kernels"] > 0 and row["target"] == target
    }
    expected = {
        (program, implementation)
        for program in PROGRAMS
        for implementation in ("jaxbce", "plain JAX")
    }
    expected.add(("sweep", ahead_of_time.FUSED))
    # Of a step of a kernel that has it all on chip: of 128 networks, and of a network.
    name, most = ("instructions", 4000) if target == "h100" else ("bundles", 1000)
    (count,) = (row[name] for row in rows if name in row)
    assert 100 < count < most
    assert compiled == expected
