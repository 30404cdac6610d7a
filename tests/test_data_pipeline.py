"What training rests on: batches that follow from seed and epoch alone, boxes and masks that stay with their pixels, no object lost or shown twice, samplers"
import json
import multiprocessing
import socket
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

import visdet
from visdet.core.basics import ConfigError, DataError
from visdet.core.registry import names
from visdet.cv.masks import rasterise, rle_encode
from visdet.data.batch import ColourJitter, KorniaJitter, Normalize, imagenet_stats
from visdet.data.datasets import coco
from visdet.data.dl import DetDL
from visdet.data.items import RecordItems
from visdet.data.loaders import DetDataLoaders
from visdet.data.records import Records
from visdet.data.repeats import class_shares, repeat_counts, repeat_factors
from visdet.data.samplers import EpochSampler, InfiniteSampler, count_batches, cut, level, numbered, share
from visdet.data.targets import Sample, collate, flat, ragged
from visdet.data.toy import make_toy, toy_records
from visdet.data.transforms import Compose, RandomCrop, RandomFlip, RandomResize, Resize

quick = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return toy_records(17, tmp_path_factory.mktemp("toy"), seed=3)


def loaders(recs, **kw):
    return DetDataLoaders.from_records(recs, **{**dict(bs=4, num_workers=0, device="cpu", resize=48, aug="strong", seed=7), **kw})


def passes(dl, n=1):
    return [[(x.clone(), t) for x, t in dl] for _ in range(n)]


def same(a, b):
    assert len(a) == len(b) > 0
    for (xa, ta), (xb, tb) in zip(a, b):
        assert torch.equal(xa, xb)
        assert all(torch.equal(fa, fb) for fa, fb in zip(ta, tb))


def ids(batches):
    return [i for _, t in batches for i in t.ids.tolist()]


# ---------------------------------------------------------------- the same seed gives the same batches

PLANS = dict(plain=dict(group=False), grouped=dict(group=True), repeated=dict(repeat_thr=0.9), stream=dict(n_iters=6))


@pytest.fixture(scope="module")
def alone(toy):
    "Two training epochs and a validation without workers, for each plan"
    res = {}
    for k, kw in PLANS.items():
        dls = loaders(toy, **kw)
        res[k] = passes(dls.train, 2), passes(dls.valid)[0]
    return res


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("plan", PLANS)
def test_workers_change_nothing(toy, alone, plan, workers):
    (e0, e1), valid = alone[plan]
    dls = loaders(toy, num_workers=workers, **PLANS[plan])
    a, b = passes(dls.train, 2)
    same(a, e0), same(b, e1)
    same(passes(dls.valid)[0], valid)
    assert ids(e0) != ids(e1)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("plan", PLANS)
def test_the_rest_of_an_interrupted_epoch(toy, alone, plan, workers):
    "A loader that begins in the middle of the second epoch gives what is left of it, then the third"
    dls = loaders(toy, num_workers=workers, **PLANS[plan])
    dls.train.seek(1, 2)
    same(passes(dls.train)[0], alone[plan][0][1][2:])
    assert dls.train.epoch == 2 and len(passes(dls.train)[0]) == len(dls.train)


def test_another_seed_is_another_run(toy, alone):
    assert ids(passes(loaders(toy, seed=8, valid=toy, group=False).train)[0]) != ids(alone["plain"][0][0])


def test_copies_of_an_image_are_different_pictures(toy):
    rare = loaders(toy, valid=toy, repeat_thr=0.9, bs=1)
    seen = {}
    for x, t in rare.train:
        seen.setdefault(int(t.ids[0]), []).append(x)
    twice = [v for v in seen.values() if len(v) > 1]
    assert twice and all(a.shape != b.shape or not torch.equal(a, b) for a, b, *_ in twice)


# ---------------------------------------------------------------- boxes and masks follow their pixels

INKS = np.array([[255, 0, 0], [0, 255, 0], [255, 255, 0]], np.uint8)  # Object k is inked in red, green or both; its mask in blue on top


