"Configurations of MMDetection and other Python: read without being run, mapped with every key accounted for, built with the structure they describe"
import ast, json, keyword, math, os, pprint, time
from pathlib import Path
import pytest
from hypothesis import given, settings, strategies as st, HealthCheck
from visdet.config.mmdet_parse import Script, merge_config, python_tree, script_values
from visdet.config.mmdet_read import read_mmdet
from visdet.config.migrate import Migration, is_mmdet, map_mmdet, migrate
from visdet.core.basics import ConfigError

quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

def run(text, tmp_path, name='c.py'):
    p = tmp_path/name; p.write_text(text, encoding='utf-8', errors='surrogatepass')
    return script_values(Script(name).run(python_tree(p).body))

# ---------------------------------------------------------------- the evaluator

names = st.text('abcdefgh_', min_size=1, max_size=6).filter(lambda s: not s.startswith('_') and s != 'dict' and not keyword.iskeyword(s))
scalars = st.none() | st.booleans() | st.integers(-2**60, 2**60) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=12).filter(lambda s: '{{' not in s)
values = st.recursive(scalars, lambda s: st.lists(s, max_size=4) | st.lists(s, max_size=4).map(tuple) | st.dictionaries(names, s, max_size=4), max_leaves=20)

def as_call(o):
    "Source text with dict(...) where keys allow it, as such files are written"
    if isinstance(o, dict): return f"dict({', '.join(f'{k}={as_call(v)}' for k,v in o.items())})"
    if isinstance(o, tuple): return f"({', '.join(map(as_call, o))}{',' if len(o)==1 else ''})"
    return f"[{', '.join(map(as_call, o))}]" if isinstance(o, list) else repr(o)

@quick
@given(st.dictionaries(names, values, min_size=1, max_size=5))
def test_values_round_trip(tmp_path, cfg):
    for text in (''.join(f'{k} = {v!r}\n' for k,v in cfg.items()), ''.join(f'{k} = {as_call(v)}\n' for k,v in cfg.items())):
        if any(k in ('dict',) for k in cfg): continue
        assert run(text, tmp_path) == cfg

@quick
@given(st.dictionaries(names, values, min_size=1, max_size=4))
def test_generic_dict_to_yaml(tmp_path, cfg):
    from visdet.core.yaml import read_yaml
    (tmp_path/'g.py').write_text(f'config = {pprint.pformat(cfg)}\n', encoding='utf-8')
    if is_mmdet(dict(config=cfg)): return
    try: m = migrate(tmp_path/'g.py', out=tmp_path/'g.yaml')
    except ConfigError as e: assert any(w in str(e) for w in ('NUL', 'surrogate', 'character', 'NaN', '64 bits')); return
    plain = lambda o: {k: plain(v) for k,v in o.items()} if isinstance(o, dict) else [plain(v) for v in o] if isinstance(o, (list, tuple)) else o
    assert m.code == 0 and m.config == plain(cfg) == read_yaml(tmp_path/'g.yaml').plain()

numbers = st.integers(-50, 50).map(str) | st.floats(-50, 50, allow_nan=False).map(lambda v: f'({v!r})')
exprs = st.recursive(numbers, lambda s: st.tuples(s, st.sampled_from(['+', '-', '*', '/', '//', '%', '<', '==', 'and', 'or']), s).map(lambda t: f'({t[0]} {t[1]} {t[2]})') | s.map(lambda v: f'(-{v})') | st.lists(s, min_size=1, max_size=3).map(lambda v: f"max([{', '.join(v)}])")
    | s.map(lambda v: f'sum([i*2 for i in range(3) if i != {v}])'), max_leaves=12)

@quick
@given(exprs)
def test_arithmetic_is_pythons(tmp_path, text):
    try: want = eval(text, {})
    except (ArithmeticError, TypeError): want = None
    try: got = run(f'x = {text}', tmp_path)['x']
    except ConfigError: got = None
    assert got == want or (isinstance(want, float) and not math.isfinite(want))

