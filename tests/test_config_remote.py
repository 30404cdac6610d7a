"""Remote bases, from the file that names them to the finished tree, over TLS on the loopback interface"""
import hashlib

import pytest
import test_fetch
from test_fetch import certs, web  # noqa: F401  fixtures

from visdet.core.bases import load_tree, lock_bases
from visdet.core.basics import ConfigError
from visdet.core.fetch import read_lock
from visdet.core.tree import find


def sha(text):
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture
def pages(web, monkeypatch):  # noqa: F811
    "Path -> text that the server sends; may be changed at any time"
    res = {}

    def do_GET(self):
        self.server.seen.append(self.path)
        self.send(200 if self.path in res else 404, res.get(self.path, "no").encode())

    monkeypatch.setattr(test_fetch.Handler, "do_GET", do_GET)
    return res


@pytest.fixture
def run(tmp_path):
    def _run(text):
        p = tmp_path / "run.yaml"
        p.write_text(text)
        return p

    return _run


def test_a_digest_in_the_address(web, pages, run):  # noqa: F811
    pages["/a.yaml"] = "epochs: 4\nmodel: {type: m, w: '${epochs}'}\n"
    top = run(f"_base_: '{web.url}/a.yaml#sha256={sha(pages['/a.yaml'])}'\nepochs: 1\n")
    node, files = load_tree(top)
    assert node.plain() == dict(epochs=1, model=dict(type="m", w="${epochs}"))
    assert str(find(node, "model.type").source) == f"{web.url}/a.yaml#sha256={sha(pages['/a.yaml'])[:8]}:2:15"
    assert [(o.kind, o.digest) for o in files][1] == ("url", sha(pages["/a.yaml"])) and files[0].bases == [("", f"{web.url}/a.yaml")]
    n = len(web.seen)
    pages.clear()
    assert load_tree(top, offline=True)[0].plain() == node.plain() and len(web.seen) == n


def test_without_digest_or_lock_nothing_is_fetched(web, pages, run):  # noqa: F811
    pages["/a.yaml"] = "epochs: 4\n"
    with pytest.raises(ConfigError, match="run.yaml:1:9.*without a digest"):
        load_tree(run(f"_base_: {web.url}/a.yaml\n"))
    assert web.seen == []
    with pytest.raises(ConfigError, match="has sha256="):
        load_tree(run(f"_base_: '{web.url}/a.yaml#sha256={'0' * 64}'\n"))
    with pytest.raises(ConfigError, match="switched off"):
        load_tree(run(f"_base_: '{web.url}/a.yaml#sha256={sha('other')}'\n"), offline=True)


def test_lock_then_load_then_change(web, pages, run):  # noqa: F811
    pages["/c/a.yaml"] = "_base_: [b.yaml, ../d.yaml]\nepochs: 4\n"
    pages["/c/b.yaml"], pages["/d.yaml"] = "seed: 5\n", "seed: 6\nx: 1\n"
    top = run(f"_base_: {web.url}/c/a.yaml\nmodel: {{_base_: '{web.url}/c/b.yaml'}}\n")
    lock = lock_bases(top)
    assert lock.name == "visdet.lock" and read_lock(lock) == {f"{web.url}{k}": sha(v) for k, v in pages.items()}
    node, files = load_tree(top)
    assert node.plain() == dict(seed=6, x=1, epochs=4, model=dict(_delete_=True, seed=5)) and len(files) == 4
    pages["/d.yaml"] = "seed: 7\n"
    assert load_tree(top)[0].plain() == node.plain()  # the cache has what was pinned
    for p in (lock.parent / "cache").rglob("*.yaml"):
        p.unlink()
    with pytest.raises(ConfigError, match="d.yaml.*has sha256="):
        load_tree(top)
    lock_bases(top)
    assert load_tree(top)[0].plain()["seed"] == 7


def test_a_remote_file_reaches_no_local_one(web, pages, run, tmp_path):  # noqa: F811
    (tmp_path / "local.yaml").write_text("epochs: 9\n")
    for evil in (tmp_path / "local.yaml", "/etc/passwd", "~/x.yaml", "file:///etc/passwd", "http://127.0.0.1/b.yaml", "C:\\x.yaml", "local.yaml"):
        pages["/a.yaml"] = f"_base_: '{evil}'\n"
        with pytest.raises(ConfigError):
            lock_bases(run(f"_base_: {web.url}/a.yaml\n"))
    pages["/a.yaml"] = "model: ${env:HOME}\n"
    from visdet.core.merge import substitute

    with pytest.raises(ConfigError, match="remote file may not read the environment"):
        substitute(load_tree(run(f"_base_: '{web.url}/a.yaml#sha256={sha(pages['/a.yaml'])}'\n"))[0])


def test_remote_circles_and_remote_bombs_end(web, pages, run):  # noqa: F811
    pages["/a.yaml"], pages["/b.yaml"] = "_base_: b.yaml\n", "_base_: a.yaml\n"
    with pytest.raises(ConfigError, match="its own base.*->.*->"):
        lock_bases(run(f"_base_: {web.url}/a.yaml\n"))
    for i in range(40):
        pages[f"/c{i}.yaml"] = f"_base_: c{i + 1}.yaml\n"
    with pytest.raises(ConfigError, match="more than 32 files"):
        lock_bases(run(f"_base_: {web.url}/c0.yaml\n"))
    assert not (run("").parent / "visdet.lock").exists()
