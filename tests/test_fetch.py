"""Remote bases over TLS: a server on the loopback interface, with a certificate authority made for the test"""
import hashlib, shutil, ssl, subprocess, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from visdet.core.basics import ConfigError
from visdet.core import fetch as module
from visdet.core.fetch import fetch, read_lock, write_lock

if not shutil.which('openssl'): pytest.skip('openssl makes the certificates', allow_module_level=True)

GOOD = b'type: retinanet\nbody: resnet50\n'
SHA = hashlib.sha256(GOOD).hexdigest()

class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    def log_message(self, *a): pass
    def send(self, status=200, body=b'', **headers):
        self.send_response(status)
        for k,v in ({'Content-Length': len(body)} | {k.replace('_', '-'): v for k,v in headers.items()}).items():
            if v is not None: self.send_header(k, v)
        self.end_headers(); self.wfile.write(body)

    def do_GET(self):
        p = self.path.split('?')[0]; self.server.seen.append(self.path)
        if p in ('/good.yaml', '/org/repo/resolve/v1/dir/a.yaml', '/org/repo/resolve/main/dir/a.yaml'): self.send(body=GOOD)
        elif p == '/changing.yaml': self.send(body=b'n: %d\n' % len(self.server.seen))
        elif p.startswith('/hops/'): n = int(p[6:]); self.send(302, Location=f'/hops/{n-1}' if n else '/good.yaml')
        elif p == '/loop': self.send(301, Location='/loop2')
        elif p == '/loop2': self.send(307, Location='/loop')
        elif p == '/self': self.send(302, Location='/self')
        elif p == '/many': self.send(302, Location=f'/many?{len(self.server.seen)}')
        elif p == '/down': self.send(302, Location='http://127.0.0.1:9/x.yaml')
        elif p == '/local': self.send(302, Location='file:///etc/passwd')
        elif p == '/secret': self.send(302, Location='https://user:hunter2@127.0.0.1/x.yaml')
        elif p == '/nowhere': self.send(302)
        elif p == '/announced': self.send(body=b'x', Content_Length=10**9)
        elif p == '/chunked': self.chunks(b'a'*4096, 10**6)
        elif p == '/slow': self.chunks(b'a', 10**6, .02)
        elif p == '/short': self.send(body=GOOD[:9], Content_Length=len(GOOD)); self.close_connection = True
        elif p == '/500': self.send(500, b'oh')
        elif p == '/empty': self.send(204)
        else: self.send(404, b'no')

    def chunks(self, data, n, pause=0):
        self.send_response(200); self.send_header('Transfer-Encoding', 'chunked'); self.end_headers()
        try:
            for _ in range(n): self.wfile.write(b'%x\r\n%s\r\n' % (len(data), data)); pause and time.sleep(pause)
        except OSError: self.close_connection = True

def openssl(cwd, *a): subprocess.run(['openssl', *a], cwd=cwd, check=True, capture_output=True)