@pytest.mark.parametrize('text,said', [
    ("x = __import__('os').system('touch canary')", '__import__'), ("import os\nx = os.system('touch canary')", 'os'), ("from os import system\nx = system('touch canary')", 'system'),
    ("x = open('canary', 'w')", 'open'), ("x = eval('1')", 'eval'), ("x = exec('1')", 'exec'), ("x = compile('1', '', 'eval')", 'compile'), ("x = getattr(dict(), 'items')", 'getattr'), ("x = globals()", 'globals'),
    ("x = ().__class__.__bases__[0].__subclasses__()", '__class__'), ("x = (lambda: 1)()", 'call'), ("x = [].__class__", '__class__'), ("x = dict.__subclasses__()", 'dict'), ("x = ''.__class__.__mro__", '__class__'),
    ("x = '{0.__class__.__mro__}'.format(1)", 'field'), ("x = '{a[0]}'.format(a=[1])", 'field'), ("x = f'{(1).__class__}'", '__class__'), ("x = '%999999999d' % 1", 'wide'), ("x = '{:999999999}'.format(1)", 'wide'), ("w = 10**8\nx = f'{1:{w}}'", 'wide'),
    ("while True: pass", 'While'), ("def f(): return f()\nx = f()", 'f'), ("for i in range(10**12): pass", 'range'), ("x = list(range(10**9))", 'range'), ("x = [i for i in range(10**5) for j in range(10**5)]", 'work|more'),
    ("x = [0 for a in range(999) for b in range(999) for c in range(999)]", 'work'), ("x = 'a'*10**10", 'work'), ("x = [0]*10**10", 'work'), ("x = 9**9**9", 'large'), ("x = 2**100000", 'large'), ("x = 1 << 10**9", 'operator'),
    ("x = 1\nfor i in range(60): x = x*x*10**30", 'large'), ("x = []\nx.append(x)", 'contains itself'), ("x = [1]\nfor i in range(50): x = x+x", 'more'), ("x = [1]\nfor i in range(50): x = [x, x]\ny = str(x)", 'more'),
    ("x = 'a'\nfor i in range(50): x = x.replace('a', 'aa')", 'more'), ("x = 'ab'*1000\nx = x.join([x]*1000)", ''), ("x = dict()\nfor i in range(50): x = dict(a=x, b=x)", 'more'), ("x = round(5, -10**9)", 'digits'), ("x = int('9'*9999)", ''),
    ("x = sum([[1]]*1000, [])", 'numbers'), ("x = {1, 2}", 'set'), ("x = b'1'", 'form'), ("x = 1j", 'form'), ("x = ...", 'form'), ("x = lambda: 1", 'Lambda'), ("x = (yield)", 'Yield'), ("x = (y := 1)", 'NamedExpr'), ("x = await f()", ''),
    ("with open('canary', 'w') as f: pass", 'read_base'), ("try: pass\nexcept Exception: pass", 'Try'), ("raise SystemExit", 'Raise'), ("assert False", 'Assert'), ("global x", 'Global'), ("class A: pass\nx = A()", 'A'), ("@print\nclass A: pass\nx = A", 'A'),
    ("from os import *", 'everything'), ("x = undefined", 'undefined'), ("x = dict(a=1).b", 'attribute'), ("x = dict(a=1)\nx.clear()", 'clear'), ("x = [3, 1]\nx.sort(key=print)", ''), ("x = sorted([1], key=len)", ''), ("del x", 'x'), ("x = 1/0", 'Zero'),
    ("x = '{{a"+' '*900_000+"'", None), ("x = (", 'valid Python'), ("x = 1\n\0", ''), ('('*500+')'*500, ''), ('x = '+'-'*20000+'1', ''), ('x = '+'+'.join(['1']*20000), ''), ('x = '+'['*150+']'*150, ''), ("_base_ = ['a', __import__('os')]", ''),
    ("from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int = __import__('os').system('touch canary')\na = A()", '__import__'), ("def f(x=__import__('os').system('touch canary')): pass\ny = 1", None)])
def test_attacks_are_refused(tmp_path, monkeypatch, text, said):
    monkeypatch.chdir(tmp_path); (tmp_path/'c.py').write_text(text)
    t = time.perf_counter()
    if said is None: assert set(migrate(tmp_path/'c.py').config) <= {'x', 'y'}
    else:
        with pytest.raises(ConfigError) as e: migrate(tmp_path/'c.py')
        assert any(w in str(e.value) for w in said.split('|')) and 'c.py' in str(e.value)
    assert not (tmp_path/'canary').exists() and time.perf_counter()-t < 20