def marked(h, w, boxes, rle=(), shape="ellipse"):
    "Filled boxes on black, and in each a blob whose outline is the mask"
    img, masks = np.zeros((h, w, 3), np.uint8), []
    yy, xx = np.mgrid[:h, :w] + 0.5
    for k, (x1, y1, x2, y2) in enumerate(boxes):
        img[y1:y2, x1:x2] = INKS[k]
        cx, cy, rx, ry = (x1 + x2) / 2, (y1 + y2) / 2, (x2 - x1) / 2 - 1, (y2 - y1) / 2 - 1
        if k in rle:
            m = ((xx - cx) / rx) ** 2 + ((yy - cy) / ry) ** 2 <= 1 if shape == "ellipse" else (abs(xx - cx) < rx) & (abs(yy - cy) < ry)
            masks.append(rle_encode(m.astype(np.uint8)))
        else:
            a = np.linspace(0, 2 * np.pi, 48, endpoint=False)
            p = np.stack([cx + rx * np.cos(a), cy + ry * np.sin(a)], 1) if shape == "ellipse" else np.array([[cx - rx, cy - ry], [cx + rx, cy - ry], [cx + rx, cy + ry], [cx - rx, cy + ry]])
            masks.append([p.astype(np.float32).ravel()])
            m = rasterise([masks[-1]], (h, w))[0].astype(bool)
        img[m, 2] = 255
    return Sample(img, boxes=boxes, labels=list(range(len(boxes))), masks=masks, id=h)


@st.composite
def samples(draw, most=3):
    "None to three objects side by side"
    h, w = draw(st.integers(24, 130)), draw(st.integers(40, 130))
    n = draw(st.integers(0, most))
    cuts, boxes = np.linspace(0, w, n + 1).astype(int), []
    for a, b in zip(cuts, cuts[1:]):
        x1 = draw(st.integers(a, b - 11))
        y1 = draw(st.integers(0, h - 10))
        boxes.append((x1, y1, draw(st.integers(x1 + 9, b - 2)), draw(st.integers(y1 + 9, h))))
    return marked(h, w, boxes, draw(st.sets(st.integers(0, 2))), draw(st.sampled_from(["ellipse", "rectangle"])))


def pairs(lo, more):
    return st.tuples(st.integers(lo, 120), st.integers(0, more)).map(lambda o: (o[0], o[0] + o[1]))


# One entry for each registered transform: what draws an instance. A transform without an entry fails `test_every_transform_has_a_marker_case`.
MOVES = dict(
    Resize=st.tuples(st.integers(40, 150), st.sampled_from(["keep_ratio", "letterbox", "stretch"]), st.booleans()).map(lambda o: Resize(o[0], o[1], antialias=o[2])),
    RandomResize=st.one_of(pairs(40, 80).map(RandomResize), st.lists(st.integers(40, 120), min_size=1, max_size=3).map(RandomResize), pairs(40, 40).map(lambda o: RandomResize(o, long=130))),
    RandomFlip=st.sampled_from(["horizontal", "vertical", "diagonal"]).map(lambda o: RandomFlip(1.0, o)),
    RandomCrop=st.one_of(st.tuples(st.floats(0.3, 0.9), st.sampled_from(["centre", "share"]), st.booleans()).map(lambda o: RandomCrop((o[0], 1.0), keep=o[1], allow_empty=o[2])),
                         st.integers(30, 90).map(lambda n: RandomCrop((n, n + 20)))),
)
MOVES["Compose"] = st.lists(st.one_of(*MOVES.values()), min_size=1, max_size=3).map(Compose)


def _kornia():
    from kornia.augmentation import ColorJiggle, RandomInvert
    return KorniaJitter(ColorJiggle(0.1, 0.1, 0.1, 0.0, p=1.0), RandomInvert(p=0.5))


COLOURS = dict(Normalize=lambda: Normalize(*imagenet_stats), ColourJitter=lambda: ColourJitter(0.2, 0.2, 0.2, 0.05, p=1.0), KorniaJitter=_kornia)


def uncovered():
    "Registered transforms, here and in the shipped catalogue, that no test moves markers with"
    known = json.loads((Path(visdet.__file__).parent / "config" / "schema" / "catalogue.json").read_text())["transform"]
    return sorted((set(names("transform")) | set(known)) - set(MOVES) - set(COLOURS))


def test_every_transform_has_a_marker_case():
    assert not uncovered(), "give these a way to be drawn in MOVES (pixels move) or COLOURS (they do not)"


