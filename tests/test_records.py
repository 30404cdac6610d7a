"Records: flat memory, workers, and every operation against a plain Python oracle"
import gc, json, multiprocessing as mp, pickle, sys

import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from pycocotools import mask as cocomask

from visdet.core.basics import DataError
from visdet.data.packed import MaskStore, PackedStrings, mask_areas, mask_flaws, pack_masks, ragged_take
from visdet.data.records import Records, same_vocab
from visdet.data.repair import Raw, repair
from visdet.data.store import *

quick = settings(max_examples=100, deadline=None)

def make(n=20, per=3, seed=0, masks=False):
    r = np.random.default_rng(seed); T = n*per; xy = r.uniform(0,200,(T,2))
    ms = [[r.uniform(0,300,8)] if k%3==0 else dict(counts=cocomask.encode(np.asfortranarray(r.random((300,400))>.99).astype(np.uint8))['counts']) if k%3==1 else None for k in range(T)] if masks else None
    return Records.build([f'd/{i}.jpg' for i in range(n)], [(300,400)]*n, np.c_[xy,xy+r.uniform(1,99,(T,2))], r.integers(0,3,T), ['a','b','c'], offsets=np.arange(n+1)*per, ids=[100+i for i in range(n)], crowd=r.random(T)>.8, masks=ms, root='x')

def as_list(r):
    "Records as plain Python, image by image"
    return [dict(id=o.id, path=o.path, size=o.size, boxes=o.boxes.tolist(), labels=[r.vocab[l] for l in o.labels], crowd=o.crowd.tolist(), areas=o.areas.tolist(), ann_ids=list(o.ann_ids),
                 masks=None if o.masks is None else [m if isinstance(m,dict) else [p.tolist() for p in m] for m in o.masks]) for o in r]

_masked = (lambda r: (r, as_list(r)))(make(masks=True))

# ---------------------------------------------------------------- packed
@quick
@given(lens=st.lists(st.integers(0,5), min_size=1, max_size=8), data=st.data())
def test_ragged_take(lens, data):
    items = [[10*i+k for k in range(n)] for i,n in enumerate(lens)]; flat = np.array(sum(items,[]), int); offs = np.r_[0,np.cumsum(lens)]
    rows = data.draw(st.lists(st.integers(0,len(lens)-1), max_size=10)); new,idx = ragged_take(offs, np.array(rows,int))
    assert [flat[idx][new[k]:new[k+1]].tolist() for k in range(len(rows))]==[items[r] for r in rows]

@quick
@given(words=st.lists(st.text(max_size=6)|st.just('\udfff'), max_size=8), prefix=st.text(max_size=3))
def test_strings(words, prefix):
    p = PackedStrings.of(words, prefix); assert list(p)==[prefix+w for w in words] and len(p)==len(words)
    assert list(p[::-1])==[prefix+w for w in words][::-1] and pickle.loads(pickle.dumps(p))==p

@quick
@given(seed=st.integers(0,2**32-1), n=st.integers(0,6))
def test_masks_oracle(seed, n):
    r = np.random.default_rng(seed); h,w = r.integers(1,40,2); ms = []
    for _ in range(n):
        k = r.integers(3)
        ms.append(None if k==0 else cocomask.encode(np.asfortranarray(r.random((h,w))>r.random()).astype(np.uint8)) if k==1 else [np.round(r.uniform(0,40,2*r.integers(3,7)),2).astype(np.float32) for _ in range(r.integers(1,4))])
    s = pack_masks(ms); areas = mask_areas(s); sizes = np.full((n,2),(h,w))
    polys,rles = mask_flaws(s, sizes); assert not polys.any() and not rles.any()
    for t,m in enumerate(ms):
        got = s.item(t,(h,w))
        if m is None: assert got is None and areas[t]==0
        elif isinstance(m,dict): assert got==m and areas[t]==cocomask.area(m)
        else:
            want = sum(abs(np.dot(p[0::2],np.roll(p[1::2],-1))-np.dot(p[1::2],np.roll(p[0::2],-1)))/2 for p in (o.astype(float) for o in m))
            assert all((a==b).all() for a,b in zip(got,m)) and abs(areas[t]-want)<1e-6*max(1,want)
    perm = r.permutation(n); a,b = s.take(perm),pack_masks([ms[i] for i in perm])
    for f in MaskStore.fields: np.testing.assert_array_equal(getattr(a,f), getattr(b,f))

# ---------------------------------------------------------------- records
@quick
@given(rows=st.lists(st.integers(0,19), max_size=12))
def test_subset_oracle(rows):
    r,whole = _masked; assert as_list(r.subset(rows))==[whole[i] for i in rows]

def test_selection_forms():
    r = make(); m = r.counts>0; m[3] = False
    assert as_list(r[m])==[o for i,o in enumerate(as_list(r)) if i!=3] and as_list(r[2:5])==as_list(r)[2:5] and len(r[[]])==0 and r[-1].id==119
    for bad in (20,-21):
        with pytest.raises(IndexError): r[bad]
    with pytest.raises(IndexError): r.subset([20])

