"ATSS, GFL, VFNet, TOOD: all rows as on a GPU, options of MMDetection's sections, what is refused, and epochs"
import copy

import pytest
import torch
from torch import nn

import visdet.nn.atss_head as family
from visdet.core.basics import ConfigError
from visdet.core.testing import close, rand_boxes
from visdet.data.targets import make_targets
from visdet.models.mmdet import load_mmdet, mmdet_args
from visdet.models.mmdet_keys import key_table
from visdet.models.mmdet_map import exit_code
from visdet.models.zoo import create_model
from visdet.nn.deform import DeformConv

FORMS = [("atss", {}), ("gfl", {}), ("vfnet", {}), ("vfnet", dict(use_atss=False, radius=1.5)), ("vfnet", dict(use_vfl=False)), ("tood", {}), ("tood", dict(initial_epoch=0)), ("tood", dict(kind="anchor_based"))]


def every_row(match):
    B, N = match.shape
    return torch.arange(B).repeat_interleave(N), torch.arange(N).repeat(B), (match >= 0).flatten().float()


@pytest.mark.parametrize("kind,kw", FORMS)
def test_all_rows_are_the_positives(kind, kw, monkeypatch):
    "On a GPU every row is kept and the background weighs nothing: same terms, same gradients, same oracle"
    torch.manual_seed(0)
    m = create_model(kind, 3, body="test_resnet", channels=32, num_convs=2, **kw)
    t = make_targets([rand_boxes(3, (96, 128), 0, 20), torch.zeros(0, 4)], [torch.tensor([0, 1, 2]), torch.zeros(0).long()], [(96, 128)] * 2)
    raw, ws = m(torch.randn(2, 3, 96, 128)), [m.head.cls.weight, m.head.reg.weight]

    def run():
        terms = m.loss(raw, t)
        return terms, torch.autograd.grad(sum(terms.values()), ws, retain_graph=True), m.decode(m.oracle(raw, t), t.sizes)

    a, ga, da = run()
    monkeypatch.setattr(family, "positives", every_row)
    b, gb, db = run()
    for k in a:
        close(a[k], b[k], 1e-5)
    for x, y in zip(ga, gb):
        close(x, y, 1e-5)
    assert [len(o) for o in da] == [len(o) for o in db]


