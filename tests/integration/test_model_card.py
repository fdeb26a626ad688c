"""The model card of a run, and publishing to a local hub."""

import base64
import json
import os
import re
import subprocess
import threading
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

import model_slimming
from slim_utils.masks import read_pruning
from tests.processes import run_python
from tests.tiny_models import make_tiny

ROOT = Path(__file__).resolve().parents[2]
BASE_CARD = "---\nlicense: other\nlicense_name: tiny\nlanguage: en\nbase_model: someone/tiny-base\n---\n# Tiny\n"


@pytest.fixture
def argv(tmp_path, tokenizer, text_file) -> list:
    """Arguments of a run on a model with a card and a licence."""
    base = tmp_path / "tiny-model"
    make_tiny("gqa").save_pretrained(base)
    tokenizer.save_pretrained(base)
    (base / "README.md").write_text(BASE_CARD)
    (base / "LICENSE.txt").write_text("the licence")
    flags = ["--num_samples", 8, "--seqlen", 32, "--sparsity", 0.4, "--save_pruned_weights", "--save_dir"]
    return [base, "--data_file", text_file, "--device", "cpu", *flags, tmp_path / "out"]


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    """Run the script in a new process."""
    return run_python("model_slimming.py", *arguments, env=os.environ | environment)


def main(*arguments: object) -> None:
    """Run the script in this process."""
    model_slimming.main(model_slimming.build_parser().parse_args(list(map(str, arguments))))


def test_model_card_of_a_pruning_run_has_its_settings(argv, text_file, tmp_path):
    main(*argv, "--eval_datasets", f"test={text_file}", "--eval_seqlens", 16)
    folder = tmp_path / "out" / "pruned_weights"
    card = ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.license_name, card.data.language) == ("other", "tiny", "en")
    # The base is a folder, not a model on the hub.
    assert (card.data.base_model, card.data.library_name) == (None, "transformers")
    assert (folder / "LICENSE.txt").read_text() == "the licence"
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    parameters = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(folder).parameters())
    assert record["sizes"]["parameters_pruned"] == parameters
    assert f"| parameters | {record['sizes']['parameters_dense']:,} | {parameters:,} |" in card.content
    assert f"without {100 * record['sizes']['block_share_removed']:.1f} % of the weights" in card.content
    for index, mask in enumerate(read_pruning(tmp_path / "out" / "pruning.json")):
        line = f"| {index} | {len(mask.kept_heads)} of 6 | 2 of 2 | {len(mask.kept_columns)} of 40 |"
        assert line in card.content
    assert f"| test | 16 | text | {record['perplexity'][0]['perplexity']:.2f} |" in card.content
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.metric_type) == ("test", "perplexity")
    assert card.data.model_name == "tiny-model, pruned"
    assert result.metric_value == pytest.approx(record["perplexity"][0]["perplexity"], abs=1e-4)
    assert record["calibration"]["samples_sha256"] in card.content
    # No local paths.
    assert str(tmp_path) not in card.content and str(text_file.parent) not in card.content
    for command in (
        "trust_remote_code=True",
        "vllm serve DIR --model-impl transformers",
        "pip install ./serving/vllm_slim\nvllm serve DIR\n",
        "export_gguf.py DIR",
        '"all-linear"',
    ):
        assert command in card.content


@pytest.mark.parametrize("card", ["---\nlicense: [\n---\n", "---\ntags: 5\n---\n", "---\n1: 2\n---\n", "no card"])
def test_model_card_with_a_damaged_base_card_has_no_license(argv, tmp_path, card):
    (argv[0] / "README.md").write_text(card)
    main(*argv, "--skip_evaluate")
    content = (tmp_path / "out" / "pruned_weights" / "README.md").read_text()
    assert "license" not in ModelCard(content).data.to_dict()


@pytest.mark.parametrize(("flags", "limited"), [([], False), (["--gqa_unit", "kv_group"], True)])
def test_model_card_with_removed_kv_heads_names_the_limits(argv, tmp_path, flags, limited):
    main(*argv, *flags, "--sparsity", 0.5, "--skip_evaluate")
    folder = tmp_path / "out" / "pruned_weights"
    assert ("prefix tuning fail" in (folder / "README.md").read_text()) == limited
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    with pytest.raises(RuntimeError, match="Sizes of tensors must match") if limited else nullcontext():
        model(input_ids=torch.tensor([[5, 6, 7]]))


