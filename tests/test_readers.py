"Annotation readers on real files, and on files that are broken in every way hypothesis can think of"
import copy, json, os
from pathlib import Path

import numpy as np, pandas as pd, pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from pycocotools import mask as cocomask
from pycocotools.coco import COCO

from visdet.core.basics import VisdetError
from visdet.data.coco import read_coco, read_coco_results, write_coco
from visdet.data.frame import read_df, write_df
from visdet.data.packed import MaskStore
from visdet.data.records import Records, same_vocab
from visdet.data.store import *
from visdet.data.toy import make_toy, toy_records
from visdet.data.voc import read_voc, write_voc
from visdet.data.yolo import read_yolo, write_yolo

DATA = Path(os.environ.get('VISDET_DATA', Path(__file__).resolve().parents[2]/'shared'/'data'))
def need(name): return pytest.mark.skipif(not (DATA/name).is_dir(), reason=f'{name} is not here: set VISDET_DATA')
quick = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

def books(r):
    "The accounting of a report adds up to the records"
    rep = r.report
    assert rep.n_in == len(r.boxes)+rep.dropped+rep.merged and rep.images_in == len(r)+rep.images_dropped and rep.kept == len(r.boxes)
    assert np.isfinite(r.boxes).all() and (r.boxes[:,2:]>r.boxes[:,:2]).all() and (r.boxes>=0).all() and (r.areas>0).all()
    wh = np.repeat(r.sizes, r.counts, 0)[:,::-1]
    assert (r.boxes[:,2:]<=wh).all() and ((r.labels>=0)&(r.labels<len(r.vocab))).all()
    str(rep), rep.df, rep._repr_html_()

def by_file(r, digits=0):
    "File stem -> sorted (class, box), rounded"
    return {Path(o.file).stem: sorted((r.vocab[l], *np.round(b, digits).tolist()) for l,b in zip(o.labels, o.boxes.astype(float))) for o in r}

# ---------------------------------------------------------------- real files
@need('coco_mini')
@pytest.mark.parametrize('part', ['train2017','val2017'])
def test_coco_mini(part, tmp_path):
    ann = DATA/'coco_mini'/'annotations'/f'instances_{part}.json'
    r = read_coco(ann, DATA/'coco_mini'/part); books(r); oracle = COCO(ann)
    assert (len(r.boxes),len(r),int(r.crowd.sum())) == ((939,128,10) if part=='train2017' else (1786,206,21))
    assert r.report.dropped==r.report.merged==0 and r.report.df.shape[0]==0 and len(r.check_images())==0 and len(r.vocab)==80
    for o in r:
        for b,l,c,a,t,rle in zip(o.boxes, o.labels, o.crowd, o.areas, o.ann_ids, r.rles(o.row)):
            g = oracle.anns[t]; x,y,w,h = g['bbox']
            assert np.abs(b-[x,y,x+w,y+h]).max()<1e-3 and r.cat_ids[l]==g['category_id'] and c==g['iscrowd'] and abs(a-g['area'])<=1e-4*g['area']+1e-3
            assert oracle.annToRLE(g)==rle or oracle.annToRLE(g)['counts']==rle['counts']
    same(r, read_coco(write_coco(r, tmp_path/'x.json'), DATA/'coco_mini'/part))

def same(a, b):
    for f in ('boxes','labels','crowd','areas','offsets','sizes'): np.testing.assert_array_equal(getattr(a,f), getattr(b,f), f)
    assert (a.ids.tolist(),a.ann_ids.tolist(),a.files.tolist(),a.vocab,a.cat_ids) == (b.ids.tolist(),b.ann_ids.tolist(),b.files.tolist(),b.vocab,b.cat_ids)
    assert (a.masks is None)==(b.masks is None)
    for f in MaskStore.fields if a.masks else []: np.testing.assert_array_equal(getattr(a.masks,f), getattr(b.masks,f), f)

@need('coco_mini')
def test_coco_results():
    root = DATA/'coco_mini'; r = read_coco(root/'annotations'/'instances_val2017.json')
    for f in ('nanodet_m_320','yolox_nano_416'):
        path = root/'reference_detections'/f'{f}.json'; raw = json.loads(path.read_text()); dets = read_coco_results(path, r)
        assert len(dets)==len(r) and sum(map(len,dets))==len(raw)
        for o,d in zip(r, dets):
            want = sorted((x['score'] for x in raw if x['image_id']==o.id), reverse=True) if o.row<20 else None
            if want is not None: np.testing.assert_allclose(d.scores, want, atol=1e-6)

