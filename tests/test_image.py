"Images of every kind, whole and damaged, against Pillow; resizing against its formula"
import io
import threading

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image, ImageOps
from visdet.core.basics import ConfigError, DataError
from visdet.cv.image import diff_hash, image_hash, image_size, read_image, resize_image

rng = np.random.default_rng(0)
PHOTO = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)).resize((61, 43), Image.BICUBIC)


def encode(im, fmt, **kw):
    f = io.BytesIO()
    im.save(f, fmt, **kw)
    return f.getvalue()


@pytest.mark.parametrize("turn", range(0, 10))
@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_orientation(fmt, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    data = encode(PHOTO, fmt, exif=exif)
    want = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    img = read_image(data)
    assert (img == want).all() and img.shape[:2] == image_size(data) and img.flags.c_contiguous and img.flags.writeable
    assert (read_image(data, channels=1).shape) == (*image_size(data), 1)


@pytest.mark.parametrize("mode,fmt", [("1", "PNG"), ("L", "JPEG"), ("L", "PNG"), ("LA", "PNG"), ("P", "GIF"), ("P", "PNG"), ("RGB", "BMP"), ("RGB", "JPEG"),
                                      ("RGBA", "PNG"), ("RGBA", "WEBP"), ("CMYK", "JPEG"), ("CMYK", "TIFF"), ("YCbCr", "TIFF"), ("LAB", "TIFF"), ("I;16", "PNG"), ("I", "TIFF")])
def test_modes(mode, fmt):
    im = Image.fromarray(np.asarray(PHOTO.convert("L")).astype(np.uint16) * 257) if mode == "I;16" else PHOTO.convert(mode) if mode != "I" else PHOTO.convert("L").convert("I")
    data = encode(im, fmt)
    for c in (1, 3):
        img = read_image(data, channels=c)
        assert img.shape == (43, 61, c) and img.dtype == np.uint8 and img.flags.c_contiguous
    if mode == "I;16":
        assert (read_image(data)[..., 1] == np.asarray(PHOTO.convert("L"))).all()
    elif mode in ("1", "L", "P", "RGB", "CMYK"):
        assert (read_image(data) == np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))).all()


@given(st.lists(st.integers(0, 65535), min_size=1, max_size=50))
@settings(max_examples=50, deadline=None)
def test_sixteen_bits_keep_order(v):
    a = np.array([v], np.uint16)
    img = read_image(encode(Image.fromarray(a), "PNG"))
    assert (img[0, :, 0] == np.round(a[0] / 257)).all()


def test_transparency_hides_what_lies_beneath():
    a = np.full((4, 6, 4), 200, np.uint8)
    a[:, :3, 3], a[:, 3:, 3] = 0, 128
    img = read_image(encode(Image.fromarray(a), "PNG"), over=40)
    assert (img[:, :3] == 40).all() and abs(int(img[0, 5, 0]) - (200 * 128 + 40 * 127) / 255) <= 1
    p = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6)).convert("P")
    assert (read_image(encode(p, "PNG", transparency=5), over=255)[0, 5] == 255).all()


@pytest.mark.parametrize("cut", [0, 1, 3, 20, 200, .5, .9, -2])
@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "BMP", "GIF"])
def test_cut_files(tmp_path, fmt, cut):
    data = encode(PHOTO, fmt)
    cut = int(len(data) * cut) if isinstance(cut, float) else cut
    p = tmp_path / f"cut_{cut}.{fmt.lower()}"
    p.write_bytes(data[:cut])
    if fmt in ("PNG", "GIF") and cut == -2:
        assert read_image(p).shape == (43, 61, 3)  # the pixels are all there; only the end mark is cut
        return
    with pytest.raises(DataError, match=p.name):
        read_image(p)


def test_other_failures(tmp_path):
    for name, match in (("nothing.jpg", "no such image"), ("", "folder")):
        for f in (read_image, image_size, image_hash):
            with pytest.raises(DataError, match=match):
                f(tmp_path / name)
    (tmp_path / "a.txt").write_text("hello, this is no picture")
    for f in (read_image, image_size):
        with pytest.raises(DataError, match="a.txt.*known format"):
            f(tmp_path / "a.txt")
    with pytest.raises(DataError, match="floating point"):
        read_image(encode(Image.fromarray(np.ones((3, 3), np.float32)), "TIFF"))
    with pytest.raises(DataError, match="do not fit"):
        read_image(encode(Image.fromarray(np.full((3, 3), 70000, np.int32)), "TIFF"))
    with pytest.raises(ConfigError):
        read_image(tmp_path / "a.txt", channels=2)