@pytest.mark.parametrize("name", ["gqa", "granite", "olmo2", "gemma"])
def test_model_card_of_a_stock_checkpoint_needs_no_remote_code(name, argv, tmp_path):
    (argv[0] / "README.md").unlink()
    make_tiny(name).save_pretrained(argv[0])
    main(*argv, "--uniform_shapes", "--skip_evaluate")
    content = (tmp_path / "out" / "pruned_weights" / "README.md").read_text()
    assert "trust_remote_code" not in content and "vllm_slim" not in content and "vllm serve DIR\n" in content
    assert "license" not in ModelCard(content).data.to_dict()
    assert "## Perplexity\n\nNot measured." in content


class Hub(BaseHTTPRequestHandler):
    """The endpoints of the hub that an upload uses."""

    models: dict[str, dict[str, bytes]]

    def answer(self, content: dict | list, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        name = self.path.removeprefix("/api/models/")
        if self.path == "/api/whoami-v2":
            logged_in = self.headers.get("Authorization") == "Bearer secret"
            self.answer({"name": "me", "type": "user"} if logged_in else {"error": "who?"}, 200 if logged_in else 401)
        elif "/tree/" in name:
            files = self.models[name.partition("/tree/")[0]]
            self.answer([{"type": "file", "path": path, "oid": "0" * 40, "size": 1} for path in files])
        elif name in self.models:
            self.answer({"id": name, "sha": "0" * 40})
        else:
            self.answer({"error": "Repository not found"}, 404)

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        name = self.path.removeprefix("/api/models/").rpartition("/commit/")[0]
        url = f"http://{self.headers['Host']}"
        if self.path == "/api/repos/create":
            name = json.loads(body)["name"]
            name = f"{json.loads(body).get('organization') or 'me'}/{name}"
            self.models.setdefault(name, {})
            # Depends on the version of the client.
            self.private[name] = json.loads(body).get("private", json.loads(body).get("visibility") == "private")
            self.answer({"url": f"{url}/{name}", "id": name, "name": name})
        elif "/preupload/" in self.path:
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            self.answer({"files": [file | {"shouldIgnore": False} for file in files]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.models[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "deletedFile":
                    del self.models[name][line["value"]["path"]]
            commit = f"{url}/{name}/commit/{'0' * 40}"
            self.answer({"success": True, "commitUrl": commit, "commitOid": "0" * 40, "hookOutput": ""})
        else:
            self.answer({"files": [], "ok": True})

    def log_message(self, *args):
        pass


# Other files in the model on the hub that is replaced.
OTHER_FILES = {"notes.md": b"mine", "adapter/adapter_model.safetensors": b"mine", "plot.png": b"mine"}


@pytest.fixture
def hub():
    """Address and models of a hub."""
    stale = ("model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    taken = dict.fromkeys((*stale, "README.md"), b"") | OTHER_FILES
    handler = type("Hub", (Hub,), {"models": {"me/taken": taken}, "private": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0"}
    yield environment | {"HF_TOKEN": "secret", "HF_HUB_DISABLE_XET": "1"}, handler
    server.shutdown()


@pytest.mark.parametrize("flags", [["me/tiny-pruned", "--hub_public"], ["tiny-pruned"], ["taken", "--overwrite"]])
def test_push_to_hub_publishes_the_pruned_model_with_its_card(argv, hub, tmp_path, flags):
    environment, models = hub[0], hub[1].models
    process = run(*argv, "--skip_evaluate", "--push_to_hub", *flags, **environment)
    assert process.returncode == 0, process.stderr
    folder, name = tmp_path / "out" / "pruned_weights", f"me/{flags[0].removeprefix('me/')}"
    published = {path.name: path.read_bytes() for path in folder.iterdir()}
    # Of the earlier files, only the weights that would be loaded instead are removed.
    assert models[name] == published | (OTHER_FILES if "taken" in flags else {})
    assert hub[1].private[name] is ("--hub_public" not in flags)
    assert f'from_pretrained("{name}", trust_remote_code=True)'.encode() in models[name]["README.md"]
    assert "published" in process.stderr + process.stdout


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("taken", {}, "--push_to_hub me/taken: exists"),
        ("me/taken", {}, "--push_to_hub me/taken: exists; choose another name or pass --overwrite"),
        ("me/new", {"HF_TOKEN": "wrong"}, "--push_to_hub me/new: .*; log in with 'hf auth login'"),
        ("me/new", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "--push_to_hub me/new: .*refused"),
        ("not a name/x/y", {}, "--push_to_hub not a name/x/y: "),
    ],
)
def test_push_to_hub_that_cannot_publish_is_refused_before_any_work(argv, hub, tmp_path, name, changes, message):
    environment, _ = hub
    process = run(*argv, "--skip_evaluate", "--push_to_hub", name, **environment | changes)
    assert process.returncode == 2
    (line,) = [line for line in process.stderr.splitlines() if "error" in line]
    assert re.search(message, line), process.stderr
    assert "Traceback" not in process.stderr
    assert not (tmp_path / "out").exists()