@need('bccd')
@pytest.mark.parametrize('split,n', [('train',205),('val',87),('test',72)])
def test_bccd(split, n, tmp_path):
    root = DATA/'bccd'; r = read_voc(root, split, verbose=False); books(r); assert len(r)==n and r.vocab==['Platelets','RBC','WBC']
    ann = next((root/'annotations_coco').glob(f'*{split}*.json')); c = read_coco(ann, root/'images', vocab=r.vocab)
    assert by_file(r)==by_file(c)
    assert len(r.check_images(n=10))==0
    back = read_voc(write_voc(r, tmp_path/'v'), 'train', vocab=r.vocab, img_dir=root/'images', ann_dir='Annotations')
    assert by_file(back)==by_file(r)

@need('bccd')
def test_bccd_flaws():
    r = read_voc(DATA/'bccd', verbose=False); books(r)
    flat = r.report.df[r.report.df.detail.str.startswith('no area')]
    assert len(r)==364 and r.report.n_in==4888 and sorted(flat.image)==['BloodImage_00338','BloodImage_00343']

@need('voc100_formats')
def test_one_truth_in_many_formats(tmp_path):
    root = DATA/'voc100_formats'; gts = root/'gts'; imgs = root/'images'
    v = read_voc(gts/'pascalvoc_format', ann_dir='.', img_dir=imgs, coords='zero_based', difficult='keep'); books(v); truth = by_file(v); assert len(v)==100 and len(v.boxes)==273 and len(v.vocab)==20
    i = read_voc(gts/'imagenet_format', ann_dir='Annotations', img_dir=imgs, coords='zero_based', vocab=v.vocab, difficult='keep'); assert by_file(i)==truth
    for f in ('coco_format_v1/instances_default.json','coco_format_v2/instances_v2.json'):
        c = read_coco(gts/f, imgs, vocab=v.vocab, verbose=False); books(c); assert by_file(c)==truth
    (tmp_path/'images').symlink_to(imgs); (tmp_path/'labels').symlink_to(gts/'yolo_format'/'obj_train_data'); (tmp_path/'classes.txt').write_text((gts/'yolo_format'/'obj.names').read_text())
    y = read_yolo(tmp_path, vocab=v.vocab); books(y); assert by_file(y)==truth
    d = pd.read_csv(next((gts/'openimages_format').glob('*.csv')), decimal=','); size = {Path(o.file).stem:o.size for o in v}
    h,w = np.array([size[Path(o).stem] for o in d.ImageID]).T
    d = d.assign(xmin=d.XMin*w, xmax=d.XMax*w, ymin=d.YMin*h, ymax=d.YMax*h, file=[f'{Path(o).stem}.jpg' for o in d.ImageID])
    t = read_df(d, imgs, dict(image_path='file', label='LabelName'), vocab=v.vocab); books(t); assert by_file(t)=={k:o for k,o in truth.items() if o}

# ---------------------------------------------------------------- one data set through all formats
def test_toy_through_all(tmp_path):
    a = toy_records(12, tmp_path/'imgs'); c = read_coco(write_coco(a, tmp_path/'t.json'), tmp_path/'imgs'); same(a, c); assert c.report.clean
    same(a.subset([3,1]), c.subset([3,1])); d = read_df(write_df(a), tmp_path/'imgs'); assert d.report.clean and by_file(d,3)==by_file(a,3) and same_vocab(a, d.with_vocab(a.vocab)) is None
    v = read_voc(write_voc(a, tmp_path/'v', drop_masks=True), img_dir=tmp_path/'imgs', vocab=a.vocab); assert by_file(v,3)==by_file(a,3) and (v.crowd==a.crowd).all()
    y = read_yolo(write_yolo(a, tmp_path/'y', masks='drop', drop_crowd=True, images='link'), 'train'); assert len(y.boxes)==(~a.crowd).sum()
    same(a, Records.load(a.save(tmp_path/'s'))); assert len(make_toy(tmp_path/'toy', n=10).name)==3

