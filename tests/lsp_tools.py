"A small client of the language server protocol (JSON-RPC over standard input and output): enough to ask a YAML server what an editor asks"
import json
import os
import queue
import re
import shutil
import subprocess
import threading
import time
from pathlib import Path

from conftest import ROOT

WAIT = float(os.environ.get("VISDET_LSP_WAIT", "60"))  # seconds to wait for any one answer
INSTALLED = ROOT / ".tools" / "node_modules" / ".bin" / "yaml-language-server"


def find_server():
    "Command line of the YAML language server, or None: VISDET_YAML_SERVER, the one `make editor` installs, or one on the path"
    named = os.environ.get("VISDET_YAML_SERVER", "")
    exe = named if named not in ("", "required") else str(INSTALLED) if INSTALLED.exists() else shutil.which("yaml-language-server")
    return [exe, "--stdio"] if exe and shutil.which("node") else None


class ServerError(Exception):
    "The server answered with an error, died, or did not answer in time"


class Client:
    "One running server; a context manager"

    def __init__(self, command, root, settings=None):
        self.root, self.settings, self.next_id, self.version = Path(root), settings or {}, 0, 0
        self.inbox, self.diagnostics, self.log = queue.Queue(), {}, []
        self.p = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=self.root)
        threading.Thread(target=self._read, daemon=True).start()
        threading.Thread(target=lambda: self.log.extend(self.p.stderr), daemon=True).start()

    # -- bytes ---------------------------------------------------------------------------------------
    def _read(self):
        "Split the server's output into messages"
        out = self.p.stdout
        while True:
            size = None
            while line := out.readline().strip():
                if line.lower().startswith(b"content-length:"):
                    size = int(line.split(b":")[1])
            if size is None:
                break
            self.inbox.put(json.loads(out.read(size)))
        self.inbox.put(None)  # end of file

    def _send(self, **message):
        body = json.dumps({"jsonrpc": "2.0", **message}).encode()
        try:
            self.p.stdin.write(b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
            self.p.stdin.flush()
        except OSError as e:
            raise ServerError(f"the server is gone ({e}): {self._stderr()}") from e

    def _stderr(self):
        time.sleep(0.1)
        return b"".join(self.log).decode(errors="replace")[-2000:]

    # -- messages ------------------------------------------------------------------------------------
    def _take(self, until):
        "Handle one message; returns it"
        try:
            m = self.inbox.get(timeout=max(until - time.monotonic(), 0.01))
        except queue.Empty:
            raise ServerError(f"no answer within {WAIT:g} s: {self._stderr()}") from None
        if m is None:
            raise ServerError(f"the server ended (code {self.p.poll()}): {self._stderr()}")
        if "method" in m and "id" in m:  # the server asks
            known = {"workspace/configuration": lambda p: [self.settings.get(o.get("section")) for o in p["items"]], "workspace/workspaceFolders": lambda p: self._folders()}
            self._send(id=m["id"], result=known.get(m["method"], lambda p: None)(m.get("params") or {}))
        elif m.get("method") == "textDocument/publishDiagnostics":
            p = m["params"]
            self.diagnostics[p["uri"]] = p["diagnostics"]
        return m

    def request(self, method, **params):
        "Ask and wait for the answer"
        self.next_id += 1
        me, until = self.next_id, time.monotonic() + WAIT
        self._send(id=me, method=method, params=params)
        while True:
            m = self._take(until)
            if m.get("id") == me and "method" not in m:
                if "error" in m:
                    raise ServerError(f"{method}: {m['error']}")
                return m.get("result")

    def notify(self, method, **params):
        self._send(method=method, params=params)

    def _folders(self):
        return [{"uri": self.root.as_uri(), "name": self.root.name}]

    def __enter__(self):
        completion = {"completionItem": {"snippetSupport": True, "documentationFormat": ["markdown", "plaintext"]}}
        caps = {"textDocument": {"completion": completion, "hover": {"contentFormat": ["markdown", "plaintext"]}, "publishDiagnostics": {"relatedInformation": True}}, "workspace": {"configuration": True, "workspaceFolders": True}}
        self.about = self.request("initialize", processId=os.getpid(), rootUri=self.root.as_uri(), workspaceFolders=self._folders(), capabilities=caps)
        self.notify("initialized")
        self.notify("workspace/didChangeConfiguration", settings=self.settings)
        return self

    def __exit__(self, *_):
        try:
            self.request("shutdown")
            self.notify("exit")
            self.p.wait(5)
        except (ServerError, subprocess.TimeoutExpired):
            pass
        finally:
            self.p.kill()
            self.p.wait()

    # -- what an editor does -------------------------------------------------------------------------
    def open(self, path, text=None):
        "Show the server a file, or an unsaved one beside it that holds `text`; returns its URI"
        path, self.version = Path(path), self.version + 1
        if text is None:
            text = path.read_text(encoding="utf-8")
        else:  # a name of its own for each text: what the server says of it cannot be meant for an earlier one
            path = path.with_name(f"{path.stem}-{self.version}{path.suffix}")
        self.notify("textDocument/didOpen", textDocument={"uri": path.as_uri(), "languageId": "yaml", "version": self.version, "text": text})
        return path.as_uri()

    def problems(self, path, text=None):
        "Diagnostics of a file, or of an unsaved one beside it: (line from 1, text underlined, message), sorted"
        return self.diagnosed(self.open(path, text), Path(path).read_text(encoding="utf-8") if text is None else text)

    def diagnosed(self, uri, text):
        "Diagnostics of an open file, once they are there"
        until, lines = time.monotonic() + WAIT, text.splitlines()
        while uri not in self.diagnostics:
            self._take(until)
        cut = lambda r: lines[r["start"]["line"]][r["start"]["character"] : r["end"]["character"] if r["end"]["line"] == r["start"]["line"] else None]
        return sorted((d["range"]["start"]["line"] + 1, cut(d["range"]), d["message"]) for d in self.diagnostics[uri])

    def complete(self, path, text):
        "Completions at the mark `|` of `text`: {label: item}"
        uri, pos = self._at(path, text)
        got = self.request("textDocument/completion", textDocument={"uri": uri}, position=pos) or []
        return {o["label"]: o for o in (got["items"] if isinstance(got, dict) else got)}

    def hover(self, path, text):
        "What the editor shows at the mark `|`, as plain text"
        uri, pos = self._at(path, text)
        got = self.request("textDocument/hover", textDocument={"uri": uri}, position=pos)
        what = (got or {}).get("contents", "")
        what = what.get("value", "") if isinstance(what, dict) else "\n".join(map(str, what)) if isinstance(what, list) else what
        return re.sub(r"\\([^\w\s])", r"\1", what.replace("&nbsp;", " "))

    def _at(self, path, text):
        "Open `text` without its mark; where the mark was"
        assert text.count("|") == 1, "one mark `|` says where the cursor is"
        before, after = text.split("|")
        return self.open(path, before + after), {"line": before.count("\n"), "character": len(before.rsplit("\n", 1)[-1])}
