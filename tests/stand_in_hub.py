"""A stand-in for the Hub over HTTP: what huggingface_hub asks of it to create, upload to and read a repository."""

from __future__ import annotations

import base64
import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

TOKEN = "hf_" + "stand1in" * 4
COMMIT = "c" * 40


class StandIn(ThreadingHTTPServer):
    """`repositories`: name -> {file: bytes}; `puts` counts uploads of large files; `cut` drops that many commits."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.tags: dict[str, list[str]] = {}
        self.stored: dict[str, bytes] = {}
        self.created: list[dict] = []
        self.puts, self.cut = 0, 0

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: StandIn

    def log_message(self, *args):
        pass

    def answer(self, status: int, value: object = b"", **headers: str) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for key, text in headers.items():
            self.send_header(key.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        out = b""
        while size := int(self.rfile.readline(), 16):
            out += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return out

    def do_POST(self):
        body, path = self.body(), unquote(self.path.partition("?")[0])
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid credentials"}, X_Error_Message="Invalid credentials")
        name = "/".join(path.strip("/").removeprefix("api/models/").removeprefix("api/datasets/").split("/")[:2])
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path.endswith("/preupload/main"):
            files = [{"path": f["path"], "shouldIgnore": False, "oid": None,
                      "uploadMode": "lfs" if f["path"].endswith((".safetensors", ".parquet")) else "regular"}
                     for f in json.loads(body)["files"]]  # fmt: skip
            return self.answer(200, {"files": files})
        if path.endswith("/info/lfs/objects/batch"):
            return self.batch(json.loads(body))
        if path.endswith("/commit/main"):
            return self.commit(name, body)
        return self.answer(404, {"error": path})

    def create(self, asked: dict) -> None:
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        if name.startswith("someone-else/"):
            return self.answer(403, {"error": "forbidden"}, X_Error_Message="You don't have the rights to create here")
        if name in self.server.repositories:
            return self.answer(409, {"error": "You already created this model repo"})
        self.server.created.append(asked)
        self.server.repositories[name] = {".gitattributes": b""}
        kind = "datasets/" if asked.get("type") == "dataset" else ""
        return self.answer(200, {"url": f"{self.server.endpoint}/{kind}{name}", "name": name})

    def batch(self, asked: dict) -> None:
        objects = []
        for one in asked["objects"]:
            actions = {"upload": {"href": f"{self.server.endpoint}/put/{one['oid']}", "header": {}}}
            objects.append({**one, **({} if one["oid"] in self.server.stored else {"actions": actions})})
        self.answer(200, {"transfer": "basic", "objects": objects})

    def commit(self, name: str, body: bytes) -> None:
        if self.server.cut:
            self.server.cut -= 1
            self.close_connection = True
            return self.connection.close()
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.server.repositories[name][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.repositories[name][value["path"]] = self.server.stored[value["oid"]]
        self.server.tags[name] = ["lowdft"]
        url = f"{self.server.endpoint}/{name}/commit/{COMMIT}"
        self.answer(200, {"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})

    def do_PUT(self):
        data = self.body()
        self.server.puts += 1
        self.server.stored[hashlib.sha256(data).hexdigest()] = data
        self.answer(200)

    def do_GET(self):
        path = unquote(self.path.partition("?")[0]).strip("/")
        if path.startswith("api/"):
            name = "/".join(path.split("/")[2:4])
            if name not in self.server.repositories:
                return self.answer(404, {"error": "not found"}, X_Error_Code="RepoNotFound")
            files = [{"rfilename": file} for file in self.server.repositories[name]]
            told = {"id": name, "siblings": files, "tags": self.server.tags.get(name, []), "sha": COMMIT}
            return self.answer(200, told)
        path = path.removeprefix("datasets/")
        owner, repository, _, _, file = path.split("/", 4)
        data = self.server.repositories[f"{owner}/{repository}"][file]
        return self.answer(200, data, X_Repo_Commit=COMMIT, ETag=f'"{hashlib.sha1(data).hexdigest()}"')

    do_HEAD = do_GET