@pytest.mark.parametrize('rle', [dict(size=[60,40],counts=[2400]), dict(size=[40,60],counts=[2399]), dict(size=[40,60],counts='PQ1'), dict(size=[40,60],counts=[-1,2401]), dict(size=[40],counts=[2400]), dict(counts=[2400]), dict(size=[40,60])])
def test_rle_of_another_image_is_dropped(rle, tmp_path):
    d = copy.deepcopy(BASE); d['annotations'][2]['segmentation'] = rle; (tmp_path/'x.json').write_text(json.dumps(d)); r = read_coco(tmp_path/'x.json', verbose=False); books(r)
    assert r.report.df[['ann','action']].values.tolist()==[[2,'dropped']] and 'mask' in r.report.df.why[0] and all(cocomask.decode(m).shape==o.size for o in r for m in r.rles(o.row))

# ---------------------------------------------------------------- fuzz
junk = st.one_of(st.none(), st.booleans(), st.integers(), st.integers(-3,3), st.floats(), st.text(max_size=4), st.just([]), st.just({}), st.lists(st.floats(), max_size=5), st.just([[1,2,3]]), st.just(10**400), st.just('\ud800'), st.just('a\0b'),
                 st.just({'size':[40,60],'counts':'0'}), st.just({'size':[40,60],'counts':[2400]}), st.just({'size':[60,40],'counts':[2400]}), st.just({'size':[40,60],'counts':'PQ1'}), st.just({'size':[40,60],'counts':[-1,2401]}), st.just({'size':[40,60],'counts':'\xff~~'}), st.lists(st.lists(st.floats(), max_size=8), max_size=3))
tri = [0,0,4,0,0,3]
BASE = dict(images=[dict(id=1,file_name='a.png',height=40,width=60), dict(id=2,file_name='b.png',height=30,width=30)], categories=[dict(id=3,name='cat'), dict(id=7,name='dog')],
    annotations=[dict(id=i, image_id=1+i%2, category_id=(3,7)[i%2], bbox=[i,2,10,10.5], area=100, iscrowd=i%2, segmentation=s) for i,s in enumerate([[tri],[tri,tri],dict(size=[40,60],counts=[0,5,2395]),[],None])])

def paths(o, at=()):
    "Every place in a nested structure"
    if at: yield at
    for k,v in o.items() if isinstance(o,dict) else enumerate(o) if isinstance(o,list) else (): yield from paths(v, (*at,k))

@st.composite
def mutated(draw, base=BASE):
    "The base file with one to four places replaced, deleted or repeated"
    d = copy.deepcopy(base)
    for _ in range(draw(st.integers(1,4))):
        places = list(paths(d))
        if not places: break
        *head,last = draw(st.sampled_from(places)); o = d
        for k in head: o = o[k]
        what = draw(st.sampled_from(['put','put','put','delete','twice']))
        if what=='put': o[last] = copy.deepcopy(draw(junk))
        elif what=='delete': del o[last]
        elif isinstance(o,list): o.append(copy.deepcopy(o[last]))
    return d

def survives(f):
    "Run a reader: sound records, or an error of ours"
    try: r = f()
    except VisdetError as e: assert str(e).strip() and '\n' not in str(e)[:50]; return None
    books(r); [len(o.masks or ()) for o in r]; r.to_coco(); r.subset(np.arange(len(r))[::-1]); return r

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    d = tmp_path_factory.mktemp('fuzz'); (d/'images').mkdir(); (d/'labels').mkdir(); (d/'Annotations').mkdir(); (d/'classes.txt').write_text('cat\ndog\n')
    for o,wh in (('a',(60,40)),('b',(30,30))): Image.new('RGB', wh).save(d/'images'/f'{o}.png')
    return d

@quick
@given(d=mutated(), folder=st.booleans(), drop=st.booleans())
def test_fuzz_coco(d, folder, drop, home):
    p = home/'x.json'; p.write_text(json.dumps(d)); how = 'drop' if drop else 'error'
    r = survives(lambda: read_coco(p, home/'images' if folder else None, on_unknown=how, on_missing=how, verbose=False))
    if r is not None:
        for o in r if r.masks is not None else (): assert all(cocomask.decode(m).shape==o.size and m['size']==list(o.size) for m in r.rles(o.row))
        b = survives(lambda: read_coco(write_coco(r, home/'y.json'), home/'images' if folder else None, verbose=False)); assert b is not None; np.testing.assert_array_equal(b.boxes, r.boxes)