def test_limits_of_files(tmp_path):
    (tmp_path/'big.py').write_text('x = 1\n'+'#'*2_000_000)
    with pytest.raises(ConfigError, match='larger than'): migrate(tmp_path/'big.py')
    (tmp_path/'latin.py').write_bytes('x = "\u00e4"'.encode('latin-1'))
    with pytest.raises(ConfigError, match='UTF-8'): migrate(tmp_path/'latin.py')
    with pytest.raises(ConfigError, match='no such file'): migrate(tmp_path/'none.py')
    with pytest.raises(ConfigError, match='no kind'): migrate(tmp_path/'x.toml')
    for i in range(70): (tmp_path/f'b{i}.py').write_text(f"_base_ = 'b{i+1}.py'\nx{i} = 1")
    (tmp_path/'b70.py').write_text('x = 1')
    with pytest.raises(ConfigError, match='more than'): read_mmdet(tmp_path/'b0.py')

# ---------------------------------------------------------------- files and inheritance

FAMILY = {'base/model.py': "width = 64\nmodel = dict(type='Net', body=dict(type='ResNet', depth=50, out=(0, 1, 2)), head=dict(num=80, w=width*2))\n",
    'base/data.py': "root = 'data/'\npipe = [dict(type='Load'), dict(type='Resize', scale=(1333, 800))]\nloader = dict(bs=2, data=dict(root=root, pipe=pipe))\ntest_loader = loader\n",
    'mid.py': "_base_ = ['base/model.py', './base/data.py']\nmodel = dict(body=dict(depth=101))\nlr = 0.02\n",
    'leaf.py': "_base_ = 'mid.py'\nscales = [(s, 800) for s in range(480, 801, 160)]\npipe = [{{_base_.pipe}}[0], dict(type='Many', scales=scales)]\nloader = dict(bs=_base_.loader.bs*4, data=dict(pipe=pipe))\n"
               "model = dict(head=dict(_delete_=True, num=3), body=_base_.model.body)\nname = 'runs/{{ fileBasenameNoExtension }}'\nroot2 = '{{_base_.root}}sub'\nkeys = {f'stage{i}': i/2 for i in range(2)}\nkeys.update(dict(last=-1))\n"}

def family(d, files=FAMILY):
    for k,v in files.items(): (d/k).parent.mkdir(parents=True, exist_ok=True); (d/k).write_text(v)
    return d

def test_classic_family(tmp_path):
    got = read_mmdet(family(tmp_path)/'leaf.py')
    assert got == dict(width=64, model=dict(type='Net', body=dict(type='ResNet', depth=101, out=(0, 1, 2)), head=dict(num=3)), root='data/', lr=.02, scales=[(480, 800), (640, 800), (800, 800)],
        pipe=[dict(type='Load'), dict(type='Many', scales=[(480, 800), (640, 800), (800, 800)])], loader=dict(bs=8, data=dict(root='data/', pipe=[dict(type='Load'), dict(type='Many', scales=[(480, 800), (640, 800), (800, 800)])])),
        test_loader=dict(bs=2, data=dict(root='data/', pipe=[dict(type='Load'), dict(type='Resize', scale=(1333, 800))])), name='runs/leaf', root2='data/sub', keys=dict(stage0=0., stage1=.5, last=-1))
    assert read_mmdet(tmp_path/'leaf.py', allow_exec=True) == got
    (tmp_path/'child.yaml').write_text("_base_: leaf.py\nlr: 1e-3\nmodel: {head: {num: 7}}\nsame: '{{_base_.pipe}}'\n"); (tmp_path/'child.json').write_text('{"_base_": ["leaf.py"], "lr": 0.5}')
    y = read_mmdet(tmp_path/'child.yaml')
    assert (y['lr'], y['model']['head'], y['same'], read_mmdet(tmp_path/'child.json')['lr']) == (1e-3, dict(num=7), got['pipe'], .5)

def test_lazy_equals_classic(tmp_path):
    lazy = {'lazy/base/model.py': "from mmdet.models import Net, ResNet\nfrom torch import nn\nwidth = 64\nmodel = dict(type=Net, norm=nn.GroupNorm, body=dict(type=ResNet, depth=50), head=dict(num=80))\n",
            'lazy/leaf.py': "from mmengine.config import read_base\nwith read_base():\n    from .base.model import *\n    from .base.plan import lr as rate\nmodel.update(dict(body=dict(depth=101)))\nmodel['head'].merge(dict(_delete_=True, num=3))\nmodel.body.extra = rate*2\ncopies = [ResNet for _ in range(2)]\n",
            'lazy/base/plan.py': "lr = 0.02\n", 'lazy/old.py': "if '_base_':\n    from .leaf import *\nmodel.head.num = 4\n"}
    got = read_mmdet(family(tmp_path, lazy)/'lazy/leaf.py')
    assert got == dict(width=64, model=dict(type='Net', norm='GroupNorm', body=dict(type='ResNet', depth=101, extra=.04), head=dict(num=3)), rate=.02, copies=['ResNet']*2)
    assert read_mmdet(tmp_path/'lazy/old.py')['model']['head'] == dict(num=4) and read_mmdet(tmp_path/'lazy/leaf.py')['model']['head'] == dict(num=3)

