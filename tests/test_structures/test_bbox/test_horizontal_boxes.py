"""The behaviours that MMDetection states for its horizontal boxes, with its figures, of boxes that are plain tensors

`BEHAVIOURS` names the test of each behaviour, `WITHOUT` what has no counterpart.
"""
import pytest
import torch

from visdet.core.basics import ConfigError
from visdet.cv.boxes import box_flaws, clip_boxes, convert_boxes, flip_boxes, scale_boxes, shift_boxes

BEHAVIOURS = {
    "flips in an image of 50 x 85": "test_flip",
    "translation": "test_shift",
    "clipping": "test_clip",
    "rescaling": "test_scale",
    "boxes that are inside of an image, at least in part": "test_inside",
    "conversion of formats; unknown ones are refused": "test_formats",
}
WITHOUT = {
    "rotation about a point": "boxes are not rotated; rotated boxes have their own functions",
    "resizing about the own centre": "nothing needs it: convert to cxcywh and multiply",
    "find_inside_points": "assigners compare points and boxes in batches",
    "registration of kinds of boxes, converters, BaseBoxes": "boxes are plain tensors",
}
BOX, SIZE = torch.tensor([[10.0, 10, 20, 20]]), (50, 85)


def forms(b):
    "Tensors of any number of dimensions, and arrays"
    return [b, b[0], b[None].expand(2, *b.shape), b.numpy()]


@pytest.mark.parametrize("how,want", [("horizontal", [65, 10, 75, 20]), ("vertical", [10, 30, 20, 40]), ("diagonal", [65, 30, 75, 40])])
def test_flip(how, want):
    for b in forms(BOX):
        assert flip_boxes(b, SIZE, how).reshape(-1, 4)[0].tolist() == want
    assert flip_boxes(flip_boxes(BOX, SIZE, how), SIZE, how).tolist() == BOX.tolist()
    with pytest.raises(ConfigError):
        flip_boxes(BOX, SIZE, "sideways")


def test_shift():
    for b in forms(BOX):
        assert shift_boxes(b, 23, 46).reshape(-1, 4)[0].tolist() == [33, 56, 43, 66]


def test_clip():
    "Sizes are (height, width)"
    for b in forms(BOX):
        assert clip_boxes(b, (13, 14)).reshape(-1, 4)[0].tolist() == [10, 10, 14, 13]


def test_scale():
    for b in forms(BOX):
        assert scale_boxes(b, (0.4, 0.8)).reshape(-1, 4)[0].tolist() == pytest.approx([4, 8, 8, 16])


def test_inside():
    boxes = torch.tensor([[10.0, 10, 20, 20], [-5, -5, 15, 15], [45, 45, 55, 55]])
    flaws = box_flaws(boxes, (30, 30))
    assert (~flaws["gone"]).tolist() == [True, True, False] and (~flaws["outside"]).tolist() == [True, False, False]


@pytest.mark.parametrize("fmt,want", [("xyxy", [10, 10, 20, 20]), ("xywh", [10, 10, 10, 10]), ("cxcywh", [15, 15, 10, 10])])
def test_formats(fmt, want):
    for b in forms(BOX):
        assert convert_boxes(b, "xyxy", fmt).reshape(-1, 4)[0].tolist() == want
        assert convert_boxes(convert_boxes(b, "xyxy", fmt), fmt, "xyxy").tolist() == b.tolist()
    with pytest.raises(ConfigError):
        convert_boxes(BOX, "xyxy", "corners")