@quick
@given(data=st.one_of(st.binary(max_size=60), st.recursive(junk, lambda o: st.lists(o,max_size=3)|st.dictionaries(st.sampled_from(['images','annotations','categories','id','bbox','score']),o)).map(lambda o: json.dumps(o).encode())))
def test_fuzz_any_bytes(data, home):
    p = home/'x.json'; p.write_bytes(data); recs = toy_like()
    survives(lambda: read_coco(p, verbose=False))
    try: read_coco_results(p, recs)
    except VisdetError: pass
    (home/'labels'/'a.txt').write_bytes(data); survives(lambda: read_yolo(home, on_unknown='drop', verbose=False))
    (home/'Annotations'/'a.xml').write_bytes(data); survives(lambda: read_voc(home, on_missing='drop', verbose=False))
    (home/'t.csv').write_bytes(data); survives(lambda: read_df(home/'t.csv', verbose=False))
    (home/'data2.yaml').write_bytes(data); survives(lambda: read_yolo(home/'data2.yaml', 'train', verbose=False))

def toy_like(): return Records.build(['a.png','b.png'], [(40,60),(30,30)], [[],[]], [[],[]], ['cat','dog'], ids=[1,2], cat_ids=[3,7])

@quick
@given(d=mutated([dict(image_id=1,category_id=3,bbox=[1,2,3,4],score=.5,segmentation=dict(size=[40,60],counts=[2400])), dict(image_id=2,category_id=7,bbox=[1,2,3,4],score=.6)]), masks=st.booleans())
def test_fuzz_results(d, masks, home):
    (home/'r.json').write_text(json.dumps(d))
    try: dets = read_coco_results(home/'r.json', toy_like(), masks=masks)
    except VisdetError: return
    assert len(dets)==2 and sum(map(len,dets))==len(d)

number = st.one_of(st.floats(-.2,1.2).map(str), st.floats().map(str), st.integers(-2,3).map(str), st.text(max_size=3))
@quick
@given(lines=st.lists(st.lists(number, max_size=9).map(' '.join), max_size=5), names=junk, train=junk)
def test_fuzz_yolo(lines, names, train, home):
    (home/'labels'/'a.txt').write_text('\n'.join(lines), errors='replace'); survives(lambda: read_yolo(home, on_unknown='drop', verbose=False)); survives(lambda: read_yolo(home, verbose=False))
    try: (home/'d.yaml').write_text(json.dumps(dict(path='.', names=names, train=train)))
    except ValueError: return
    survives(lambda: read_yolo(home/'d.yaml', 'train', verbose=False))
    (home/'d.yaml').write_text(json.dumps(dict(names=['cat','dog'], train=train, path=names))); survives(lambda: read_yolo(home/'d.yaml', 'train', verbose=False))

@quick
@given(tags=st.lists(st.tuples(st.sampled_from('object name bndbox xmin ymin xmax ymax size width height difficult filename'.split()), st.one_of(number, st.just('cat'))), max_size=12), shape=st.booleans())
def test_fuzz_voc(tags, shape, home):
    from xml.sax.saxutils import escape
    flat = ''.join(f'<{t}>{escape(v)}</{t}>' for t,v in tags)
    body = f'<object>{flat}</object><object><name>cat</name><bndbox>{flat}</bndbox></object><size>{flat}</size>' if shape else flat
    (home/'Annotations'/'a.xml').write_text(f'<annotation>{body}</annotation>', errors='replace'); survives(lambda: read_voc(home, on_missing='drop', verbose=False)); survives(lambda: read_voc(home, difficult='drop', verbose=False))

cell = st.one_of(st.none(), st.integers(-5,70), st.floats(), st.text(max_size=3), st.just('{"size":[40,60],"counts":[2400]}'), st.just('[[1,2,3,4,5,6]]'), st.just(True))
@quick
@given(rows=st.lists(st.fixed_dictionaries(dict(image_path=st.sampled_from(['a.png','b.png',None,'c.png',3]), xmin=cell, ymin=cell, xmax=cell, ymax=cell, label=st.sampled_from(['cat','dog',None,1,2.5])),
       optional=dict(width=cell, height=cell, crowd=cell, area=cell, ann_id=cell, segmentation=cell, image_id=cell)), max_size=4), csv=st.booleans(), fmt=st.sampled_from(['xyxy','xywh']))
def test_fuzz_frame(rows, csv, fmt, home):
    df = pd.DataFrame(rows)
    if csv: df.map(lambda o: o.encode('utf8','replace').decode() if isinstance(o,str) else o).to_csv(home/'t.csv'); df = home/'t.csv'
    r = survives(lambda: read_df(df, home/'images', fmt=fmt, on_missing='drop', verbose=False))
    if r is not None and len(r.boxes): assert survives(lambda: read_df(write_df(r), home/'images', verbose=False)) is not None
