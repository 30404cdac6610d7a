"Whole detectors against torchvision's, with copied weights, under torchvision's settings"
import pytest, torch
from torch import nn
from torchvision.models import detection as D
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7
from visdet.core.testing import close
from visdet.data.targets import make_targets
from visdet.models.torchvision import from_torchvision, load_torchvision
from visdet.models.zoo import create_model

EVERYTHING = 10**7 # a sample that takes all, so that both libraries draw the same
SIZES = [(150, 200), (128, 176)]

def backbone(dense):
    "ResNet-50 with frozen norms whose random statistics keep activations of order one"
    kw = dict(returned_layers=[2,3,4], extra_blocks=LastLevelP6P7(256, 256)) if dense else dict(extra_blocks=LastLevelMaxPool())
    b = resnet_fpn_backbone(backbone_name='resnet50', weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=5, **kw)
    for n,m in b.body.named_modules():
        if isinstance(m, FrozenBatchNorm2d):
            k = m.weight.numel(); lo, hi = (.15, .3) if n.endswith('bn3') else (.8, 1.2)
            m.weight.copy_(torch.rand(k)*(hi-lo)+lo); m.bias.copy_(torch.randn(k)*.1); m.running_mean.copy_(torch.randn(k)*.1); m.running_var.copy_(torch.rand(k)+.5)
    return b

def tame(layer, feats, std, bias=0.):
    "Scale a last layer so that its outputs spread by `std` around `bias`"
    with torch.no_grad():
        layer.bias.zero_(); y = torch.cat([layer(o).flatten() for o in feats])
        layer.weight.mul_(std/y.std()); layer.bias.fill_(bias)

def build(kind, K):
    torch.manual_seed(0)
    lim = dict(min_size=160, max_size=224)
    if kind == 'retinanet': tv = D.RetinaNet(backbone(True), K, detections_per_img=50, **lim)
    if kind == 'fcos': tv = D.FCOS(backbone(True), K, detections_per_img=50, score_thresh=.3, **lim)
    if kind in ('faster_rcnn', 'mask_rcnn'):
        f = D.FasterRCNN if kind == 'faster_rcnn' else D.MaskRCNN
        g = AnchorGenerator(tuple((s,) for s in (32, 64, 128, 256, 512)), ((.5, 1., 2.),)*5)
        tv = f(backbone(False), K+1, rpn_anchor_generator=g, rpn_batch_size_per_image=EVERYTHING, box_batch_size_per_image=EVERYTHING, box_positive_fraction=1., rpn_pre_nms_top_n_train=300, rpn_post_nms_top_n_train=120,
               rpn_pre_nms_top_n_test=200, rpn_post_nms_top_n_test=80, box_detections_per_img=40, box_score_thresh=.15, **lim)
    tv.transform.postprocess = lambda result, *a: result
    return tv.train()

def spread(tv, kind, x):
    "Give the heads opinions: random weights alone would detect nothing"
    with torch.no_grad(): fs = list(tv.backbone(x).values())
    if kind in ('retinanet', 'fcos'):
        c, r = tv.head.classification_head, tv.head.regression_head
        with torch.no_grad(): cf, rf = [c.conv(o) for o in fs], [r.conv(o) for o in fs]
        tame(c.cls_logits, cf, 2., -4. if kind == 'retinanet' else -2.); tame(r.bbox_reg, rf, .3 if kind == 'retinanet' else 2., 0. if kind == 'retinanet' else 3.)
        if kind == 'fcos': tame(r.bbox_ctrness, rf, 1.)
        return
    with torch.no_grad(): rf = [tv.rpn.head.conv(o) for o in fs]
    tame(tv.rpn.head.cls_logits, rf, 2.); tame(tv.rpn.head.bbox_pred, rf, .2)
    p = tv.roi_heads.box_predictor; y = torch.randn(50, 1024).relu()
    tame(p.cls_score, [y], 2.); tame(p.bbox_pred, [y], 1.)

def scene(kind, K, empty=()):
    "Images in 0..1 and torchvision's targets; an image in `empty` has no objects"
    g = torch.Generator().manual_seed(1); images, targets = [], []
    for i,(h,w) in enumerate(SIZES):
        n = 0 if i in empty else 4
        images.append(torch.rand(3, h, w, generator=g))
        xy = torch.rand(n, 2, generator=g)*torch.tensor([w*.5, h*.5]); wh = torch.rand(n, 2, generator=g)*torch.tensor([w*.4, h*.4])+12
        t = dict(boxes=torch.cat([xy, xy+wh], 1), labels=torch.randint(0, K, (n,), generator=g)+int('rcnn' in kind))
        if kind == 'mask_rcnn':
            t['masks'] = torch.zeros(n, h, w, dtype=torch.uint8)
            for m,(x1,y1,x2,y2) in zip(t['masks'], t['boxes'].int().tolist()): m[y1:y2,x1:x2] = (torch.rand(y2-y1, x2-x1, generator=g) > .3)
        targets.append(t)
    return images, targets

