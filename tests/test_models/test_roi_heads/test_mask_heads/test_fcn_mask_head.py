"What MMDetection's tests say of the mask head of four convolutions: shapes of masks, a loss with objects"
import pytest
import torch

from visdet.core.testing import rand_boxes
from visdet.cv.roi import to_rois
from visdet.data.detections import Detections
from visdet.data.targets import make_targets
from visdet.nn.mask_head import MaskHead


@pytest.mark.parametrize("paste", ["stretch", "sample"])
@pytest.mark.parametrize("n", [5, 1, 0])
def test_masks_of_detections(n, paste):
    "Six classes, 14 x 14 cells: one mask as large as the image for each detection"
    torch.manual_seed(0)
    d = Detections(rand_boxes(n, (128, 128), 0), torch.rand(n), torch.arange(n) % 6, (128, 128), mask_probs=torch.rand(n, 14, 14))
    d.paste = paste
    assert torch.as_tensor(d.masks).shape == (n, 128, 128)


@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize("n", [3, 1, 0])
def test_logits(n, agnostic):
    h = MaskHead(4, 6, [4], 4, 2, 7, agnostic=agnostic)
    out = h([torch.randn(1, 4, 32, 32)], to_rois([rand_boxes(n, (128, 128), 1)]), torch.arange(n) % 6)
    assert out.shape == (n, 14, 14)


@pytest.mark.parametrize("agnostic", [False, True])
def test_loss(agnostic):
    "Eight classes and channels, regions of six cells, targets of twelve, one random bitmap"
    torch.manual_seed(0)
    h = MaskHead(8, 8, [4], 8, 1, 6, agnostic=agnostic)
    t = make_targets([torch.tensor([[23.6667, 23.8757, 238.6326, 151.8874]])], [torch.tensor([2])], [(160, 240)], masks=torch.randint(0, 2, (1, 160, 240), dtype=torch.uint8))
    rois = torch.cat([torch.zeros(3, 1), torch.cat([t.boxes[0], rand_boxes(2, (160, 240), 1, 20)])], 1)
    logits = h([torch.randn(1, 8, 40, 60)], rois, torch.tensor([2, 2, 2]))
    loss = h.loss(logits, rois[:, 1:], torch.zeros(3, dtype=torch.long), torch.ones(3), t)
    assert logits.shape == (3, 12, 12) and loss > 0 and loss.ndim == 0 and loss.requires_grad
    want = torch.nn.functional.binary_cross_entropy_with_logits(logits, h.goals(12, rois[:, 1:], torch.zeros(3, dtype=torch.long), t))
    assert float(loss) == pytest.approx(float(want), rel=1e-5)
    none = make_targets([torch.zeros(0, 4)], [torch.zeros(0).long()], [(160, 240)])
    assert h.loss(logits[:0], rois[:0, 1:], torch.zeros(0, dtype=torch.long), torch.ones(0), none) == 0