def ink(img, k):
    "Pixels of object k, and those of its mask"
    r, g, b = (img[..., c] > 127 for c in range(3))
    mine = (r == bool(INKS[k, 0])) & (g == bool(INKS[k, 1])) & (r | g)
    return mine, mine & b


def off(img, s_boxes, labels, bits, tol):
    "Sentences about objects whose box or mask is further than `tol` pixels from its ink"
    for box, k, m in zip(s_boxes, labels, bits):
        if min(box[2:] - box[:2]) < 4:
            continue  # a sliver may fall below half of its brightness when it is resampled
        mine, blob = ink(img, int(k))
        ys, xs = np.nonzero(mine)
        if not len(xs):
            yield f"object {k} has no ink"
            continue
        gap = np.abs(np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) - box).max()
        if gap > tol:
            yield f"box of object {k} is {gap:.2f} pixels off"
        grow = ndimage.generate_binary_structure(2, 2)
        n = int(np.ceil(tol))
        big = ndimage.binary_dilation(m, grow, n)
        small = ndimage.binary_erosion(m, grow, n, border_value=1)
        if (blob & ~big).any() or (small & ~blob).any():
            yield f"mask of object {k} is more than {n} pixels off"


def walk(s, tfms, seed):
    "The sample after the transforms, one by one, and by how many pixels its edges may be off: a pixel of the coarsest picture on the way, and half of one for each further resampling"
    rng, scales = np.random.default_rng(seed), [s.scale]
    for t in Compose(tfms).tfms:
        s = t(s, rng)
        scales.append(s.scale)
    steps = sum(a != b for a, b in zip(scales, scales[1:]))
    coarse = max(last / o for f in scales for last, o in zip(s.scale, f))
    return s, coarse * (1 + max(steps - 1, 0) / 2) + 0.01


def check(s, out, tol=1.01):
    assert len(out.boxes) == len(out.labels) == len(out.crowd) == len(out.masks)
    assert len(set(out.labels.tolist())) == len(out.labels) and set(out.labels) <= set(s.labels)
    bits = rasterise(out.masks, out.size).astype(bool)
    return list(off(out.image, out.boxes, out.labels, bits, tol))


@pytest.mark.parametrize("name", MOVES)
def test_each_transform_moves_boxes_and_masks_with_their_pixels(name):
    @quick
    @given(samples(), MOVES[name], st.integers(0, 2**31))
    def run(s, tfm, seed):
        out, tol = walk(s, [tfm], seed)
        assert not check(s, out, tol) and np.array_equal(out.image, tfm(s, np.random.default_rng(seed)).image)
        if name in ("Resize", "RandomResize", "RandomFlip"):
            assert len(out.boxes) == len(s.boxes)
    run()


@quick
@given(samples(), st.lists(st.one_of(*MOVES.values()), min_size=2, max_size=5), st.integers(0, 2**31))
def test_random_compositions_move_boxes_and_masks_with_their_pixels(s, tfms, seed):
    assert not check(s, *walk(s, tfms, seed))


@pytest.mark.parametrize("forgets", ["boxes", "masks", "nothing"])
def test_the_markers_would_notice(forgets):
    s = marked(60, 90, [(5, 10, 30, 40), (50, 8, 80, 30)], rle={1})
    f = RandomFlip(1.0)(s, np.random.default_rng(0))
    bad = Sample(f.image, s.boxes if forgets == "boxes" else f.boxes, s.labels, masks=s.masks if forgets == "masks" else f.masks)
    assert bool(check(s, bad)) == (forgets != "nothing")
    one = Sample(f.image, f.boxes + np.float32([0, 2, 0, 2]), s.labels, masks=f.masks)  # two pixels
    assert check(s, one)


def palette(img):
    "The number of each pixel's colour, and how many there are"
    c, k = np.unique(img.reshape(-1, 3), axis=0, return_inverse=True)
    return k.reshape(img.shape[:2]), len(c)