@pytest.mark.parametrize('files,said', [({'a.py': "_base_ = ['b.py', 'c.py']", 'b.py': 'x = 1', 'c.py': 'x = 2'}, "two bases define 'x'"), ({'a.py': "_base_ = 'b.py'\nx = dict(a=1)", 'b.py': 'x = 1'}, 'x is a dict here'), ({'a.py': "_base_ = 'none.py'"}, 'there is no base'),
    ({'a.py': "_base_ = 'b.py'\ny = _base_.nope", 'b.py': 'x = 1'}, "unknown entry 'nope'"), ({'a.py': "_base_ = 'b.py'\ny = {{_base_.nope}}", 'b.py': 'x = 1'}, 'has no value'), ({'a.py': "_base_ = 'b.py'", 'b.py': "_base_ = 'a.py'"}, 'a.py -> b.py -> a.py'),
    ({'a.py': "_base_ = 'mmpretrain::x.py'"}, 'there is no base'), ({'a.py': "x = '{{$NO_SUCH_VARIABLE_HERE}}'"}, 'has no value'), ({'a.py': "_base_ = 'b.py'\nwith read_base():\n    from .b import *", 'b.py': 'x = 1'}, 'cannot import bases as well'),
    ({'a.py': "_base_ = 3"}, 'must be a path'), ({'a.py': "_base_ = 'b.json'", 'b.json': '{'}, 'not valid JSON')])
def test_errors_say_where(tmp_path, files, said):
    with pytest.raises(ConfigError) as e: read_mmdet(family(tmp_path, files)/'a.py')
    assert said in str(e.value) and any(k in str(e.value) for k in files)

@quick
@given(st.dictionaries(names, values, max_size=4), st.dictionaries(names, values, max_size=4))
def test_merge_laws(base, child):
    try: got = merge_config(base, child)
    except ConfigError: return
    assert merge_config(base, {}) == base and merge_config({}, child) == child and merge_config(got, child) == got
    assert set(got) == set(base) | set(child) and all(got[k] == v for k,v in child.items() if not isinstance(v, dict))

# ---------------------------------------------------------------- mapping