def section(kind, head=(), train=(), **changes):
    "A small model section as MMDetection writes it"
    cells = dict(type="AnchorGenerator", ratios=[1.0], octave_base_scale=8, scales_per_octave=1, strides=[8, 16, 32, 64])
    deltas = dict(type="DeltaXYWHBBoxCoder", target_means=[0.0] * 4, target_stds=[0.1, 0.1, 0.2, 0.2])
    focal, quality, giou = dict(type="FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0), dict(type="QualityFocalLoss", use_sigmoid=True, beta=2.0, loss_weight=1.0), dict(type="GIoULoss", loss_weight=2.0)
    own = dict(
        ATSS=dict(anchor_generator=cells, bbox_coder=deltas, loss_cls=focal, loss_bbox=giou, loss_centerness=dict(type="CrossEntropyLoss", use_sigmoid=True, loss_weight=1.0)),
        GFL=dict(anchor_generator=cells, loss_cls=quality, loss_dfl=dict(type="DistributionFocalLoss", loss_weight=0.25), reg_max=16, loss_bbox=giou),
        VFNet=dict(strides=[8, 16, 32, 64], anchor_generator=cells),
        TOOD=dict(anchor_generator=cells, bbox_coder=deltas, initial_loss_cls=dict(focal, activated=True), loss_cls=dict(quality, activated=True), loss_bbox=giou),
    )[kind]
    assigner = dict(type="ATSSAssigner", topk=9)
    cfg = dict(allowed_border=-1, pos_weight=-1, debug=False, **(dict(initial_epoch=4, initial_assigner=assigner, assigner=dict(type="TaskAlignedAssigner", topk=13), alpha=1, beta=6) if kind == "TOOD" else dict(assigner=assigner)))
    return dict(
        type=kind,
        backbone=dict(type="ResNet", depth=18, num_stages=4, out_indices=[0, 1, 2, 3], frozen_stages=1, norm_cfg=dict(type="BN", requires_grad=False), norm_eval=True, style="pytorch"),
        neck=dict(type="FPN", in_channels=[64, 128, 256, 512], out_channels=32, start_level=1, add_extra_convs="on_output", num_outs=4),
        bbox_head={**dict(type=f"{kind}Head", num_classes=3, in_channels=32, feat_channels=32, stacked_convs=1), **own, **dict(head)},
        train_cfg=dict(cfg, **dict(train)),
        test_cfg=dict(nms_pre=1000, min_bbox_size=0, score_thr=0.05, nms=dict(type="nms", iou_threshold=0.6), max_per_img=100),
    )


OPTIONS = [
    ("ATSS", dict(pred_kernel_size=1), {}, dict(kernel=1)),
    ("ATSS", dict(loss_bbox=dict(type="CIoULoss")), {}, dict(reg_loss="ciou", reg_weight=1.0)),
    ("ATSS", dict(loss_cls=dict(type="FocalLoss", use_sigmoid=True, gamma=1.5, alpha=0.5)), {}, dict(gamma=1.5, alpha=0.5)),
    ("ATSS", dict(norm_cfg=dict(type="BN")), dict(assigner=dict(type="ATSSAssigner", topk=5, ignore_iof_thr=0.5)), dict(head_norm="bn", topk=5, ignore=0.5)),
    ("ATSS", dict(anchor_generator=dict(type="AnchorGenerator", ratios=[0.5, 2.0], octave_base_scale=4, scales_per_octave=2, center_offset=0.5, strides=[8, 16, 32, 64])), {}, dict(ratios=[0.5, 2.0], base=4, per_octave=2, offset=0.5)),
    ("ATSS", dict(anchor_generator=dict(type="AnchorGenerator", ratios=[1.0], scales=[4], strides=[8, 16, 32, 64])), {}, dict(base=4)),
    ("GFL", dict(reg_max=8, loss_dfl=dict(type="DistributionFocalLoss")), {}, dict(reg_max=8, dfl_weight=1.0)),
    ("GFL", dict(loss_bbox=dict(type="IoULoss", mode="linear", loss_weight=3.0)), {}, dict(reg_loss="iou", reg_weight=3.0)),
    ("VFNet", dict(use_atss=False, center_sampling=True, center_sample_radius=2.0, use_vfl=False, bbox_norm_type="stride", gradient_mul=0.5), {}, dict(use_atss=False, radius=2.0, use_vfl=False, unit="stride", grad_share=0.5)),
    ("VFNet", dict(dcn_on_last_conv=True, regress_ranges=[[-1, 50], [50, 100], [100, 200], [200, 1e8]]), {}, dict(deform=True, ranges=[[-1, 50], [50, 100], [100, 200], [200, 1e8]])),
    ("VFNet", dict(loss_cls=dict(type="VarifocalLoss", use_sigmoid=True, alpha=0.5, gamma=1.0, iou_weighted=False)), {}, dict(alpha=0.5, gamma=1.0, iou_weighted=False)),
    ("TOOD", dict(anchor_type="anchor_based", num_dcn=1), dict(initial_epoch=2, alpha=0.5, beta=4), dict(kind="anchor_based", deform=1, initial_epoch=2, score_power=0.5, iou_power=4)),
]


@pytest.mark.parametrize("kind,head,train,want", OPTIONS)
def test_options_become_arguments(kind, head, train, want):
    name, args, fates = mmdet_args(section(kind, head, train))
    assert name == kind.lower() and {k: args.get(k) for k in want} == want
    assert not [o for o in fates if o.effect]
    m = load_mmdet(section(kind, head, train))
    keys = [r.theirs for r in key_table(m)]
    assert len(set(keys)) == len(keys) and all(k.split(".")[0] in ("backbone", "neck", "bbox_head") for k in keys)
    assert any(k.endswith("conv_offset.weight") for k in keys) == any(isinstance(o, DeformConv) and o.places is not None for o in m.modules())


REFUSED = [
    ("ATSS", dict(reg_decoded_bbox=False), {}),
    ("ATSS", dict(loss_cls=dict(type="QualityFocalLoss", use_sigmoid=True)), {}),
    ("ATSS", dict(loss_bbox=dict(type="L1Loss")), {}),
    ("ATSS", dict(conv_cfg=dict(type="DCNv2")), {}),
    ("ATSS", dict(loss_centerness=dict(type="CrossEntropyLoss")), {}),
    ("ATSS", {}, dict(allowed_border=0)),
    ("ATSS", {}, dict(pos_weight=2)),
    ("ATSS", {}, dict(assigner=dict(type="ATSSAssigner", topk=9, alpha=0.8))),
    ("ATSS", {}, dict(assigner=dict(type="MaxIoUAssigner", pos_iou_thr=0.5))),
    ("GFL", dict(anchor_generator=dict(type="AnchorGenerator", ratios=[0.5, 1.0], octave_base_scale=8, scales_per_octave=1, strides=[8, 16, 32, 64])), {}),
    ("GFL", dict(anchor_generator=dict(type="AnchorGenerator", ratios=[1.0], octave_base_scale=8, scales_per_octave=1, strides=[8, 16, 32, 60])), {}),
    ("GFL", dict(loss_cls=dict(type="QualityFocalLoss", use_sigmoid=False)), {}),
    ("GFL", dict(surprise=1), {}),
    ("VFNet", dict(conv_bias=True), {}),
    ("VFNet", dict(strides=[8, 16, 32, 128]), {}),
    ("VFNet", dict(bbox_norm_type="pixel"), {}),
    ("VFNet", {}, dict(assigner=dict(type="ATSSAssigner", topk=9, ignore_iof_thr=0.5))),
    ("TOOD", dict(loss_cls=dict(type="QualityFocalLoss", use_sigmoid=True)), {}),
    ("TOOD", dict(anchor_type="anchor_fre"), {}),
    ("TOOD", {}, dict(assigner=dict(type="SimOTAAssigner"))),
]


@pytest.mark.parametrize("kind,head,train", REFUSED)
def test_what_is_not_taken_is_refused(kind, head, train):
    "An error where predictions would differ; where only training would, the report says so, and a migration's exit code is not 0"
    try:
        model = load_mmdet(section(kind, head, train))
    except ConfigError:
        return
    assert model.mmdet_report.differences(True)
    assert exit_code(mmdet_args(section(kind, head, train))[2]) == 1


def test_missing_losses_are_not_guessed():
    for kind in ("ATSS", "GFL", "TOOD"):
        for key in ("loss_cls", "loss_bbox", "anchor_generator"):
            s = section(kind)
            del s["bbox_head"][key]
            try:
                assert load_mmdet(s).mmdet_report.differences(True)
            except ConfigError:
                pass


@pytest.mark.parametrize("kind", ["ATSS", "GFL", "VFNet", "TOOD"])
def test_a_config_trains(kind):
    m = load_mmdet(section(kind)).train()
    t = make_targets([rand_boxes(2, (96, 128), 0, 20)], [torch.tensor([0, 2])], [(96, 128)])
    sum(m.loss(m(torch.randn(1, 3, 96, 128)), t).values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in m.head.parameters())


def test_epochs_reach_the_head():
    m = create_model("tood", 2, body="test_resnet", channels=16, num_convs=1)
    m.set_epoch(3)
    assert m.head.epoch == 3 and copy.deepcopy(m).head.epoch == 3
    create_model("atss", 2, body="test_resnet", channels=16, num_convs=1).set_epoch(3)
    assert isinstance(m, nn.Module) and not [k for k in m.state_dict() if "epoch" in k]