@quick
@given(seed=st.integers(0,99), pct=st.floats(0,1))
def test_split(seed, pct):
    r = make(); a,b = r.split(pct, seed); assert len(a)+len(b)==20 and sorted(a.ids.tolist()+b.ids.tolist())==r.ids.tolist() and len(b)==round(pct*20)

@quick
@given(perm=st.permutations(['a','b','c','d']))
def test_with_vocab_keeps_names(perm):
    r = make(); w = r.with_vocab(perm); assert as_list(w)==as_list(r) and w.vocab==list(perm) and len(set(w.cat_ids))==4
    assert as_list(w.with_vocab(r.vocab))==as_list(r) and w.with_vocab(r.vocab).cat_ids==r.cat_ids; same_vocab(w, perm)

def test_no_python_object_per_box(tmp_path):
    "The number of objects does not depend on the number of boxes, in memory, in a pickle, or mapped"
    def objects(n):
        blob = pickle.dumps(make(n, 10), protocol=5); gc.collect(); before = sys.getallocatedblocks(); r = pickle.loads(blob); return sys.getallocatedblocks()-before, len(blob)-r.nbytes
    (a,over),(b,over2) = objects(10),objects(2000); assert abs(b-a)<50 and max(over,over2)<6000
    p = make(2000,10).save(tmp_path/'r'); m = Records.load(p); assert isinstance(m.boxes, np.memmap) and as_list(m[:3])==as_list(make(2000,10)[:3])

def _private(q, r):
    "Read everything in a child process and say how much memory became private meanwhile"
    def kb(): return sum(int(l.split()[1]) for l in open('/proc/self/smaps_rollup') if l.startswith(('Private_Dirty','Private_Clean')))
    r[0].boxes.sum(); gc.disable(); a = kb(); [r[i].boxes.sum()+len(r[i].path) for i in range(0, len(r), 50)]; q.put(kb()-a)

@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='reads /proc')
def test_forked_worker_copies_nothing():
    r = make(40_000, 10); ctx = mp.get_context('fork'); q = ctx.Queue(); p = ctx.Process(target=_private, args=(q,r)); p.start(); grown = q.get(timeout=60); p.join()
    assert r.nbytes>15e6 and grown<4000, f'{grown} kB of {r.nbytes/1e3:.0f} kB were copied'

# ---------------------------------------------------------------- repair
lo,hi = st.sampled_from([0.,3.,10.,-5.,25.,40.,-1e9,float('nan')]),st.sampled_from([10.,25.,40.,61.,60.,0.,1e9,float('inf')])
@quick
@given(boxes=st.lists(st.tuples(lo,lo,hi,hi), max_size=12), data=st.data())
def test_repair_oracle(boxes, data):
    "One box at a time in plain Python says the same as the arrays"
    boxes = boxes+boxes[:data.draw(st.integers(0,3))]; T = len(boxes); rows = data.draw(st.lists(st.sampled_from([0,1,0,1,-1]), min_size=T, max_size=T)); labels = data.draw(st.lists(st.integers(0,1), min_size=T, max_size=T)); sizes = [(40,60),(30,30)]
    raw = Raw('f', ['i','j'], ['a','b'], np.array(sizes), np.array(rows,int), np.array(labels,int), np.array(boxes,float).reshape(-1,4), ['x','y'], [1,2], unknown={t:'?' for t,i in enumerate(rows) if i<0})
    want,seen,clip = [],{},{}
    for t,(b,i,l) in enumerate(zip(boxes,rows,labels)):
        if i<0: want.append('dropped'); continue
        h,w = sizes[i]; x1,y1,x2,y2 = b
        if not np.isfinite(b).all() or x2<=x1 or y2<=y1 or x2<=0 or y2<=0 or x1>=w or y1>=h: want.append('dropped')
        elif (b,i,l) in seen: want.append('merged')
        else: seen[b,i,l] = 1; clip[t+1] = [max(x1,0),max(y1,0),min(x2,w),min(y2,h)]; want.append('clipped' if min(x1,y1)<0 or x2>w or y2>h else 'kept')
    if T and all(i<0 for i in rows):
        with pytest.raises(DataError, match='none of the'): repair(raw, verbose=False)
        return
    r = repair(raw, verbose=False); d = r.report.df; got = ['kept']*T
    for a,w in zip(d.ann, d.action): got[a-1] = w
    assert dict(zip(r.ann_ids.tolist(), r.boxes.tolist()))==clip and got==want and len(r.boxes)==sum(w in ('kept','clipped') for w in want)==r.report.kept and r.report.clipped==want.count('clipped')

def test_million_boxes_build():
    T,N = 1_000_000,100_000; xy = np.random.default_rng(0).uniform(0,400,(T,2)); r = repair(Raw('big', list(range(N)), [f'{i}.jpg' for i in range(N)], np.full((N,2),500), np.repeat(np.arange(N),10), np.zeros(T,int), np.c_[xy,xy+50], ['a'], [1]), verbose=False)
    assert len(r.boxes)==T and r.nbytes<60e6

def test_json_is_finite_and_plain():
    d = make(masks=True).to_coco(); assert json.loads(json.dumps(d, allow_nan=False))==d