COMMON = '''
scale = (512, 320)
load = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True)]
size = [dict(type='Resize', scale=scale, keep_ratio=True)]
train_dataloader = dict(batch_size=3, num_workers=1, sampler=dict(type='DefaultSampler', shuffle=True), dataset=dict(type='CocoDataset', data_root='d/', ann_file='train.json', data_prefix=dict(img='train/'), pipeline=load+size+[dict(type='RandomFlip', prob=0.5), dict(type='PackDetInputs')]))
val_dataloader = dict(batch_size=1, dataset=dict(type='CocoDataset', data_root='d/', ann_file='val.json', data_prefix=dict(img='val/'), test_mode=True, pipeline=load+size))
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=24, val_interval=2)
param_scheduler = [dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=250), dict(type='MultiStepLR', begin=0, end=24, by_epoch=True, milestones=[16, 22], gamma=0.1)]
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.005, momentum=0.8, weight_decay=2e-4, nesterov=True))
body = dict(type='ResNet', depth=18, num_stages=4, out_indices=(0, 1, 2, 3), frozen_stages=-1, norm_cfg=dict(type='BN', requires_grad=True), norm_eval=False, style='pytorch')
pixels = dict(type='mmdet.DetDataPreprocessor', mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True, pad_size_divisor=32)
focal = dict(type='FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0)
delta = lambda: 0
'''.replace('delta = lambda: 0\n', "rpn_coder = dict(type='DeltaXYWHBBoxCoder', target_means=[.0]*4, target_stds=[1.0]*4)\nroi_coder = dict(type='DeltaXYWHBBoxCoder', target_means=[0.]*4, target_stds=[0.1, 0.1, 0.2, 0.2])\n")
MODELS = dict(
retinanet="""model = dict(type='RetinaNet', data_preprocessor=pixels, backbone=body, neck=dict(type='FPN', in_channels=[64, 128, 256, 512], out_channels=32, start_level=1, add_extra_convs='on_output', num_outs=4),
    bbox_head=dict(type='RetinaHead', num_classes=5, in_channels=32, feat_channels=32, stacked_convs=1, anchor_generator=dict(type='AnchorGenerator', octave_base_scale=3, scales_per_octave=2, ratios=[0.5, 2.0], strides=[8, 16, 32, 64]), bbox_coder=rpn_coder, loss_cls=focal, loss_bbox=dict(type='GIoULoss', loss_weight=2.0)),
    train_cfg=dict(assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.55, neg_iou_thr=0.35, min_pos_iou=0, ignore_iof_thr=-1), sampler=dict(type='PseudoSampler'), allowed_border=-1, pos_weight=-1, debug=False),
    test_cfg=dict(nms_pre=700, min_bbox_size=0, score_thr=0.1, nms=dict(type='nms', iou_threshold=0.45), max_per_img=50))""",
fcos="""model = dict(type='FCOS', data_preprocessor=pixels, backbone=body, neck=dict(type='FPN', in_channels=[64, 128, 256, 512], out_channels=32, start_level=1, add_extra_convs='on_output', num_outs=5, relu_before_extra_convs=True),
    bbox_head=dict(type='FCOSHead', num_classes=5, in_channels=32, feat_channels=32, stacked_convs=1, strides=[8, 16, 32, 64, 128], norm_on_bbox=True, centerness_on_reg=True, center_sampling=True, center_sample_radius=2.0, loss_cls=focal, loss_bbox=dict(type='GIoULoss', loss_weight=1.0),
        loss_centerness=dict(type='CrossEntropyLoss', use_sigmoid=True, loss_weight=1.0)), test_cfg=dict(nms_pre=700, min_bbox_size=0, score_thr=0.1, nms=dict(type='nms', iou_threshold=0.45), max_per_img=50))""")
_two = """model = dict(type='{t}', data_preprocessor=pixels, backbone=body, neck=dict(type='FPN', in_channels=[64, 128, 256, 512], out_channels=32, num_outs=5),
    rpn_head=dict(type='RPNHead', in_channels=32, feat_channels=32, anchor_generator=dict(type='AnchorGenerator', scales=[4], ratios=[0.5, 1.0], strides=[4, 8, 16, 32, 64]), bbox_coder=rpn_coder, loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=True, loss_weight=1.0), loss_bbox=dict(type='L1Loss', loss_weight=1.0)),
    roi_head=dict(type='StandardRoIHead', bbox_roi_extractor=dict(type='SingleRoIExtractor', roi_layer=dict(type='RoIAlign', output_size=7, sampling_ratio=0), out_channels=32, featmap_strides=[4, 8, 16, 32]),
        bbox_head=dict(type='Shared2FCBBoxHead', in_channels=32, fc_out_channels=64, roi_feat_size=7, num_classes=5, bbox_coder=roi_coder, reg_class_agnostic=False, loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0), loss_bbox=dict(type='L1Loss', loss_weight=1.0)){mask}),
    train_cfg=dict(rpn=dict(assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.65, neg_iou_thr=0.25, min_pos_iou=0.2, match_low_quality=True, ignore_iof_thr=-1), sampler=dict(type='RandomSampler', num=128, pos_fraction=0.4, neg_pos_ub=-1, add_gt_as_proposals=False), allowed_border=-1, pos_weight=-1, debug=False),
        rpn_proposal=dict(nms_pre=600, max_per_img=400, nms=dict(type='nms', iou_threshold=0.75), min_bbox_size=0),
        rcnn=dict(assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.6, neg_iou_thr=0.6, min_pos_iou=0.6, match_low_quality=False, ignore_iof_thr=-1), sampler=dict(type='RandomSampler', num=96, pos_fraction=0.3, neg_pos_ub=-1, add_gt_as_proposals=True), pos_weight=-1, debug=False)),
    test_cfg=dict(rpn=dict(nms_pre=300, max_per_img=200, nms=dict(type='nms', iou_threshold=0.75), min_bbox_size=0), rcnn=dict(score_thr=0.1, nms=dict(type='nms', iou_threshold=0.45), max_per_img=50)))"""
