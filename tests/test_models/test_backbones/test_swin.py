"""The behaviours that MMDetection states for Swin: sizes of any image, windows that move with and without padding, frozen stages

`BEHAVIOURS` names the test of each behaviour, `WITHOUT` what has no counterpart.
"""
import functools

import pytest
import torch

from visdet.core.basics import CheckpointError, ConfigError
from visdet.nn.body import create_body

BEHAVIOURS = {
    "weights that are no file are refused": "test_refuses",
    "images of 32 and of 31 pixels: 8, 4, 2 and 1 cells": "test_small_images",
    "an image of 112 x 137 pixels": "test_odd_image",
    "norms of patches can be read": "test_patch_norm",
    "four frozen stages: nothing learns": "test_frozen",
    "a block keeps the shape, moved or not, padded or not": "test_blocks",
    "stochastic depth grows to its rate": "test_drop_path",
}
WITHOUT = {
    "the stride of the first stage and the size of patches": "both are timm's",
    "pretrain_img_size of three numbers": "networks take images of any size",
    "absolute positions (ape)": "not in timm's network; the import of configurations says so",
    "patch_norm=False": "not in timm's network; the import of configurations says so",
}
NAME = "det:swin_tiny_patch4_window7_224"


@functools.cache
def swin():
    torch.manual_seed(0)
    return create_body(NAME).eval()


def shapes(h, w):
    with torch.no_grad():
        return [tuple(o.shape[1:]) for o in swin()(torch.rand(1, 3, h, w))]


def test_refuses():
    with pytest.raises(CheckpointError, match="no such file"):
        create_body(NAME, weights="123")
    with pytest.raises(ConfigError, match="number"):
        create_body("drop:swin_tiny_patch4_window7_224")


@pytest.mark.parametrize("side", [32, 31])
def test_small_images(side):
    assert shapes(side, side) == [(96, 8, 8), (192, 4, 4), (384, 2, 2), (768, 1, 1)]


def test_odd_image():
    assert [o[1:] for o in shapes(112, 137)] == [(28, 35), (14, 18), (7, 9), (4, 5)]
    assert [o[1:] for o in shapes(224, 224)] == [(56, 56), (28, 28), (14, 14), (7, 7)]


def test_patch_norm():
    assert swin().net.net.patch_embed.norm.normalized_shape == (96,)


def test_frozen():
    b = create_body(NAME, frozen_stages=4)
    assert not any(p.requires_grad for p in b.parameters()) and b.free_params() == []
    b = create_body(NAME, frozen_stages=2)
    learns = {".".join(k.split(".")[1:3]) for k, p in b.named_parameters() if p.requires_grad}
    assert learns == {"net.layers_2", "net.layers_3", "norms.2", "norms.3"}


@pytest.mark.parametrize("size", [(56, 56), (50, 61)])
def test_blocks(size):
    stage = swin().net.net.layers_0
    x = torch.rand(2, *size, 96)
    with torch.no_grad():
        for block in stage.blocks:
            assert block(x).shape == x.shape
    assert [bool(any(b.shift_size)) for b in stage.blocks] == [False, True]


def test_drop_path():
    rates = lambda b: [round(getattr(o.drop_path1, "drop_prob", 0.0), 2) for o in b.modules() if hasattr(o, "drop_path1")]  # noqa: E731
    assert rates(create_body("det+drop=0.2:swin_tiny_patch4_window7_224"))[-1] == 0.2
    assert set(rates(create_body("det+drop=0:swin_tiny_patch4_window7_224"))) == {0.0}
