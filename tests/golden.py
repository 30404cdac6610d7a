"Figures recorded from MMDetection: cases, the weights they were made with, and comparison with a stored summary"
import functools
import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(os.environ.get("VISDET_GOLDEN") or Path(__file__).resolve().parents[2] / "shared/mmdet/golden")
CLASS_BIAS = (
    r"(retina_cls|conv_cls|atss_cls|gfl_cls|vfnet_cls|tood_cls|cls_score|conv_cls_prior|rtm_cls(\.\d+)?|multi_level_conv_cls\.\d+|"
    r"cls_branches\.\d+|reppoints_cls_out|heatmap_head\.2|cls_embed)\.bias$"
)


def seed(text):
    "The first four bytes of a text's sha256"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")


def weight(key, shape, backbone=1.4, neck=0.7, head=1.0, norm=0.8, bias=0.05, cls_bias=-3.0, shifts=(), scales=()):
    "The value of the entry `key` of a recorded state dict"
    r = np.asarray(np.random.RandomState(seed(key)).standard_normal(shape)).astype(np.float32)
    last, gain = key.rsplit(".", 1)[-1], dict(backbone=backbone, neck=neck).get(key.split(".", 1)[0], head)
    if last == "num_batches_tracked":
        return torch.zeros(shape, dtype=torch.int64)
    if last == "running_var":
        v = 1 + 0.1 * np.abs(r)
    elif last == "running_mean":
        v = 0.1 * r
    elif not shape:
        v = 1 + 0.1 * r
    elif len(shape) == 1:
        v = bias * r + (cls_bias if re.search(CLASS_BIAS, key) else 0.0) if last.endswith("bias") else norm * (1 + 0.1 * r)
    else:
        v = r * np.float32(gain / np.sqrt(np.prod(shape[1:])))
    for pattern, factor in scales:
        v = v * np.float32(factor if re.search(pattern, key) else 1.0)
    for pattern, amount in shifts:
        v = v + (amount if re.search(pattern, key) else 0.0)
    return torch.from_numpy(np.asarray(v, np.float32))


class Case:
    "One recorded component: its JSON, and its arrays by name"

    def __init__(self, group, d, arrays):
        self.group, self.id, self.component, self.args, self.settings, self.doc = group, d["id"], d["component"], d["args"], d.get("settings", {}), d
        self._arrays = arrays

    def __repr__(self):
        return f"{self.group}/{self.id}-{self.component}"

    def array(self, name):
        "A stored array, such as 'in.boxes', as a tensor"
        return torch.from_numpy(np.asarray(self._arrays[f"{self.id}.{name}"]))

    def has(self, name):
        return f"{self.id}.{name}" in self._arrays

    def state(self):
        "The state dict that was recorded, made anew from its recipe"
        return {k: weight(k, s, **self.settings.get("recipe", {})) for k, s, kind in self.settings["keys"] if kind == "recipe"}

    def inputs(self):
        "Generated inputs of necks and bodies"
        rng = np.random.RandomState(seed(self.settings["input_recipe_id"]))
        return [torch.from_numpy(rng.standard_normal(o).astype(np.float32)) for o in self.settings["input_shapes"]]

    def check(self, name, value, tol=1e-5):
        "Compare a tensor with a stored array or summary; `tol` is relative to the largest stored value"
        value = value.detach()
        if not self.has(f"out.{name}.shape"):
            want = self.array(f"out.{name}")
            got = value.to(want.dtype)
        else:
            assert tuple(value.shape) == tuple(self.array(f"out.{name}.shape").tolist()), f"{self!r} {name}: shape {tuple(value.shape)}"
            want, got = self.array(f"out.{name}.val"), value.flatten()[self.array(f"out.{name}.idx")]
            mean, std = self.array(f"out.{name}.stats")[:2].tolist()
            top = max(abs(float(want.abs().max())) if want.numel() else 0.0, 1e-6)
            assert abs(value.double().mean().item() - mean) <= tol * top and abs(value.double().std(correction=0).item() - std) <= tol * top, f"{self!r} {name}: mean or deviation differ"
        assert got.shape == want.shape, f"{self!r} {name}: {tuple(got.shape)}, recorded {tuple(want.shape)}"
        if want.numel():
            top = max(float(want.double().abs().max()), 1e-6)
            worst = float((got.double() - want.double()).abs().max()) / top
            assert worst <= tol, f"{self!r} {name}: off by {worst:.2e} of the largest value"


@functools.cache
def _group(group):
    with np.load(ROOT / "components" / f"{group}.npz") as z:
        arrays = {k: z[k] for k in z.files}
    return [Case(group, d, arrays) for d in json.loads((ROOT / "components" / f"{group}.json").read_text())["cases"]]


class DetectorCase(Case):
    "One recorded detector"

    def __init__(self, name):
        self.group, self.id, self._file = "detectors", name, ROOT / "detectors" / name
        self.doc = json.loads(self._file.with_suffix(".json").read_text())
        self.config, self.recipe = self.doc["model_config"], self.doc["recipe"]

    def __repr__(self):
        return self.id

    @functools.cached_property
    def _arrays(self):
        with np.load(self._file.with_suffix(".npz")) as z:
            return {k: z[k] for k in z.files}

    def array(self, name):
        return torch.from_numpy(np.asarray(self._arrays[name]))

    def has(self, name):
        return name in self._arrays

    def state(self):
        "The state dict that was recorded; without the constants that a constructor makes"
        keys, got = json.loads((ROOT / "detectors" / "keys" / f"{self.id}.json").read_text()), {}
        for k, shape, kind in keys:
            if kind == "recipe":
                got[k] = weight(k, shape, **self.recipe)
            elif kind.startswith("alias:"):
                got[k] = got[kind[6:]]
        return got

    def image(self):
        "The image, red first"
        return self.array("in0.image").flip(0)

    def bits(self, name, width):
        "Packed masks as booleans"
        return torch.from_numpy(np.unpackbits(self._arrays[name], axis=-1, count=width).astype(bool))

    def check(self, name, value, tol=1e-4):
        "Compare a tensor with a recorded output, given by its whole name"
        value = value.detach()
        assert tuple(value.shape) == tuple(self.array(f"{name}.shape").tolist()), f"{self!r} {name}: shape {tuple(value.shape)}"
        want, got = self.array(f"{name}.val"), value.flatten()[self.array(f"{name}.idx")]
        top = max(float(self.array(f"{name}.stats")[2:].abs().max()), 1e-6)
        worst = float((got.double() - want.double()).abs().max()) / top
        assert worst <= tol, f"{self!r} {name}: off by {worst:.2e} of the largest value"
        return worst


def detectors(*names):
    "Recorded detectors, as parameters of a test"
    if not ROOT.is_dir():
        return [pytest.param(None, marks=pytest.mark.skip(reason="the recorded figures are not here: set VISDET_GOLDEN"))]
    return [pytest.param(DetectorCase(n), id=n) for n in names if (ROOT / "detectors" / f"{n}.json").is_file()]


def cases(group, *components):
    "Recorded cases of a group, as parameters of a test; one that is skipped where nothing is recorded"
    if not ROOT.is_dir():
        return [pytest.param(None, marks=pytest.mark.skip(reason="the recorded figures are not here: set VISDET_GOLDEN"))]
    return [pytest.param(c, id=f"{c.id}-{c.component}") for c in _group(group) if not components or c.component in components]