MODELS.update(faster_rcnn=_two.format(t='FasterRCNN', mask=''), mask_rcnn=_two.format(t='MaskRCNN', mask=""", mask_roi_extractor=dict(type='SingleRoIExtractor', roi_layer=dict(type='RoIAlign', output_size=14, sampling_ratio=0), out_channels=32, featmap_strides=[4, 8, 16, 32]),
        mask_head=dict(type='FCNMaskHead', num_convs=2, in_channels=32, conv_out_channels=24, num_classes=5, loss_mask=dict(type='CrossEntropyLoss', use_mask=True, loss_weight=1.0))"""))

def migrated(tmp_path, name, more=''):
    (tmp_path/f'{name}.py').write_text(COMMON+MODELS[name]+more)
    return migrate(tmp_path/f'{name}.py', out=tmp_path/f'{name}.yaml'), read_mmdet(tmp_path/f'{name}.py')

@pytest.mark.parametrize('name', list(MODELS))
def test_models_are_what_mmdetection_says(tmp_path, name):
    "Built through visdet's configuration, a migrated model has the structure that the other dictionary says"
    import torch
    from visdet.core.config import build
    from visdet.core.yaml import read_yaml
    import visdet.models.zoo
    m, d = migrated(tmp_path, name); d = d['model']
    assert (m.code, m.report.lost) == (0, [])
    model = build(read_yaml(tmp_path/f'{name}.yaml').value['model'], 'model')
    assert type(model.body.net).__name__ and model.num_classes == 5 and model.body.frozen == set()
    two = 'roi_head' in d
    dense = model.rpn if two else model.head
    strides = d['rpn_head']['anchor_generator']['strides'] if two else d['bbox_head'].get('strides') or d['bbox_head']['anchor_generator']['strides']
    assert model.neck.strides == strides and model.neck.channels == [d['neck']['out_channels']]*d['neck']['num_outs'] and [s[0] if isinstance(s, tuple) else s for s in dense.levels.gen.strides] == strides
    if name != 'fcos':
        g = (d['rpn_head'] if two else d['bbox_head'])['anchor_generator']
        scales = g.get('scales') or [g['octave_base_scale']*2**(i/g['scales_per_octave']) for i in range(g['scales_per_octave'])]
        for cell,s in zip(dense.levels.gen.cells, strides):
            want = [[s*k*math.sqrt(1/r), s*k*math.sqrt(r)] for r in g['ratios'] for k in scales]
            assert torch.allclose(cell[:,2:]-cell[:,:2], torch.tensor(want), rtol=1e-5)
    t = d['test_cfg']['rcnn'] if two else d['test_cfg']
    assert (model.head.score_thr, model.head.nms_thr, model.head.max_num) == (t['score_thr'], t['nms']['iou_threshold'], t['max_per_img'])
    if two:
        c, p, r = d['train_cfg'], d['train_cfg']['rpn'], d['train_cfg']['rcnn']
        assert (model.rpn.assigner.pos, model.rpn.assigner.neg[1], model.rpn.assigner.min_pos, model.rpn.sampler.num, model.rpn.sampler.pos, model.rpn.nms_thr) == (.65, .25, .2, 128, .4, .75)
        assert (model.assigner.pos, model.assigner.neg[1], model.assigner.low, model.sampler.num, model.sampler.pos, model.pre, model.post) == (.6, .6, None, 96, .3, (600, 300), (400, 200))
        assert model.head.fc1.out_channels == 64 and model.head.cls.out_features == 6 and model.head.coder.stds == (.1, .1, .2, .2) and model.head.pool.sampling_ratio == 0
        if name == 'mask_rcnn': assert (len(list(model.mask.tower)), model.mask.up.out_channels, model.mask.out.out_channels, model.mask.size) == (2, 24, 5, 14)
    else:
        assert model.head.pre == t['nms_pre'] and model.head.cls.out_channels == 5*(4 if name == 'retinanet' else 1)
        if name == 'retinanet': assert (model.head.assigner.pos, model.head.assigner.neg[1], model.head.reg_weight, model.head.decoded) == (.55, .35, 2., True)
        else: assert (model.head.assigner.radius, model.head.act, model.neck.relu) == (2., 'relu', True)
    with torch.no_grad(): assert model.eval()(torch.zeros(1, 3, 64, 64)) is not None

