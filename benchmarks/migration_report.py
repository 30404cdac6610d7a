"""Migrate the stock configurations of MMDetection and record what became of their keys.

    python benchmarks/migration_report.py --configs FOLDER [--resolved FOLDER] [--out benchmarks/results/migration.json]

FOLDER holds the configurations as the package `mmdet` 3.3.0 ships them (`mmdet/.mim/configs`). `--resolved` names a folder with a JSON file a configuration, what MMDetection
itself resolves it to; each is then compared with what is read here. Nothing is executed, and MMDetection need not be installed.
"""
import argparse, json, platform
from collections import Counter
from pathlib import Path
from visdet.config.migrate import map_mmdet
from visdet.config.mmdet_read import read_mmdet
from visdet.core.basics import VisdetError, atomic_write

STOCK = """retinanet/retinanet_r50_fpn_1x_coco faster_rcnn/faster-rcnn_r50_fpn_1x_coco mask_rcnn/mask-rcnn_r50_fpn_1x_coco cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco htc/htc_r50_fpn_1x_coco
fcos/fcos_r50-caffe_fpn_gn-head_1x_coco atss/atss_r50_fpn_1x_coco gfl/gfl_r50_fpn_1x_coco yolox/yolox_s_8xb8-300e_coco rtmdet/rtmdet_s_8xb32-300e_coco ssd/ssd300_coco detr/detr_r50_8xb2-150e_coco
deformable_detr/deformable-detr_r50_16xb2-50e_coco dino/dino-4scale_r50_8xb2-12e_coco swin/mask-rcnn_swin-t-p4-w7_fpn_amp-ms-crop-3x_coco lvis/mask-rcnn_r50_fpn_sample1e-3_ms-1x_lvis-v1
pascal_voc/faster-rcnn_r50_fpn_1x_voc0712 albu_example/mask-rcnn_r50_fpn_albu-1x_coco panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco mask2former/mask2former_r50_8xb2-lsj-50e_coco""".split()

def one(root, name, resolved):
    "The record of one configuration"
    cfg = read_mmdet(root/f'{name}.py'); m = map_mmdet(cfg, f'{name}.py')
    res = dict(name=name, model=cfg.get('model', {}).get('type'), code=m.code, counts=m.report.counts, lost=[dict(key=o.key, reason=o.reason, fatal=o.fatal) for o in m.report.lost], config=m.config if m.code < 2 else None,
               fates=[[o.key, o.status, o.target, o.reason] for o in m.report.fates])
    if resolved: res['equals_mmdetection'] = json.loads(json.dumps(cfg)) == json.loads((resolved/f'{Path(name).name}.json').read_text())
    return res

def survey(root):
    "All files of the folder: how many resolve, and how the leaves migrate"
    codes, models, bad = Counter(), Counter(), []
    paths = sorted(root.rglob('*.py')); leaves = [p for p in paths if '_base_' not in p.relative_to(root).parts]
    for p in paths:
        name = p.relative_to(root).as_posix()
        try: cfg = read_mmdet(p)
        except VisdetError as e: bad.append(dict(name=name, leaf=p in leaves, reason=str(e).replace(f'{root.resolve()}/', '').replace(f'{root}/', ''))); continue
        if p in leaves: c = map_mmdet(cfg, name).code; codes[str(c)] += 1; models[str((cfg.get('model') or {}).get('type'))] += c < 2
    return dict(files=len(paths), leaves=len(leaves), resolved=len(paths)-len(bad), resolved_leaves=len(leaves)-sum(o['leaf'] for o in bad), unresolved=bad, codes=dict(sorted(codes.items())), migrated_by_model={k: v for k,v in sorted(models.items()) if v})

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--configs', type=Path, required=True); p.add_argument('--resolved', type=Path); p.add_argument('--out', type=Path, default=Path(__file__).parent/'results'/'migration.json')
    a = p.parse_args()
    res = dict(source='stock configurations of mmdet 3.3.0', python=platform.python_version(), configs=[one(a.configs, n, a.resolved) for n in STOCK], all=survey(a.configs))
    text = json.dumps({**res, 'configs': None}, indent=1, ensure_ascii=False).replace('"configs": null', '"configs": [\n'+',\n'.join(json.dumps(o, ensure_ascii=False) for o in res['configs'])+']')
    with atomic_write(a.out) as t: t.write_text(text+'\n')
    print({k: v for k,v in res['all'].items() if k != 'unresolved'})
    for o in res['configs']: print(f"{o['code']}  {o['counts']}  {len(o['lost'])} lost  {o['name']}")

if __name__ == '__main__': main()