def test_suspiciously_large(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match="MAX_IMAGE_PIXELS"):
        read_image(encode(PHOTO.resize((100, 100)), "PNG"))


@pytest.mark.parametrize("turn", [1, 6])
def test_reduced_decoding_keeps_the_order_of_height_and_width(turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    data = encode(PHOTO.resize((64, 160) if turn == 6 else (160, 64)), "JPEG", exif=exif)
    assert image_size(data) == (64, 160)
    for ask, want in (((32, 40), (32, 80)), ((16, 40), (16, 40)), ((8, 40), (16, 40)), ((33, 20), (64, 160)), ((4, 81), (64, 160))):
        assert read_image(data, at_least=ask).shape == (*want, 3)


def test_same_bytes_without_torchvision(monkeypatch):
    for mode in ("RGB", "L", "CMYK"):
        data = encode(PHOTO.convert(mode), "JPEG")
        fast = read_image(data)
        with monkeypatch.context() as m:
            m.setattr("visdet.cv.image.decode_jpeg", None)
            assert (read_image(data) == fast).all()


def test_reading_in_threads():
    data, out = encode(PHOTO, "JPEG"), []
    ts = [threading.Thread(target=lambda: out.append(image_hash(data))) for _ in range(8)]
    [t.start() for t in ts], [t.join() for t in ts]
    assert len(out) == 8 and len(set(out)) == 1


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 60), st.integers(1, 60), st.sampled_from([1, 3, 4]))
@settings(max_examples=100, deadline=None)
def test_resize_like_pillow(h, w, nh, nw, c):
    a = np.random.default_rng(h * w).integers(0, 256, (h, w, c), dtype=np.uint8)
    out = resize_image(a, (nh, nw))
    chans = [np.asarray(Image.fromarray(np.ascontiguousarray(a[..., k])).resize((nw, nh), Image.BILINEAR)) for k in range(c)]
    assert out.shape == (nh, nw, c) and np.abs(out.astype(int) - np.stack(chans, -1)).max() <= 1
    near = resize_image(a, (nh, nw), "nearest")
    ys, xs = (np.minimum((np.arange(n) + .5) * (k / n), k - 1).astype(int) for n, k in ((nh, h), (nw, w)))
    exact = np.abs((np.arange(nh) + .5) * h / nh % 1) > 1e-3
    exact_x = np.abs((np.arange(nw) + .5) * w / nw % 1) > 1e-3
    assert (near[exact][:, exact_x] == a[ys[exact]][:, xs[exact_x]]).all()


def test_resize_of_views_and_read_only():
    a = np.asarray(PHOTO)
    for v in (a, a[::-1], a[:, ::2], np.asfortranarray(a)):
        assert (resize_image(v, (20, 30)) == resize_image(np.array(v, order="C"), (20, 30))).all()


def test_real_images(real_data):
    files = sorted((real_data / "coco_mini/val2017").glob("*.jpg"))[:60] + sorted((real_data / "bccd").rglob("*.jpg"))[:5]
    hashes = {}
    for f in files:
        img = read_image(f)
        assert (img == np.asarray(Image.open(f).convert("RGB"))).all() and img.shape[:2] == image_size(f)
        h, w = img.shape[:2]
        small = read_image(f, at_least=(h // 2, w // 2))
        assert small.shape[0] >= h // 2 and small.shape[1] >= w // 2
        again = encode(Image.fromarray(resize_image(img, (h * 2 // 3, w * 2 // 3))), "JPEG", quality=70)
        assert (diff_hash(img) ^ diff_hash(again)).bit_count() <= 4, f
        hashes[f] = diff_hash(img)
    bits = np.array([[(a ^ b).bit_count() for b in hashes.values()] for a in list(hashes.values())[:60]])
    assert np.median(bits[np.triu_indices(60, 1)]) > 24