def batch(tv, kind, images, targets):
    "What torchvision's transform makes of the scene, as visdet's batch"
    il, ts = tv.transform([o.clone() for o in images], [{k: v.clone() for k,v in t.items()} for t in targets])
    H, W = il.tensors.shape[-2:]
    masks = torch.cat([nn.functional.pad(t['masks'], (0, W-t['masks'].shape[2], 0, H-t['masks'].shape[1])) for t in ts]) if kind == 'mask_rcnn' else None
    return il.tensors, make_targets([t['boxes'] for t in ts], [t['labels']-int('rcnn' in kind) for t in ts], il.image_sizes, masks=masks)

TERMS = dict(retinanet=dict(cls='classification', box='bbox_regression'), fcos=dict(cls='classification', box='bbox_regression', ctr='bbox_ctrness'),
    faster_rcnn=dict(rpn_cls='loss_objectness', rpn_box='loss_rpn_box_reg', cls='loss_classifier', box='loss_box_reg'))
TERMS['mask_rcnn'] = dict(TERMS['faster_rcnn'], mask='loss_mask')

@pytest.mark.parametrize('kind,K,empty', [('retinanet', 5, ()), ('retinanet', 1, (1,)), ('fcos', 5, ()), ('fcos', 1, (0, 1)), ('faster_rcnn', 5, ()), ('faster_rcnn', 1, (0,)), ('mask_rcnn', 4, ()), ('mask_rcnn', 1, (0, 1))])
def test_same_numbers(kind, K, empty):
    tv = build(kind, K); images, targets = scene(kind, K, empty)
    xb, t = batch(tv, kind, images, targets)
    spread(tv, kind, xb)
    m = from_torchvision(tv); worst = {}
    with torch.no_grad():
        want, got = tv.train()(images, targets), m.train().loss(m(xb, t), t)
        for k,o in TERMS[kind].items(): close(got[k], want[o], 1e-4); worst[k] = abs(got[k]-want[o]).item()
        assert set(got) == set(TERMS[kind]) and set(want) == set(TERMS[kind].values())
        ref, raw = tv.eval()(images), m.eval()(xb, t)
    det = m.decode(raw, t.sizes)
    assert sum(len(o) for o in det) > 3
    for d,r in zip(det, ref, strict=True):
        close(d.scores, r['scores'], 1e-4); close(d.boxes, r['boxes'], 1e-4); assert torch.equal(d.labels+int('rcnn' in kind), r['labels'])
        if kind == 'mask_rcnn': close(d.mask_probs, r['masks'][:,0], 1e-4)
        worst['boxes'] = max(worst.get('boxes', 0.), (d.boxes-r['boxes']).abs().max().item() if len(d) else 0.); worst['scores'] = max(worst.get('scores', 0.), (d.scores-r['scores']).abs().max().item() if len(d) else 0.)
    print(kind, K, empty, [len(o) for o in det], {k: f'{v:.1e}' for k,v in worst.items()})

@pytest.mark.parametrize('kind', ['retinanet', 'faster_rcnn'])
def test_same_gradients(kind):
    "One step's gradient of every trainable weight"
    tv = build(kind, 3); images, targets = scene(kind, 3)
    xb, t = batch(tv, kind, images, targets); spread(tv, kind, xb); m = from_torchvision(tv).train()
    sum(tv(images, targets).values()).backward(); sum(m.loss(m(xb, t), t).values()).backward()
    g = {k: torch.zeros_like(p) if p.grad is None else p.grad for k,p in tv.named_parameters()}
    import visdet.models.torchvision as V
    mine = dict(m.named_parameters())
    for k,v in g.items():
        n = V.torchvision_name(k); w = V._convert(n, v, mine); s = w.abs().max()+1e-8
        close(mine[n].grad/s, w/s, 2e-3)

def test_wrong_weights_are_refused():
    from visdet.core.basics import CheckpointError
    tv = D.RetinaNet(backbone(True), 3)
    with pytest.raises(CheckpointError, match='of another shape'): load_torchvision(create_model('retinanet', 4, extra='on_output'), tv)
    with pytest.raises(CheckpointError, match='missing|unknown'): load_torchvision(create_model('fcos', 3), tv)