def test_run_around_the_model(tmp_path):
    from visdet.core.schema import catalogue, problems
    from visdet.core.tree import Source, to_node
    import visdet.data.datasets, visdet.data.transforms, visdet.engine.optimizers, visdet.engine.schedules, visdet.models.zoo
    m, _ = migrated(tmp_path, 'fcos'); c = m.config
    assert c['dataset'] == dict(type='coco', train='d/train.json', images='d/train/', valid='d/val.json', valid_images='d/val/', resize=[512, 320], aug='flip', group=False, val_bs=1)
    assert c['optimizer'] == dict(type='torch.SGD', lr=.005, momentum=.8, weight_decay=2e-4, nesterov=True) and c['scheduler'] == dict(type='step', steps=[16, 22], warmup=250, warmup_start=.01)
    assert (c['epochs'], c['val_interval'], c['batch_size'], c['num_workers'], c['precision'], c['ema']) == (24, 2, 3, 1, 'fp32', False)
    cat = catalogue()
    for name in MODELS:
        c = migrated(tmp_path, name)[0].config
        for k in ('model', 'dataset', 'optimizer', 'scheduler'): assert problems(to_node(c[k], Source('python')), cat, root=k) == []

def test_every_key_has_a_fate(tmp_path):
    "A key put anywhere is reported, and no key is reported twice as lost"
    m, d = migrated(tmp_path, 'mask_rcnn')
    def places(o, path=()):
        if isinstance(o, dict):
            yield path
            for k,v in o.items(): yield from places(v, (*path, k))
    for path in [p for p in places(d) if p and p[0] in ('model', 'train_dataloader', 'optim_wrapper', 'train_cfg')]:
        c = json.loads(json.dumps(d)); o = c
        for k in path: o = o[k]
        o['surprise'] = 1
        r = map_mmdet(c).report
        assert any(f.key.startswith('.'.join(path)) and 'surprise' in json.dumps([f.key, f.value], default=str) and (f.effect or f.status != 'defaulted') for f in r.fates), path
    assert all(f.reason or f.status == 'mapped' for f in m.report.fates)

@pytest.mark.parametrize('more,code,said', [("model['type'] = 'CornerNet'", 2, 'no entry point for this CornerNet'), ("model['neck']['type'] = 'BFP'", 2, 'no neck BFP'), ("model['backbone'] = dict(type='Odd')", 2, 'no body'), ("model['backbone']['dcn'] = dict(type='DCN')", 2, 'no such parts'),
    ("model['bbox_head']['anchor_generator']['strides'] = [4, 8, 16, 32]", 2, 'strides [8, 16, 32, 64]'), ("model['bbox_head']['loss_bbox'] = dict(type='IoULoss')", 0, ''), ("model['bbox_head']['loss_bbox'] = dict(type='IoULoss', mode='square')", 1, 'the box term is one of'), ("model['bbox_head']['loss_bbox'] = dict(type='SmoothL1Loss', beta=1.0)", 1, '1/9'), ("model['test_cfg']['nms']['type'] = 'soft_nms'", 1, 'greedy'),
    ("optim_wrapper['clip_grad'] = dict(max_norm=1)", 1, 'no limit'), ("train_dataloader['dataset']['pipeline'] += [dict(type='Mosaic')]", 1, 'no Mosaic'), ("load_from = 'x.pth'", 1, 'load_from'), ("custom_hooks = [dict(type='EMAHook', momentum=0.001)]", 0, ''), ("helper = 3", 0, ''),
    ("train_dataloader['dataset'] = dict(type='ConcatDataset', datasets=[train_dataloader['dataset'], train_dataloader['dataset']])", 2, 'one training set'), ("train_dataloader['dataset'] = dict(type='RepeatDataset', times=2, dataset=train_dataloader['dataset'])", 0, '')])
def test_exit_codes(tmp_path, more, code, said):
    m, _ = migrated(tmp_path, 'retinanet', '\n'+more)
    assert m.code == code and (tmp_path/'retinanet.yaml').exists() == (code < 2) and said in str(m)
    if 'EMAHook' in more: assert m.config['ema'] == .999
    if 'RepeatDataset' in more: assert (m.config['epochs'], m.config['scheduler']['steps'], m.config['val_interval']) == (48, [32, 44], 4)

def test_repeated_images_and_batches_of_like_orientation(tmp_path):
    m, _ = migrated(tmp_path, 'retinanet', "\ntrain_dataloader['dataset'] = dict(type='RepeatDataset', times=2, dataset=dict(type='ClassBalancedDataset', oversample_thr=0.01, dataset=train_dataloader['dataset']))\ntrain_dataloader['batch_sampler'] = dict(type='AspectRatioBatchSampler')")
    d = m.config['dataset']
    assert m.code == 0 and (d['repeat_thr'], d['repeat_how'], d.get('group', True)) == (.01, 'ceil', True), str(m)
    m, _ = migrated(tmp_path, 'retinanet', "\ntrain_dataloader['dataset'] = dict(type='ClassBalancedDataset', oversample_thr=0.01, filter_empty_gt=False, dataset=train_dataloader['dataset'])")
    assert m.code == 1 and 'factor one' in str(m) and m.config['dataset']['group'] is False