@pytest.mark.parametrize("name", COLOURS)
@quick
@given(data=st.data())
def test_colours_change_and_pixels_stay(name, data):
    "Pixels of one colour have one colour afterwards, and those of two colours two; targets and padding are untouched"
    if name == "KorniaJitter":
        pytest.importorskip("kornia")
    ss = data.draw(st.lists(samples(), min_size=1, max_size=3))
    tfm, norm = COLOURS[name](), Normalize(*imagenet_stats)
    xb, t = collate(ss, masks=True)
    was = [o.clone() for o in t]
    if hasattr(tfm, "reseed"):
        tfm.reseed((1, data.draw(st.integers(0, 99)), 3))
    out = tfm((xb.clone(), t), split_idx=0)
    assert all(torch.equal(a, b) for a, b in zip(was, out[1]))
    final = out if name == "Normalize" else norm(out, split_idx=0)
    for i, s in enumerate(ss):
        h, w = s.size
        assert not final[0][i, :, h:].any() and not final[0][i, :, :, w:].any()
        new = out[0][i, :, :h, :w].permute(1, 2, 0).double().numpy()
        k, n = palette(s.image)
        means = np.stack([new[k == j].mean(0) for j in range(n)])
        assert np.abs(new - means[k]).max() < 1e-3 * max(1, np.abs(new).max())
        if n > 1:
            d = np.abs(means[:, None] - means[None]).max(-1) + 1e9 * np.eye(n)
            assert d.min() > 0.05 * np.abs(means).max()


@quick
@given(st.lists(samples(), min_size=1, max_size=3), st.lists(st.one_of(*MOVES.values()), max_size=3), st.integers(0, 99))
def test_what_the_model_sees_fits_its_targets(ss, tfms, seed):
    "Through item transforms, collate and normalisation: boxes and bitmaps of the batch against the ink in its images"
    outs, tols = zip(*[walk(s, tfms, (seed, i)) for i, s in enumerate(ss)])
    norm = Normalize(*imagenet_stats)
    xb, t = norm(collate(list(outs), masks=True), split_idx=0)
    imgs = norm.decode((xb, t))[0]
    for img, o, tol in zip(imgs, ragged(t), tols):
        bits = np.zeros((0, *img.shape[1:]), bool) if o["masks"] is None else o["masks"].numpy().astype(bool)
        assert len(bits) == len(o["boxes"])
        found = list(off(img.permute(1, 2, 0).numpy(), o["boxes"].numpy(), o["labels"].tolist(), bits, tol))
        h, w = o["size"]
        assert not found and not bits[:, h:].any() and not bits[:, :, w:].any()


# ---------------------------------------------------------------- no box lost or shown twice

@st.composite
def crowds(draw):
    "Samples of any number of objects, each with a box that no other has"
    res, n = [], 0
    for i in range(draw(st.integers(1, 4))):
        h, w, m = draw(st.integers(8, 70)), draw(st.integers(8, 70)), draw(st.integers(0, 5))
        b = np.array([[1 + (n + j) / 64, 1, 5, 6] for j in range(m)], np.float32).reshape(-1, 4)
        masks = []
        for j in range(m):
            bit = np.zeros((h, w), np.uint8)
            bit[1 + j % 3:5 + j % 3, 1:6] = 1
            masks.append([[np.float32([1, 1, 6, 1, 6, 5 + j % 2, 1, 5])], rle_encode(bit), []][draw(st.integers(0, 2))])
        n += m
        res.append(Sample(np.full((h, w, 3), i + 1, np.uint8), b, draw(st.lists(st.integers(0, 4), min_size=m, max_size=m)), draw(st.lists(st.booleans(), min_size=m, max_size=m)), masks, id=10 + i, orig_size=(h * 2, w * 2), scale=(0.5, 0.5)))
    return res


@quick
@given(crowds(), st.sampled_from([1, 32, (16, 40)]), st.booleans())
def test_collate_keeps_every_object_once(ss, pad, masks):
    xb, t = collate(ss, pad, masks)
    n = [len(s.boxes) for s in ss]
    assert t.boxes.shape == (len(ss), max(n), 4) and int((t.labels >= 0).sum()) == sum(n)
    ph, pw = pad if isinstance(pad, tuple) else (pad, pad)
    assert xb.shape[2] % ph == 0 and xb.shape[3] % pw == 0 and xb.shape[2] - max(s.size[0] for s in ss) < ph and xb.shape[3] - max(s.size[1] for s in ss) < pw
    back = ragged(t)
    for i, (s, o) in enumerate(zip(ss, back)):
        h, w = s.size
        assert np.array_equal(o["boxes"].numpy(), s.boxes) and o["labels"].tolist() == s.labels.tolist() and o["crowd"].tolist() == s.crowd.tolist()
        assert (o["id"], o["size"], o["orig_size"], o["scale"]) == (s.id, s.size, s.orig_size, s.scale)
        assert (xb[i, :, :h, :w] == i + 1).all() and not xb[i, :, h:].any() and not xb[i, :, :, w:].any()
        assert (t.labels[i, n[i]:] == -1).all() and not t.valid[i, n[i]:].any()
    every = flat(t)[0]
    assert len(every) == len(every.unique(dim=0)) == sum(n)
    assert t.masks.shape == ((sum(n) if masks else 0), *xb.shape[2:])
    if masks:
        want = [(m, s.size) for s in ss for m in s.masks]
        for row, (m, size) in zip(t.masks.numpy(), want):
            full = np.zeros(row.shape, np.uint8)
            full[:size[0], :size[1]] = rasterise([m], size)[0]
            assert np.array_equal(row, full)


