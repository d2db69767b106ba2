"""A checkpoint goes to the hub and comes back, by huggingface_hub over HTTP; the hub is a small server here."""

import base64
import copy
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
import torch
from models import IDS, bert, mlp, moved, same

from hsaid_kernels import HSAID
from hsaid_kernels.app import cli


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's API that creating, committing to, and reading a repository of small files takes."""

    protocol_version = "HTTP/1.1"
    files: dict[str, dict[str, bytes]] = {}
    seen: list[tuple[str, str | None]] = []

    def answer(self, body: object = None, status: int = 200, raw: bytes | None = None, **headers: str) -> None:
        data = raw if raw is not None else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.seen.append((self.path, self.headers.get("Authorization")))
        if self.path == "/api/repos/create":
            asked = json.loads(data)
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            status = 409 if repo in self.files else 200
            self.files.setdefault(repo, {})
            return self.answer({"url": f"http://{self.headers['Host']}/{repo}", "name": repo, "id": repo}, status)
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        repo, _, action = self.path.removeprefix("/api/models/").partition("/main")[0].rpartition("/")
        if action == "preupload":
            asked = json.loads(data)["files"]
            return self.answer(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]}
            )
        if action == "commit":
            for line in map(json.loads, data.splitlines()):
                if line["key"] == "file":
                    self.files[repo][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            commit = f"http://{self.headers['Host']}/{repo}/commit/1"
            return self.answer({"commitUrl": commit, "commitOid": "1" * 40, "success": True})
        return self.answer({}, 404)

    def do_GET(self) -> None:
        self.seen.append((self.path, self.headers.get("Authorization")))
        path = self.path.split("?")[0]
        if path.startswith("/api/models/"):
            repo = "/".join(path.split("/")[3:5])
            if repo not in self.files:
                return self.answer({}, 404, X_Error_Code="RepoNotFound")
            if "/tree/" in path:
                return self.answer(
                    [
                        {"path": n, "type": "file", "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                        for n, d in self.files[repo].items()
                    ]
                )
            siblings = [{"rfilename": name} for name in self.files[repo]]
            return self.answer({"id": repo, "sha": "1" * 40, "siblings": siblings})
        repo, _, name = path[1:].partition("/resolve/")
        data = self.files.get(repo, {}).get(name.partition("/")[2])
        if data is None:
            return self.answer({}, 404, X_Error_Code="EntryNotFound")
        etag = hashlib.sha1(data).hexdigest()
        return self.answer(raw=data, ETag=f'"{etag}"', X_Repo_Commit="1" * 40)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    Hub.files, Hub.seen = {}, []
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield Hub
    server.shutdown()
    server.server_close()


def test_a_few_kilobytes_go_to_the_hub_and_come_back(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where there is no folder "me/task"
    model = bert().eval()
    model.config._name_or_path = "bert-base-multilingual-cased"
    plain = copy.deepcopy(model)
    hsaid = moved(HSAID(model, 60, task="names", train_fully="classifier"))
    address = hsaid.push_to_hub("me/task", token="hf_secret", private=True)
    assert address.startswith("http") and ("/api/repos/create", "Bearer hf_secret") in hub.seen
    files = hub.files["me/task"]
    assert set(files) == {"README.md", "hsaid.safetensors", "hsaid_config.json"}
    assert sum(map(len, files.values())) < 12_000  # not the model's weights
    card = files["README.md"].decode()
    for part in (
        "base_model: bert-base-multilingual-cased",
        "library_name: hsaid_kernels",
        "| task | names |",
        "| intrinsic dimension d | 60 |",
        "`L1+L2|L3|L4`",
        f"a file of {len(files['hsaid.safetensors']):,} bytes",
        'model = BertForSequenceClassification.from_pretrained("bert-base-multilingual-cased")',
        'hsaid = HSAID.from_pretrained("me/task", model)',
    ):
        assert part in card
    assert huggingface_hub.ModelCard(card).data.to_dict()["tags"] == ["hsaid"]
    loaded = HSAID.from_pretrained("me/task", plain, token="hf_secret")
    assert loaded.task == "names" and same(loaded.weights(), hsaid.weights())
    assert torch.equal(loaded(IDS).logits, hsaid(IDS).logits)
    hsaid.push_to_hub("me/task")  # again, into the repository that is there
    other = HSAID(copy.deepcopy(plain), 60, task="mine", train_fully="classifier")
    assert other.load_task("me/task") == "names" and same(other.weights(), hsaid.weights())


def test_what_is_not_on_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        FileNotFoundError, match="expected one with a checkpoint, or a repository of the hub, got 'me/none'"
    ):
        HSAID.from_pretrained("me/none", mlp())
    hub.files["me/empty"] = {}
    with pytest.raises(FileNotFoundError, match="expected one with a checkpoint, got no file"):
        HSAID.from_pretrained("me/empty", mlp())
    asked = len(hub.seen)
    for directory in (tmp_path / "none", "./none", "none", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="expected one with a checkpoint, got no file"):
            HSAID.from_pretrained(directory, mlp())
    (tmp_path / "me" / "none").mkdir(parents=True)  # a folder goes first
    with pytest.raises(FileNotFoundError, match="got no file 'me/none/hsaid.safetensors'"):
        HSAID.from_pretrained("me/none", mlp())
    assert len(hub.seen) == asked


def test_the_card_of_a_model_without_a_name(hub):
    HSAID(mlp(), 24).push_to_hub("task")
    (repo,) = hub.files
    card = hub.files[repo]["README.md"].decode()
    assert "base_model" not in card and "model = ...  # the Sequential that was trained" in card


def test_a_merged_model_goes_to_the_hub(hub, tmp_path, monkeypatch, capsys):
    """Checkpoint and model are there too; `hsaid merge` fetches the files that it needs."""
    monkeypatch.chdir(tmp_path)
    model = bert().eval()
    plain = copy.deepcopy(model)
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "vocab.txt").write_text("words")
    hub.files["me/base"] = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    hub.files["me/base"] |= {"pytorch_model.bin": b"of W0", "onnx/model.onnx": b"of W0"}
    hsaid = moved(HSAID(plain, 60))
    hsaid.push_to_hub("me/task")
    arguments = ["merge", "me/task", "--model", "me/base", "--to", "hub:me/merged"]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("uploaded     http")
    files = hub.files["me/merged"]
    assert set(files) == {"README.md", "config.json", "model.safetensors", "vocab.txt"}
    assert huggingface_hub.ModelCard(files["README.md"].decode()).data.to_dict()["base_model"] == "me/base"
    assert not any("pytorch_model.bin" in path or "onnx" in path for path, _ in hub.seen if "resolve" in path)
    merged = type(model).from_pretrained("me/merged").eval()
    assert torch.equal(merged(IDS).logits, hsaid(IDS).logits)
    assert cli.main([*arguments, "-o", str(tmp_path / "out")]) == 0  # both
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == files
