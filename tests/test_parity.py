"The parity ledger is whole and true, and `visdet dev parity` finds every kind of lie planted in it."
import ast
import json
import re
import subprocess
import sys
import tomllib

import pytest
from conftest import ROOT

from visdet.config.parity import check_figures, check_names, check_parity, check_tests, cited, compare_parameters, find_objects, ledger_rows, read_ledger, read_results, skipped_claims, test_key
from visdet.config.surface import is_rest, load_surface, read_surface, split_parameter, write_surface
from visdet.core.basics import DataError

test_key.__test__ = False  # a function of visdet, not a test
LEDGER, SURFACE = ROOT / "tests/parity.toml", ROOT / "tests/mmdet_surface.json"
CLAIM = ("same numbers", "equivalent")


def aslist(o):
    return [o] if isinstance(o, str) else list(o)


@pytest.fixture(scope="module")
def ledger():
    return read_ledger(LEDGER)


@pytest.fixture(scope="module")
def surface():
    return load_surface(SURFACE)


@pytest.fixture(scope="module")
def objects(ledger):
    return find_objects(ledger)


# ---------------------------------------------------------------- the recorded surface


def test_surface_is_that_of_3_3_0(surface):
    "485 registrations by decorator or alias, and two classes of torch that are entered by a call"
    parts = [o for o in surface["parts"] if o["registry"]]
    assert surface["version"] == "3.3.0" and len(parts) == 487
    assert [o["name"] for o in parts if o["name"] in ("Linear", "SiLU", "LVISDataset")] == ["LVISDataset", "Linear", "SiLU"]
    count = {k: sum(o["kind"] == k for o in parts) for k in {o["kind"] for o in parts}}
    want = {"detector": 59, "backbone": 20, "neck": 19, "dense head": 61, "RoI head": 13, "box head": 9, "mask head": 12, "loss": 30, "assigner": 14, "match cost": 7, "sampler": 9, "coder": 8, "prior generator": 7, "transform": 69, "data sampler": 9, "metric": 24}
    assert {k: count[k] for k in want} == want


def test_surface_holds_facts_only(surface):
    "Names and expressions of one line; no docstrings, no sentences"
    for o in surface["parts"]:
        assert set(o) <= {"name", "kind", "registry", "module", "what", "parameters", "outer", "definition"}
        for w in o["parameters"]:
            name, default = split_parameter(w)
            assert name.isidentifier() and "\n" not in w
            assert default is None or ast.parse(default, mode="eval")
        assert not any(is_rest(w) and "=" in w for w in o["parameters"])
    assert all(re.fullmatch(r"(test_\w+/)*test_\w+\.py", o) for o in surface["tests"])


def test_known_signatures(surface):
    "Figures that the facts state, read from the source"
    parts = {o["name"]: o for o in surface["parts"] if o["registry"]}
    assert parts["ATSSAssigner"]["parameters"][:2] == ["topk", "alpha=None"]
    assert "momentum=0.0002" in parts["ExpMomentumEMA"]["parameters"]
    shared = parts["Shared2FCBBoxHead"]["parameters"]
    assert "fc_out_channels=1024" in shared and "num_classes=80" in shared and not any(o.startswith("num_shared_fcs") for o in shared)


def test_reading_runs_nothing(tmp_path):
    "A package whose modules raise when imported can be read, twice with the same result"
    pkg = tmp_path / "evil"
    (pkg / "models/necks").mkdir(parents=True)
    (pkg / "__init__.py").write_text("raise SystemExit('imported')\n")
    (pkg / "models/necks/n.py").write_text("raise SystemExit\n@MODELS.register_module()\nclass Neck(Base):\n    def __init__(self, a, b=[1, 2], **kw): super().__init__(**kw)\n")
    got = read_surface(pkg)
    assert [(o["name"], o["kind"], o["parameters"], o["outer"]) for o in got["parts"]] == [("Neck", "neck", ["a", "b=[1, 2]", "**kw"], "Base")]
    write_surface(got, tmp_path / "s.json")
    assert load_surface(tmp_path / "s.json")["parts"] == got["parts"]


