"""A stand-in of the Hugging Face Hub: what its real client needs to make, fill and read a repository."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

TOKEN = "hf_stand_in"
PATH = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(/(?P<verb>tree|preupload|commit|branch|revision)/(?P<rev>.+))?")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def reply(self, status: int, body: Any = b"", **headers: object) -> None:
        held = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"content-length": len(held), **headers}.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(held)

    def do_POST(self) -> None:
        state: Any = self.server.state  # type: ignore[attr-defined]
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        state.asked.append((self.command, self.path))
        if self.headers.get("authorization") != f"Bearer {TOKEN}":
            self.reply(401, {"error": "Invalid credentials in Authorization header"})
        elif self.path == "/api/repos/create":
            name = f"{json.loads(body)['organization']}/{json.loads(body)['name']}"
            new = name not in state.repos
            state.repos.setdefault(name, {"main": ("0" * 40, {})})
            self.reply(200 if new else 409, {"url": f"{state.url}/{name}"})
        elif self.path == "/api/validate-yaml":  # of the card
            self.reply(200, {"errors": [], "warnings": []})
        elif not (found := PATH.fullmatch(unquote(urlsplit(self.path).path))):
            self.reply(404)
        else:
            branches, rev = state.repos[found["repo"]], found["rev"]
            if found["verb"] == "preupload":
                rows = [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in json.loads(body)["files"]
                ]
                self.reply(200, {"files": rows})
            elif found["verb"] == "branch":
                branches.setdefault(rev, branches["main"])
                self.reply(200, {})
            else:
                files = dict(branches[rev][1])
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                    elif line["key"] == "deletedFile":
                        del files[line["value"]["path"]]
                commit = hashlib.sha1(body).hexdigest()
                branches[rev] = branches[commit] = (commit, files)
                url = f"{state.url}/{found['repo']}/commit/{commit}"
                self.reply(200, {"commitUrl": url, "commitOid": commit, "success": True})

    def do_GET(self) -> None:
        state: Any = self.server.state  # type: ignore[attr-defined]
        path = unquote(urlsplit(self.path).path)
        state.asked.append((self.command, path))
        if path == "/":
            self.reply(200)
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            commit, files = state.repos[found[1]][found[2]]
            self.send_file(state, found[3], files[found[3]], commit)
        elif (found := PATH.fullmatch(path)) and found["repo"] in state.repos:
            branches, rev = state.repos[found["repo"]], found["rev"] or "main"
            if rev not in branches:
                self.reply(404, {"error": "Invalid rev id"}, x_error_code="RevisionNotFound")
                return
            commit, files = branches[rev]
            if found["verb"] == "tree":
                ids = {name: hashlib.sha1(content).hexdigest() for name, content in files.items()}
                self.reply(200, [{"type": "file", "path": n, "size": len(files[n]), "oid": ids[n]} for n in files])
            else:
                rows = [{"rfilename": name, "size": state.sizes.get(name, len(files[name]))} for name in files]
                self.reply(200, {"id": found["repo"], "sha": commit, "siblings": rows})
        else:
            self.reply(404, {"error": "Repository not found"}, x_error_code="RepoNotFound")

    do_HEAD = do_GET

    def send_file(self, state: Any, name: str, content: bytes, commit: str) -> None:
        about = {"etag": f'"{hashlib.sha1(content).hexdigest()}"', "x_repo_commit": commit, "accept_ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("range") or "")
        if asked:
            start = int(asked[1])
            state.asked.append(("RANGE", name))
            span = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self.reply(206, content[start:], content_range=span, **about)
        elif self.command == "GET" and name in state.breaks:
            self.send_response(200)
            for key, value in {"content-length": len(content), **about}.items():
                self.send_header(key.replace("_", "-"), str(value))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
        else:
            self.reply(200, content, **about)


@contextmanager
def standing_in() -> Iterator[SimpleNamespace]:
    """The Hub, for the time being, to which this process' client is logged in.

    `repos` holds {OWNER/NAME: {branch or commit: (commit, {path: bytes})}}, `asked` what was asked, `sizes` those that
    it tells in place of the true ones, `breaks` the files of which a half comes unless the rest is asked for.
    """
    from huggingface_hub import constants, utils

    from lora_lexicon.resources import hub_answers

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state = SimpleNamespace(url=f"http://127.0.0.1:{server.server_port}", repos={}, asked=[], sizes={}, breaks=set())
    server.state = state  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", TOKEN)
        patch.setattr(constants, "ENDPOINT", state.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", state.url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        hub_answers.cache_clear()
        utils.disable_progress_bars()
        try:
            yield state
        finally:
            hub_answers.cache_clear()
            server.shutdown()
            server.server_close()