@pytest.fixture(scope='session')
def certs(tmp_path_factory):
    "A certificate authority and a server's certificate signed by it"
    d = tmp_path_factory.mktemp('tls')
    openssl(d, 'req', '-x509', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1', '-nodes', '-keyout', 'ca.key', '-out', 'ca.pem', '-days', '2', '-subj', '/CN=visdet test authority', '-addext', 'keyUsage=critical,keyCertSign')
    openssl(d, 'req', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1', '-nodes', '-keyout', 'srv.key', '-out', 'srv.csr', '-subj', '/CN=127.0.0.1')
    (d/'ext').write_text('subjectAltName=IP:127.0.0.1\n')
    openssl(d, 'x509', '-req', '-in', 'srv.csr', '-CA', 'ca.pem', '-CAkey', 'ca.key', '-CAcreateserial', '-days', '2', '-extfile', 'ext', '-out', 'srv.pem')
    return d

@pytest.fixture
def web(certs, tmp_path, monkeypatch):
    "The address of a TLS server whose authority is trusted, with an empty cache"
    srv = ThreadingHTTPServer(('127.0.0.1', 0), Handler); srv.seen = []; srv.daemon_threads = True
    ctx = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER); ctx.load_cert_chain(certs/'srv.pem', certs/'srv.key')
    srv.socket = ctx.wrap_socket(srv.socket, server_side=True, do_handshake_on_connect=False)
    threading.Thread(target=srv.serve_forever, kwargs=dict(poll_interval=.02), daemon=True).start()
    for k in ('https_proxy', 'HTTPS_PROXY', 'all_proxy', 'ALL_PROXY'): monkeypatch.delenv(k, raising=False)
    monkeypatch.setenv('no_proxy', '127.0.0.1'); monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache')); monkeypatch.setenv('VISDET_CA_BUNDLE', str(certs/'ca.pem'))
    srv.url = f'https://127.0.0.1:{srv.server_port}'
    yield srv
    srv.shutdown(); srv.server_close()

def refused(match, *a, **kw):
    with pytest.raises(ConfigError, match=match) as e: fetch(*a, **kw)
    return str(e.value)

def cached(tmp_path): return sorted(p.name for p in (tmp_path/'cache').rglob('*') if p.is_file())

def test_fetched_once_then_from_the_cache(web, tmp_path):
    p = fetch(f'{web.url}/good.yaml', SHA)
    assert p.read_bytes() == GOOD and p == tmp_path/'cache/visdet/configs'/f'{SHA}.yaml' and len(web.seen) == 1
    assert fetch(f'{web.url}/good.yaml#sha256={SHA}') == fetch(f'{web.url}/good.yaml', lock={f'{web.url}/good.yaml': SHA}) == p
    assert fetch(f'{web.url}/elsewhere.yaml', SHA, offline=True) == p and len(web.seen) == 1
    assert cached(tmp_path) == [f'{SHA}.yaml']

def test_a_damaged_cache_is_fetched_anew(web):
    p = fetch(f'{web.url}/good.yaml', SHA); p.write_bytes(b'evil: true\n')
    refused('not in the cache', f'{web.url}/good.yaml', SHA, offline=True)
    assert fetch(f'{web.url}/good.yaml', SHA).read_bytes() == GOOD and len(web.seen) == 2

def test_no_digest_no_file(web, tmp_path):
    msg = refused('without a digest', f'{web.url}/good.yaml')
    assert 'visdet config lock' in msg and not web.seen
    refused('without a digest', f'{web.url}/good.yaml', lock={'https://other/x': SHA}); assert not web.seen
    assert cached(tmp_path) == []

def test_wrong_digest_is_not_kept(web, tmp_path):
    msg = refused('has sha256', f'{web.url}/good.yaml', '0'*64)
    assert SHA in msg and '0'*64 in msg and cached(tmp_path) == []

def test_pin_accepts_what_is_served_now(web):
    url = f'{web.url}/changing.yaml'; a, b = fetch(url, pin=True), fetch(url, pin=True)
    assert a != b and a.stem == hashlib.sha256(a.read_bytes()).hexdigest()
    refused('has sha256', url, '0'*64, pin=True)

def test_lock_round_trip_and_conflict(web, tmp_path):
    url = f'{web.url}/good.yaml'; lock = write_lock(tmp_path/'visdet.lock', {url: SHA})
    assert read_lock(lock) == {url: SHA} and fetch(url, lock=lock).read_bytes() == GOOD and fetch(url, lock=str(lock), offline=True)
    refused('the argument says sha256=00000000... but the lock says', url, '0'*64, lock=lock)

def test_redirects(web):
    assert fetch(f'{web.url}/hops/2', SHA).read_bytes() == GOOD and len(web.seen) == 4
    for path, why in (('hops/3', 'more than 3 redirects'), ('many', 'more than 3 redirects'), ('loop', 'in a circle'), ('self', 'in a circle'), ('nowhere', 'answers 302'),
                      ('down', 'redirected to http://127.0.0.1:9/x.yaml: only https'), ('local', 'only https is fetched, not file')):
        msg = refused(why, f'{web.url}/{path}', '1'*64); assert msg.startswith(f'{web.url}/{path}: ')
    assert 'hunter2' not in refused('user name or password', f'{web.url}/secret', '1'*64)
    refused('more than 0 redirects', f'{web.url}/hops/0', '1'*64, redirects=0)

def test_size_limits(web, tmp_path):
    refused('1,000,000,000 bytes, at most 524,288', f'{web.url}/announced', SHA)
    refused('more than 524,288 bytes', f'{web.url}/chunked', SHA)
    refused('at most 10 are fetched', f'{web.url}/good.yaml', SHA, max_bytes=10)
    assert fetch(f'{web.url}/good.yaml', SHA, max_bytes=len(GOOD)).read_bytes() == GOOD

def test_slow_short_and_failing_servers(web, tmp_path):
    refused('took too long', f'{web.url}/slow', SHA, timeout=.3)
    refused('cannot be fetched', f'{web.url}/short', SHA)
    refused('answers 404. Check the address', f'{web.url}/none', SHA); refused('answers 500', f'{web.url}/500', SHA); refused('answers 204', f'{web.url}/empty', SHA)
    assert cached(tmp_path) == []

def test_a_server_that_is_gone(web):
    web.shutdown(); web.server_close()
    refused('cannot be fetched', f'{web.url}/good.yaml', SHA, timeout=2)

def test_certificates_are_verified(web, certs, monkeypatch):
    monkeypatch.delenv('VISDET_CA_BUNDLE')
    refused('CERTIFICATE_VERIFY_FAILED', f'{web.url}/good.yaml', SHA); assert not web.seen
    refused('localhost|Hostname|hostname', f'{web.url}/good.yaml'.replace('127.0.0.1', 'localhost'), SHA, ca=str(certs/'ca.pem'), timeout=3)
    assert fetch(f'{web.url}/good.yaml', SHA, ca=str(certs/'ca.pem'))
    monkeypatch.setenv('VISDET_CA_BUNDLE', '/none.pem'); refused('VISDET_CA_BUNDLE', f'{web.url}/changing.yaml', pin=True)

def test_context_given_as_an_object(web, certs, monkeypatch):
    monkeypatch.delenv('VISDET_CA_BUNDLE'); assert fetch(f'{web.url}/good.yaml', SHA, ca=ssl.create_default_context(cafile=certs/'ca.pem'))

def test_hub_addresses(web, monkeypatch):
    monkeypatch.setenv('HF_ENDPOINT', web.url)
    assert fetch('hf://org/repo@v1/dir/a.yaml', SHA).read_bytes() == GOOD and web.seen == ['/org/repo/resolve/v1/dir/a.yaml']
    refused('names no revision', 'hf://org/repo/dir/a.yaml', SHA, offline=True)
    fetch('hf://org/repo/dir/a.yaml', lock={'hf://org/repo/dir/a.yaml': SHA}, offline=True)
    fetch('hf://org/repo@feature/x/dir/a.yaml'.replace('feature/x', 'v1'), pin=True)
    monkeypatch.setenv('HF_ENDPOINT', web.url.replace('https', 'http')); refused('only https', 'hf://org/repo@v1/dir/b.yaml', '2'*64)

@pytest.mark.parametrize('url', ['http://127.0.0.1/x.yaml', 'HTTP://h/x', 'file:///etc/passwd', 'ftp://h/x', '//h/x', 'x.yaml', '/etc/passwd', 'https://', 'https:///x', 'https://u@h/x', 'https://h/x\r\nHost: y', 'https://h/ x', 'https://h:99999/x', 'https://[::1/x', 'https://hé/x',
                                 'data:text/yaml,a', 'hf://', 'hf://a/b', 'hf://a/b@c', 'hf://a/b@c/../d', 'hf://a b/c@d/e', 'git+https://h/x', ''])
def test_other_addresses_are_refused_before_any_request(url, monkeypatch):
    monkeypatch.setattr(module, '_request', lambda *a, **k: pytest.fail('asked the network'))
    refused('.', url, '3'*64); refused('.', url, pin=True)