@pytest.mark.parametrize("kw", [dict(group=True), dict(group=False), dict(group=True, bs=3), dict(bs=1)])
def test_an_epoch_shows_every_object_once(toy, kw):
    dls = loaders(toy, valid=toy, **{**dict(aug="flip"), **kw})
    dls.train.drop_last = False
    for dl in dls.loaders:
        got = sorted((i, *(b / s.repeat(2)).round().int().tolist()) if dl is dls.valid else (i, int(l)) for _, t in dl for i, bb, ll, s in zip(t.ids.tolist(), t.boxes, t.labels, t.scales) for b, l in zip(bb, ll) if l >= 0)
        want = sorted((i, *np.round(b).astype(int).tolist()) if dl is dls.valid else (i, int(l)) for i in range(len(toy)) for b, l in zip(toy[i].boxes, toy[i].labels))
        assert len(got) == len(want) == len(toy.boxes)
        assert [o[0] for o in got] == [o[0] for o in want]
        if dl is dls.train:
            assert got == want


# ---------------------------------------------------------------- orientation

@quick
@given(st.lists(st.booleans(), max_size=90), st.integers(1, 12), st.booleans(), st.integers(0, 9))
def test_batches_of_one_orientation(tall, bs, drop_last, seed):
    "Every image once; only the last one or two batches mix; as many batches as without grouping"
    rows = np.random.default_rng(seed).permutation(len(tall)).tolist()
    got = cut(rows, bs, drop_last, [tall[r] for r in rows])
    mixed = [i for i, b in enumerate(got) if len({tall[r] for r in b}) > 1]
    assert len(got) == len(cut(rows, bs, drop_last)) and len(mixed) <= 1 and all(i >= len(got) - 2 for i in mixed)
    assert all(len(b) == bs for b in got[:-1])
    shown = [r for b in got for r in b]
    assert len(set(shown)) == len(shown) and (sorted(shown) == sorted(rows) or drop_last and len(rows) - len(shown) == len(rows) % bs)
    for o in (True, False):  # within an orientation the order stays
        part = [r for b in got[:len(got) - len(got[-1:])] for r in b if tall[r] is o]
        assert part == [r for r in rows if tall[r] is o][:len(part)] or mixed