# ---------------------------------------------------------------- the ledger as it is


def test_every_component_has_an_entry(ledger, surface):
    assert check_names(ledger, surface) == []


def test_names_and_parameters_are_true(ledger, surface, objects):
    found, bad = objects
    assert bad == []
    rows, bad = compare_parameters(ledger, surface, found)
    assert bad == [] and rows


def test_cited_tests_are_written(ledger):
    "Each citation names a function that stands in its file; that it passes is asked of the results of a whole run"
    defs = {}
    for o in ledger.part + ledger.file:
        for t in aslist(o.test) if o.test else []:
            path, *names = t.partition("[")[0].split("::")
            if path not in defs:
                defs[path] = {n.name for n in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
            assert set(names) <= defs[path], f"{t} is not there"


def test_same_numbers_means_recorded_figures(ledger):
    assert check_figures(ledger, ROOT) == []


def test_named_components_are_claimed(ledger):
    "What the first wave is about is claimed, or its gap has a reason of its own"
    claimed = {o.mmdet for o in ledger.part if o.status in CLAIM}
    named = "AnchorGenerator SSDAnchorGenerator YOLOAnchorGenerator LegacyAnchorGenerator MlvlPointGenerator PointGenerator DeltaXYWHBBoxCoder LegacyDeltaXYWHBBoxCoder TBLRBBoxCoder DistancePointBBoxCoder BucketingBBoxCoder PseudoBBoxCoder MaxIoUAssigner ATSSAssigner SimOTAAssigner DynamicSoftLabelAssigner TaskAlignedAssigner HungarianAssigner PointAssigner GridAssigner CenterRegionAssigner RandomSampler IoUBalancedNegSampler OHEMSampler ScoreHLRSampler CombinedSampler PseudoSampler InstanceBalancedPosSampler CrossEntropyLoss FocalLoss QualityFocalLoss DistributionFocalLoss VarifocalLoss GHMC GHMR SeesawLoss SmoothL1Loss L1Loss BalancedL1Loss IoULoss BoundedIoULoss GIoULoss DIoULoss CIoULoss EIoULoss SIoULoss DiceLoss SingleRoIExtractor GenericRoIExtractor Shared2FCBBoxHead FCNMaskHead CascadeRoIHead multiclass_nms RetinaNet FCOS FasterRCNN MaskRCNN CascadeRCNN YOLOX"
    assert set(named.split()) - claimed == set()


# ---------------------------------------------------------------- planted lies


def edited(tmp_path, change):
    "The ledger with its text changed"
    text = LEDGER.read_text(encoding="utf-8")
    new = change(text)
    assert new != text
    (tmp_path / "parity.toml").write_text(new, encoding="utf-8")
    return read_ledger(tmp_path / "parity.toml")


def block(name):
    return re.compile(rf'\[\[part\]\]\nmmdet = "{name}"\n(?:.+\n)*')


def sorts(problems):
    return {(o.sort, o.name) for o in problems}


def test_missing_component(tmp_path, surface):
    led = edited(tmp_path, lambda t: block("GIoULoss").sub("", t))
    assert sorts(check_names(led, surface)) == {("missing", "GIoULoss")}


def test_component_that_does_not_exist(tmp_path, surface):
    led = edited(tmp_path, lambda t: t.replace('mmdet = "GIoULoss"', 'mmdet = "GIouLoss"'))
    assert sorts(check_names(led, surface)) == {("missing", "GIoULoss"), ("unknown", "GIouLoss")}


def test_component_entered_twice(tmp_path, surface):
    led = edited(tmp_path, lambda t: t + "\n" + block("GIoULoss").search(t)[0])
    assert sorts(check_names(led, surface)) == {("twice", "GIoULoss")}


def test_test_file_left_out(tmp_path, surface):
    led = edited(tmp_path, lambda t: t.replace('"test_downstream/test_mmtrack.py"', '"test_downstream/test_mmtrak.py"'))
    assert sorts(check_names(led, surface)) == {("missing", "test_downstream/test_mmtrack.py"), ("unknown", "test_downstream/test_mmtrak.py")}


def test_wrong_name_in_visdet(tmp_path):
    led = edited(tmp_path, lambda t: t.replace("visdet.nn.overlap_losses.GIoULoss", "visdet.nn.overlap_losses.GIouLoss"))
    assert ("import", "GIoULoss") in sorts(find_objects(led)[1])


def test_wrong_parameters(tmp_path, surface, objects):
    led = edited(tmp_path, lambda t: block("GIoULoss").sub(lambda m: m[0] + 'renamed = {epsilon = "eps", reduction = "reduce"}\nrefused = ["loss_weight"]\n', t))
    rows, bad = compare_parameters(led, surface, objects[0])
    said = " ".join(o.text for o in bad if o.name == "GIoULoss")
    assert "no parameter 'epsilon'" in said and "no parameter 'reduce'" in said and "'loss_weight' is said to be refused" in said


def test_same_numbers_by_a_test_without_figures(tmp_path):
    led = edited(tmp_path, lambda t: block("GIoULoss").sub(lambda m: re.sub("test = .*", 'test = "tests/test_cli.py::test_help_and_version_are_light"', m[0]), t))
    assert sorts(check_figures(led, ROOT)) == {("no figures", "GIoULoss")}


def passed(led):
    "Outcomes of a run in which every cited test passed"
    res = {}
    for o in led.part + led.file:
        for t in aslist(o.test) if o.test else []:
            name, case = test_key(t)
            res[(name if "::" in t else name + ".test_one", None if case is None else case.replace("*", "x"))] = "passed"
    return res


def test_all_passed_proves_all(ledger):
    assert check_tests(ledger, passed(ledger)) == []


@pytest.mark.parametrize("outcome, said", [(None, "is not there, or did not run"), ("failed", "1 of 1 failed"), ("skipped: no CUDA here", "was not run: skipped: no CUDA here")])
def test_claim_without_proof(ledger, outcome, said):
    "An entry whose test is absent, failed or skipped"
    got, key = passed(ledger), ("tests.test_golden_losses.test_dice", None)
    assert got.pop(key) == "passed"
    if outcome:
        got[key] = outcome
    (bad,) = [o for o in check_tests(ledger, got) if o.name == "DiceLoss"]
    assert bad.sort == "not proved" and said in bad.text
    if outcome and outcome.startswith("skipped"):
        assert not [o for o in check_tests(ledger, got, allow="no CUDA") if o.name == "DiceLoss"] and "DiceLoss" in skipped_claims(ledger, got)


def test_claim_leaning_on_cases_of_others(ledger):
    "A test that passes, but has no recorded case of the component"
    got, name = passed(ledger), "tests.test_golden_losses.test_dice"
    del got[name, None]
    got[name, "c00-MSELoss"] = "passed"
    assert "none of DiceLoss" in [o for o in check_tests(ledger, got) if o.name == "DiceLoss"][0].text
    got[name, "c01-DiceLoss"] = "passed"
    assert not [o for o in check_tests(ledger, got) if o.name == "DiceLoss"]


def test_claim_leaning_on_a_detector_without_the_part(ledger):
    "Of the recorded detectors that passed, one must have the part in its configuration"
    got, name = passed(ledger), "tests.test_golden_detectors.test_predictions"
    del got[name, None]
    got[name, "retinanet-own"] = "passed"
    types = {"retinanet": {"RetinaNet", "RetinaHead"}, "fcos": {"FCOS"}}
    bad = {o.name for o in check_tests(ledger, got, recorded=types)}
    assert "FCOS" in bad and "RetinaNet" not in bad
    got[name, "fcos-own"] = "passed"
    assert "FCOS" not in {o.name for o in check_tests(ledger, got, recorded=types)}


@pytest.mark.parametrize("change, said", [(lambda t: t.replace('status = "same numbers"', 'status = "same"', 1), "status"), (lambda t: t.replace("\nwhy = ", "\nreason = ", 1), "reason"), (lambda t: block("GIoULoss").sub(lambda m: re.sub("test = .*\n", "", m[0]), t), "without a test"), (lambda t: t.replace("[[part]]", "[[parts]]", 1), "parts"), (lambda t: re.sub(r'visdet = "visdet.nn.dice.*\n', "", t), "without the name")])
def test_schema_is_strict(tmp_path, change, said):
    with pytest.raises(DataError, match=said):
        edited(tmp_path, change)


# ---------------------------------------------------------------- the command


@pytest.fixture
def checkout(tmp_path):
    "A checkout in small: two losses, a ledger and its tests"
    (tmp_path / "tests").mkdir()
    parts = [dict(name=n, kind="loss", registry="MODELS", module="models.losses.x", what="class", parameters=["reduction='mean'", "loss_weight=1.0"]) for n in ("L1Loss", "SmoothL1Loss")]
    write_surface(dict(package="mmdet", version="3.3.0", parts=parts), tmp_path / "tests/mmdet_surface.json", ["test_losses.py"])
    (tmp_path / "tests/test_a.py").write_text("import pytest\ndef test_l1(): pass\n@pytest.mark.skip(reason='no figures: set VISDET_GOLDEN')\ndef test_smooth(): pass\n")
    text = "".join(f'[[part]]\nmmdet = "{n}"\nvisdet = "visdet.nn.box_losses.{n}"\nstatus = "equivalent"\ntest = "tests/test_a.py::{t}"\n' for n, t in (("L1Loss", "test_l1"), ("SmoothL1Loss", "test_smooth")))
    (tmp_path / "tests/parity.toml").write_text(text + '[[file]]\nmmdet = "test_losses.py"\nstatus = "equivalent"\ntest = "tests/test_a.py"\n')
    return tmp_path


def visdet_dev(capsys, *words):
    from visdet.cli.main import main

    code = main(["dev", *map(str, words)])
    return code, capsys.readouterr().out


def test_command_with_results(checkout, capsys):
    "Collected, all is well; with results of a run, the skipped test proves nothing"
    code, out = visdet_dev(capsys, "parity", "--root", checkout)
    assert code == 0 and "No problems." in out
    p = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests", "--junitxml", "r.xml"], cwd=checkout, capture_output=True, text=True)
    assert p.returncode == 0, p.stdout
    assert set(read_results(checkout / "r.xml").values()) == {"passed", "skipped: no figures: set VISDET_GOLDEN"}
    code, out = visdet_dev(capsys, "parity", "--root", checkout, "--results", checkout / "r.xml")
    assert code == 1 and "SmoothL1Loss" in out and "was not run" in out and "1 problem:" in out
    code, out = visdet_dev(capsys, "parity", "--root", checkout, "--results", checkout / "r.xml", "--allow-skipped", "set VISDET_")
    assert code == 0 and "1 claims are not proved here" in out
    (checkout / "tests/test_a.py").write_text("def test_l1(): pass\n")
    code, out = visdet_dev(capsys, "parity", "--root", checkout, "--json", "-")
    assert code == 1 and [o["name"] for o in json.loads(out)["problems"]] == ["SmoothL1Loss"]


def test_command_with_another_package(checkout, tmp_path, capsys):
    "A package with one loss more and one default changed: a missing entry, and what differs from the recorded"
    pkg = tmp_path / "mmdet"
    (pkg / "models/losses").mkdir(parents=True)
    (pkg / "__init__.py").write_text("")
    body = "@MODELS.register_module()\nclass {}(Module):\n    def __init__(self, reduction='{}', loss_weight=1.0): pass\n"
    (pkg / "models/losses/x.py").write_text("".join(body.format(n, r) for n, r in (("L1Loss", "sum"), ("SmoothL1Loss", "mean"), ("NewLoss", "mean"))))
    code, out = visdet_dev(capsys, "parity", "--root", checkout, "--package", pkg, "--no-tests", "--signatures")
    assert code == 1 and re.search(r"missing +NewLoss", out) and "loss NewLoss: new" in out and "reduction='mean' became reduction='sum'" in out
    assert re.search(r"L1Loss +reduction +'sum' +reduction +'mean' +other default", out)


def test_counts_add_up(ledger, surface):
    rows = ledger_rows(ledger, surface)
    assert len(rows) == len({o["mmdet"] for o in rows}) == len({o["name"] for o in surface["parts"]})
    raw = tomllib.loads(LEDGER.read_text(encoding="utf-8"))
    assert sum(o["status"] in CLAIM for o in rows) == sum(o["status"] in CLAIM for o in raw["part"])


def test_page_is_up_to_date(ledger, surface):
    "The counts that the page of the documentation shows are those of the ledger"
    from visdet.config.parity import STATUSES, count_statuses

    page = json.loads((ROOT / "nbs/tutorials/mmdet_parity.ipynb").read_text(encoding="utf-8"))
    shown = "\n".join("".join(o.get("data", {}).get("text/markdown", "")) for c in page["cells"] for o in c.get("outputs", []))
    for kind, n in count_statuses(ledger_rows(ledger, surface)).items():
        row = f"| {kind} | {' | '.join(str(n[s] or '') for s in STATUSES)} |"
        assert row in shown, f"nbs/tutorials/mmdet_parity.ipynb shows something else than {row!r}: nbdev-test nbs/tutorials/mmdet_parity.ipynb --save"


def test_citations():
    got = {("tests.test_a.test_b", "fcos-own"): "passed", ("tests.test_a.test_b", "fcos"): "passed", ("tests.test_a.test_bc", None): "passed"}
    assert len(cited("tests/test_a.py::test_b", got)) == 2 and len(cited("tests/test_a.py", got)) == 3
    assert list(cited("tests/test_a.py::test_b[fcos-*]", got)) == [("tests.test_a.test_b", "fcos-own")] and cited("tests/test_a.py::test", got) == {}
    assert test_key("tests/x/test_a.py::TestB::test_c[tests/d.py::e]") == ("tests.x.test_a.TestB.test_c", "tests/d.py::e")


# ---------------------------------------------------------------- coverage of what changed


def test_coverage_of_a_module(tmp_path):
    "A changed module notes what runs of it, and nothing else does; the tests run as ever"
    code = (
        "import visdet.cli.coverage as c, sys\n"
        "c.changed_lines = lambda *a: {'visdet/cv/boxes.py': {1}}\n"
        f"c.start_coverage({str(ROOT)!r}, {str(tmp_path)!r})\n"
        "import torch, visdet.cv.boxes as b\n"
        "assert b.box_area(torch.tensor([[0., 0., 2., 3.]])).tolist() == [6.0]\n"
    )
    p = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert p.returncode == 0, p.stderr
    from visdet.cli.coverage import load_hits, statements

    hits = load_hits(tmp_path)
    path = str((ROOT / "visdet/cv/boxes.py").resolve())
    assert list(hits) == [path]
    ran = hits[path]
    tree = ast.parse((ROOT / "visdet/cv/boxes.py").read_text(encoding="utf-8"))
    within = {o.name: {k for k in statements((ROOT / "visdet/cv/boxes.py").read_text(encoding="utf-8")) if o.body[0].lineno <= k[0] <= o.end_lineno} for o in tree.body if isinstance(o, ast.FunctionDef)}
    assert within["box_area"] & ran and not within["flip_boxes"] & ran
