#!/usr/bin/env python3
"""The COCO-trained YOLOX-Nano on the 206 validation images of coco_mini: does a foreign checkpoint keep its AP here?

    python benchmarks/peers/yolox_nano.py ../shared/data --out benchmarks/results/yolox_nano.json

The folder holds `coco_mini` and `weights/detectors/yolox_nano_coco_bnfused.pth`; `expected.json` beside the images has the AP of the original network in another runtime, with every class of a place and 100
detections an image: `as_reference` is the same setting here. `best_class` is MMDetection's and the authors' rule, one class a place and no limit, and visdet's default; `antialias` resizes as visdet does by default. `load_mmdet` is the
way of somebody who leaves MMDetection: the configuration's words and the file, everything else follows from them.
"""
import argparse
import hashlib
import json
import time
from pathlib import Path

import torch

import visdet
from visdet.data.coco import read_coco
from visdet.data.transforms import Resize
from visdet.deploy.predict import as_predictor
from visdet.eval.evaluate import evaluate
from visdet.models.yolox import yolox

SIZE, SCORE = 416, 0.001


def configuration():
    "YOLOX-Nano as MMDetection's configuration of that name describes it, with a low threshold"
    norm, act = dict(type="BN", momentum=0.03, eps=0.001), dict(type="Swish")
    bce = dict(type="CrossEntropyLoss", use_sigmoid=True, reduction="sum", loss_weight=1.0)
    pipeline = [dict(type="LoadImageFromFile"), dict(type="Resize", scale=(SIZE, SIZE), keep_ratio=True), dict(type="Pad", pad_to_square=True, pad_val=dict(img=(114.0, 114.0, 114.0)))]
    model = dict(
        type="YOLOX", data_preprocessor=dict(type="DetDataPreprocessor", pad_size_divisor=32),
        backbone=dict(type="CSPDarknet", deepen_factor=0.33, widen_factor=0.25, out_indices=(2, 3, 4), use_depthwise=True, spp_kernal_sizes=(5, 9, 13), norm_cfg=norm, act_cfg=act),
        neck=dict(type="YOLOXPAFPN", in_channels=[64, 128, 256], out_channels=64, num_csp_blocks=1, use_depthwise=True, upsample_cfg=dict(scale_factor=2, mode="nearest"), norm_cfg=norm, act_cfg=act),
        bbox_head=dict(
            type="YOLOXHead", num_classes=80, in_channels=64, feat_channels=64, stacked_convs=2, strides=(8, 16, 32), use_depthwise=True, norm_cfg=norm, act_cfg=act, loss_cls=bce, loss_obj=bce,
            loss_bbox=dict(type="IoULoss", mode="square", eps=1e-16, reduction="sum", loss_weight=5.0), loss_l1=dict(type="L1Loss", reduction="sum", loss_weight=1.0),
        ),
        train_cfg=dict(assigner=dict(type="SimOTAAssigner", center_radius=2.5)), test_cfg=dict(score_thr=SCORE, nms=dict(type="nms", iou_threshold=0.65)),
    )  # fmt: skip
    return dict(model=model, test_dataloader=dict(dataset=dict(type="CocoDataset", pipeline=pipeline)))


def measure(model, records, bs, antialias=False, all_classes=False, max_num=None, resize=True):
    "AP and the like in one setting"
    model.head.all_classes, model.head.max_num = all_classes, max_num
    predictor = as_predictor(model, Resize((SIZE, SIZE), "letterbox", antialias), (SIZE, SIZE)) if resize else as_predictor(model)
    start = time.perf_counter()
    dets = predictor.predict([records[i].path for i in range(len(records))], score=SCORE, bs=bs)
    seconds = time.perf_counter() - start
    return {k: round(float(v), 5) for k, v in evaluate(dets, records, backend="pycocotools").stats.items()} | dict(ms_per_image=round(1000 * seconds / len(records), 1))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("data", type=Path), p.add_argument("--out", type=Path), p.add_argument("--threads", type=int, default=1), p.add_argument("--bs", type=int, default=8)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    mini, file = a.data / "coco_mini", a.data / "weights/detectors/yolox_nano_coco_bnfused.pth"
    records = read_coco(mini / "annotations/instances_val2017.json", mini / "val2017")
    model = yolox(vocab=records.vocab, size="nano", weights=file, score_thr=SCORE)
    expected = json.loads((mini / "reference_detections/expected.json").read_text())["yolox_nano_416"]["AP_on_these_206_images_full_output"]
    res = dict(
        what="YOLOX-Nano, trained on COCO by its authors, on the 206 validation images of coco_mini",
        images=len(records), size=SIZE, score_thr=SCORE, nms_thr=model.head.nms_thr, report=model.body.report,
        sha256=hashlib.sha256(file.read_bytes()).hexdigest(), threads=a.threads, torch=torch.__version__,
        reference={k: round(expected[k], 5) for k in ("AP", "AP50", "AP75")},
        as_reference=measure(model, records, a.bs, all_classes=True, max_num=100), best_class=measure(model, records, a.bs), antialias=measure(model, records, a.bs, True),
        load_mmdet=measure(visdet.load_mmdet(configuration(), file), records, a.bs, resize=False),
    )  # fmt: skip
    print(json.dumps(res, indent=1))
    if a.out:
        a.out.write_text(json.dumps(res, indent=1) + "\n")


if __name__ == "__main__":
    main()