@pytest.mark.parametrize("name,bs,least", [("val2017", 8, 0.2), ("val2017", 2, 0.08), ("train2017", 4, 0.12)])
def test_grouping_saves_padding_on_real_images(real_data, name, bs, least):
    "The share of all pixels of an epoch that grouping saves, with sizes read from the annotation file"
    f = real_data / "coco_mini" / "annotations" / f"instances_{name}.json"
    if not f.exists():
        pytest.skip("no coco_mini here")
    from visdet.data.transforms import fit_size
    size = np.array([fit_size((o["height"], o["width"]), (1333, 800)) for o in json.loads(f.read_text())["images"]])
    cost = {}
    for group in (False, True):
        rows = EpochSampler(len(size)).rows(0)
        cost[group] = sum(len(b) * int(np.prod(-(-size[b].max(0) // 32) * 32)) for b in cut(rows, bs, False, (size[:, 0] > size[:, 1])[rows] if group else None))
    assert 1 - cost[True] / cost[False] > least


# ---------------------------------------------------------------- several processes

@quick
@given(st.integers(0, 70), st.integers(1, 5), st.integers(1, 6), st.booleans(), st.booleans(), st.booleans())
def test_shares_of_processes(n, world, bs, train, drop_last, grouped):
    "Validation: each image in exactly one process. Training: each at least once, fewer than `world` twice, and equally many batches everywhere"
    rng = np.random.default_rng(n)
    tall, rows = rng.random(n) < 0.3, rng.permutation(n)
    plans = []
    for r in range(world):
        mine = share(rows, r, world, fill=train)
        plans.append(level(cut(mine, bs, drop_last, tall[mine] if grouped else None), count_batches(n, bs, drop_last, r, world, train)))
        assert len(plans[-1]) == count_batches(n, bs, drop_last, r, world, train)
    shown = [int(i) for p in plans for b in p for i in b]
    if train or bs > 1 and n >= world:
        assert len({len(p) for p in plans}) == 1
    if not drop_last:
        count = np.bincount(shown, minlength=n)
        assert (count == 1).all() if not train else (count >= 1).all() and (n < world or count.sum() - n < world)


@pytest.mark.parametrize("world", [2, 3])
def test_loaders_of_processes(toy, world):
    dls = loaders(toy, valid=toy, repeat_thr=0.9, group=True)
    parts = [passes(dls.train.new(ranks=(r, world), drop_last=False))[0] for r in range(world)]
    whole = EpochSampler(len(toy), 7, factors=repeat_factors(toy, 0.9)).rows(0).tolist()
    got = sorted(i for p in parts for i in ids(p))
    assert len({len(p) for p in parts}) == 1 and 0 <= len(got) - len(whole) < world and set(got) == set(whole)
    held = [ids(passes(dls.valid.new(ranks=(r, world)))[0]) for r in range(world)]
    assert sorted(sum(held, [])) == list(range(len(toy)))
    first = [p[0] for p in parts]
    assert first[0][1].ids.tolist() != first[1][1].ids.tolist()


def _one_of_two(rank, port, home, out):
    "What one process loads; gathered by gloo, written by the first"
    import torch.distributed as dist
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=timedelta(seconds=30))
    dls = coco(home / "train.json", home / "train.json", bs=2, num_workers=0, device="cpu", resize=48, verbose=False)
    res = dict(train=[t.ids.tolist() for _, t in dls.train], valid=[t.ids.tolist() for _, t in dls.valid], length=[len(dls.train), len(dls.valid)])
    n, parts = torch.tensor([len(res["valid"])]), [None, None]
    dist.all_reduce(n), dist.all_gather_object(parts, res)
    if rank == 0:
        out.write_text(json.dumps(dict(parts=parts, batches=int(n))))
    dist.destroy_process_group()


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_two_real_processes(tmp_path):
    "Two processes on this machine, joined by gloo: together every image of the validation exactly once"
    home = make_toy(tmp_path / "toy", n=12, valid_pct=0.25)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ctx = multiprocessing.get_context("fork")
    ps = [ctx.Process(target=_one_of_two, args=(r, port, home, tmp_path / "out.json")) for r in range(2)]
    for p in ps:
        p.start()
    for p in ps:
        p.join(60)
        p.kill()
    assert [p.exitcode for p in ps] == [0, 0]
    d = json.loads((tmp_path / "out.json").read_text())
    valid, train = ([sum(p[k], []) for p in d["parts"]] for k in ("valid", "train"))
    assert sorted(sum(valid, [])) == list(range(9)) and {len(o) for o in valid} == {4, 5}
    assert len(train[0]) == len(train[1]) == 4 and len(set(train[0] + train[1])) >= 7  # nine images and a repeated one make five each, of which four fill batches
    assert [len(p[k]) for p in d["parts"] for k in ("train", "valid")] == [n for p in d["parts"] for n in p["length"]] == [2, 3] * 2 and d["batches"] == 6


def test_a_loader_around_the_loader_is_refused(toy):
    "A wrapper that asks for single rows, as fastai's does, would split what is split already"
    with pytest.raises(ConfigError, match="own share"):
        next(loaders(toy).train.create_batches([3, 1]))


def test_fastai_takes_the_loaders_as_they_are(toy):
    pytest.importorskip("accelerate")
    from fastai.distributed import DistributedTrainer
    dl = loaders(toy).train
    assert DistributedTrainer._wrap_dl(SimpleNamespace(learn=SimpleNamespace(model=SimpleNamespace(device="cpu"))), dl) is dl


# ---------------------------------------------------------------- epochs and streams

@quick
@given(st.integers(1, 40), st.integers(1, 90), st.integers(0, 2**20), st.integers(0, 5))
def test_a_stream_is_passes_end_to_end(n, take, epoch, seed):
    s = EpochSampler(n, seed)
    inf = InfiniteSampler(s, take)
    whole = np.concatenate([inf.rows(e) for e in range(4)])
    assert np.array_equal(whole, np.concatenate([s.rows(p) for p in range(-(-4 * take // n))])[:4 * take])
    count = np.bincount(whole, minlength=n)
    assert count.max() - count.min() <= 1
    assert np.array_equal(inf.rows(epoch), InfiniteSampler(EpochSampler(n, seed), take).rows(epoch)) and len(inf.rows(epoch)) == take


def test_epochs_are_reseeded(toy):
    s = EpochSampler(50, 1)
    orders = {tuple(s.rows(e)) for e in range(30)}
    assert len(orders) == 30 and all(sorted(o) == list(range(50)) for o in orders)
    assert all((EpochSampler(50, 1, shuffle=False).rows(e) == np.arange(50)).all() for e in range(3))


def test_iterations_instead_of_passes(toy):
    dls = loaders(toy, valid=toy, n_iters=11, bs=4, aug=None, group=False)
    assert len(dls.train) == 11
    a = passes(dls.train, 3)
    assert [len(o) for o in a] == [11] * 3
    count = np.bincount(sum(map(ids, a), []), minlength=len(toy))
    assert count.sum() == 132 and count.max() - count.min() <= 1
    assert len(dls.train_eval) == -(-len(toy) // 4) and len(dls.with_size(32).train) == 11


# ---------------------------------------------------------------- repeat factors

def drawn(labels, vocab=None, crowd=None):
    n = len(labels)
    bb = [[[1, 1, 9, 9]] * len(o) for o in labels]
    k = max((max(o, default=0) for o in labels), default=0) + 1
    return Records.build([f"{i}.png" for i in range(n)], [(20, 20)] * n, bb, labels, vocab or [str(i) for i in range(k)], crowd=crowd)


def test_a_worked_example():
    "Ten images; class 0 in all, class 1 in two of them, class 2 in one; threshold 0.4: factors 1, sqrt(2) and 2"
    labels = [[0]] * 7 + [[0, 1], [1, 1, 0], [0, 2]]
    r = drawn(labels)
    assert np.allclose(class_shares(r), [1, 0.2, 0.1])
    assert np.allclose(repeat_factors(r, 0.4), [1] * 7 + [2**0.5] * 2 + [2])
    assert repeat_counts(repeat_factors(r, 0.4), "ceil").tolist() == [1] * 7 + [2, 2, 2]
    assert repeat_factors(r).tolist() == [1] * 10  # at LVIS' 0.001 nothing is rare in ten images


@quick
@given(st.lists(st.lists(st.integers(0, 8), max_size=5), min_size=1, max_size=30), st.floats(0.001, 1.0))
def test_the_published_rule(labels, t):
    "r(c) = max(1, sqrt(t/f(c))), r(I) = max over the classes of I, in words"
    n, has = len(labels), [set(o) for o in labels]
    f = {c: sum(c in o for o in has) / n for o in has for c in o}
    r = {c: max(1, (t / v) ** 0.5) for c, v in f.items()}
    assert np.allclose(repeat_factors(drawn(labels), t), [max((r[c] for c in o), default=1) for o in has])


@quick
@given(st.lists(st.floats(1, 5), max_size=40), st.integers(0, 2**31))
def test_rounding(f, seed):
    f = np.array(f)
    for how in ("ceil", "stochastic", "independent"):
        n = repeat_counts(f, how, np.random.default_rng(seed))
        assert (n >= np.floor(f + 1e-9)).all() and (n <= np.ceil(f - 1e-9)).all()
        assert np.array_equal(n, repeat_counts(f, how, np.random.default_rng(seed)))
    assert np.array_equal(repeat_counts(f, "ceil"), np.ceil(f - 1e-9))
    assert repeat_counts(f, "stochastic", np.random.default_rng(seed)).sum() == len(EpochSampler(len(f), factors=f)) == len(EpochSampler(len(f), factors=f).rows(seed))


def test_stochastic_rounding_is_right_on_average():
    f = np.array([1, 1.1, 1.5, 2.9, 3.25, 1.25])
    s = EpochSampler(6, 3, factors=f)
    mean = np.mean([np.bincount(s.rows(e), minlength=6) for e in range(4000)], 0)
    assert np.abs(mean - f).max() < 0.03
    assert [s.rows(e).tolist() for e in range(9)] == [EpochSampler(6, 3, factors=f).rows(e).tolist() for e in range(9)]


def test_repeats_through_the_loaders(toy):
    dls = loaders(toy, valid=toy, repeat_thr=0.9, repeat_how="ceil", group=False)
    dls.train.drop_last = False
    want = repeat_counts(repeat_factors(toy, 0.9), "ceil")
    assert want.max() > 1
    for got in passes(dls.train, 2):
        assert np.bincount(ids(got), minlength=len(toy)).tolist() == want.tolist()
    assert ids(passes(dls.valid)[0]) == list(range(len(toy)))
    assert "rare classes" in repr(dls)
    for kw, match in ((dict(repeat_thr=2), "share of the images"), (dict(repeat_how="ceil"), "repeat_thr"), (dict(repeat_thr=0.1, repeat_how="independent"), "equally long"), (dict(n_iters=0), "n_iters"), (dict(repeat_threshold=0.1), "repeat_thr")):
        with pytest.raises(ConfigError, match=match):
            loaders(toy, **kw)


def test_repeats_in_a_configuration(tmp_path):
    "What a file says about the data set reaches the loader"
    home = make_toy(tmp_path / "toy", n=12, valid_pct=0.25)
    dls = coco(home / "train.json", home / "valid.json", bs=2, num_workers=0, device="cpu", resize=48, group=False, repeat_thr=0.5, repeat_how="ceil", n_iters=3, verbose=False)
    t = dls.train
    assert (t.group, t.n_iters, len(t), t.sampler.how) == (False, 3, 3, "ceil") and len(passes(t)[0]) == 3
    from visdet.core.schema import catalogue, problems
    from visdet.core.tree import Source, to_node
    tell = lambda **kw: problems(to_node(dict(type="coco", train="t.json", **kw), Source("python")), catalogue(), root="dataset")
    assert not tell(group=False, repeat_thr=0.001, repeat_how="ceil", n_iters=100)
    assert tell(repeat_thr=2.0) and tell(repeat_how="up") and tell(n_iters=0) and tell(repeat=1)


def test_numbers_of_copies():
    assert numbered([3, 3, 1, 3, 1]).tolist() == [0, 1, 0, 2, 1]


def test_everything_together_resumes(toy):
    "Grouping, repeats and a stream, in the second of two processes, with workers: still the same batches"
    kw = dict(n_iters=4, repeat_thr=0.9, group=True, valid=toy)
    a = loaders(toy, **kw).train.new(ranks=(1, 2))
    want = passes(a, 2)[1]
    b = loaders(toy, num_workers=2, **kw).train.new(ranks=(1, 2))
    b.seek(1, 1)
    same(passes(b)[0], want[1:])


def test_an_empty_set_is_loud(toy):
    with pytest.raises(DataError):
        DetDL(RecordItems(toy.subset([])), bs=2, num_workers=0, shuffle=True, n_iters=4).one_batch()


def test_images_of_one_orientation_share_a_batch(tmp_path):
    "On files: sizes of the batches show that portrait and landscape images were not mixed"
    n, sizes = 12, []
    for i in range(n):
        h, w = (30, 60) if i % 2 else (60, 30)
        Image.fromarray(np.zeros((h, w, 3), np.uint8)).save(tmp_path / f"{i}.png")
        sizes.append((h, w))
    recs = Records.build([f"{i}.png" for i in range(n)], sizes, [[[1, 1, 20, 20]]] * n, [[0]] * n, ["a"], root=tmp_path)
    shapes = {k: {tuple(x.shape[2:]) for e in range(3) for x, _ in loaders(recs, valid=recs, aug=None, bs=3, resize=32, group=k).train} for k in (True, False)}
    assert shapes[True] == {(32, 64), (64, 32)} and (64, 64) in shapes[False]