def test_numbers_that_training_and_testing_share(tmp_path):
    m, _ = migrated(tmp_path, 'faster_rcnn', "\nmodel['test_cfg']['rpn']['nms'] = dict(type='nms', iou_threshold=0.9)\nmodel['test_cfg']['rpn']['min_bbox_size'] = 4")
    assert m.code == 1 and m.config['model']['rpn_nms'] == .75 and {o.key for o in m.report.lost} == {'model.test_cfg.rpn.nms.iou_threshold', 'model.test_cfg.rpn.min_bbox_size'}

def test_version_two(tmp_path):
    text = COMMON.split('train_dataloader')[0]+"norm = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)\npipe = load+[dict(type='Resize', img_scale=(1333, 800), keep_ratio=True), dict(type='RandomFlip', flip_ratio=0.5), dict(type='Normalize', **norm), dict(type='Pad', size_divisor=32), dict(type='DefaultFormatBundle'), dict(type='Collect', keys=['img'])]\n" \
        "data = dict(samples_per_gpu=2, workers_per_gpu=3, train=dict(type='CocoDataset', ann_file='t.json', img_prefix='t/', classes=('a', 'b'), pipeline=pipe), val=dict(type='CocoDataset', ann_file='v.json', img_prefix='v/', pipeline=[dict(type='LoadImageFromFile'), dict(type='MultiScaleFlipAug', img_scale=(1333, 800), flip=False, transforms=[dict(type='Resize', keep_ratio=True), dict(type='RandomFlip'), dict(type='Normalize', **norm), dict(type='Pad', size_divisor=32)])]))\n" \
        "optimizer = dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=0.0001)\noptimizer_config = dict(grad_clip=None)\nlr_config = dict(policy='step', warmup='linear', warmup_iters=500, warmup_ratio=0.001, step=[8, 11])\nrunner = dict(type='EpochBasedRunner', max_epochs=12)\nevaluation = dict(interval=1, metric='bbox')\ncheckpoint_config = dict(interval=1)\n" \
        + COMMON.split('optim_wrapper')[1].split('\n', 1)[1].replace("style='pytorch')", "style='pytorch')\nbody['depth'] = 18")+MODELS['retinanet'].replace('data_preprocessor=pixels', "pretrained='torchvision://resnet18'").replace('num_classes=5', 'num_classes=2')
    (tmp_path/'two.py').write_text(text); m = migrate(tmp_path/'two.py'); c = m.config
    assert m.code == 0, str(m)
    assert c['dataset'] == dict(type='coco', train='t.json', images='t/', valid='v.json', valid_images='v/', vocab=['a', 'b'], on_unknown='drop', resize=[1333, 800], aug='flip', val_bs=1) and c['epochs'] == 12 and c['batch_size'] == 2 and c['model']['body'] == 'resnet18.tv_in1k'
    assert {'data.train.ann_file', 'data.samples_per_gpu', 'optimizer.lr'} <= {f.key for f in m.report.fates}

# ---------------------------------------------------------------- stock configurations, where they are

STOCK, SHARED = os.environ.get('VISDET_MMDET_CONFIGS'), Path(__file__).parents[2]/'shared'/'mmdet'
@pytest.mark.skipif(not STOCK or not (SHARED/'configs.json').exists(), reason='needs the configurations of mmdet 3.3.0 (VISDET_MMDET_CONFIGS) and their resolved forms')
def test_stock_configurations_resolve_exactly():
    def tuples(o, p=''):
        if isinstance(o, tuple): yield p
        for k,v in o.items() if isinstance(o, dict) else enumerate(o) if isinstance(o, (list, tuple)) else (): yield from tuples(v, f'{p}[{k}]' if isinstance(k, int) else f'{p}.{k}' if p else k)
    for c in json.loads((SHARED/'configs.json').read_text())['configs']:
        d = read_mmdet(Path(STOCK)/f"{c['name']}.py")
        assert json.loads(json.dumps(d)) == json.loads((SHARED/c['file']).read_text()) and list(tuples(d)) == c['tuple_paths'], c['name']
