"""Weights of several ranks arrive at a server whole, in buckets that are small."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from megatron_dlm.config import Config
from megatron_dlm.conversion import weight_transfer
from megatron_dlm.conversion.weight_transfer import BEGIN, END, GroupTransfer
from megatron_dlm.models.model_provider import build_model
from megatron_dlm.parallel import initialized
from megatron_dlm.rollout.external.client import RolloutServer
from megatron_dlm.rollout.external.weight_group import Bucket
from megatron_dlm.serving.served_weights import ServedWeights
from megatron_dlm.training.model_source import open_model_source
from tests.distributed_tests.layouts import EP, PP, VIRTUAL, Layout
from tests.distributed_tests.spawn import rejoin_world, run_distributed
from tests.tiny import save_random_model

BUCKET_BYTES = 20_000
LAYOUTS = {
    "PP2": Layout(2, "dense", {PP: 2}),
    "PP2 V2": Layout(2, "deep", {PP: 2, VIRTUAL: 2}),
    "moe EP2": Layout(2, "moe", {EP: 2}),
    "moe PP2": Layout(2, "moe", {PP: 2}),
}


def _send(rank: int, folder: Path, urls: dict[str, str]) -> None:
    """Send the weights of each layout to a server of its own, twice."""
    for name, layout in LAYOUTS.items():
        config = Config.from_dict({"device": "cpu", **layout.options})
        source = open_model_source(str(folder / layout.model), "--load")
        with initialized(config):
            model = build_model(source.architecture, config)
            source.load_into(model)
            transfer = GroupTransfer(model, source.architecture, "sdar", lambda: 7)
            servers = [RolloutServer(urls[name], 60.0, 0)]
            with mock.patch.object(weight_transfer, "BUCKET_BYTES", BUCKET_BYTES):
                for _ in range(2):
                    transfer.send(servers)
            if rank == 0:
                transfer.close(servers)
        rejoin_world()


class _Server:
    """The part of a rollout server that takes weights.

    Attributes:
        buckets: Bytes of the tensors of each bucket, and how many these are.
        calls: Paths of all requests.
    """

    def __init__(self, weights: ServedWeights) -> None:
        self.buckets: list[tuple[int, int]] = []
        self.calls: list[str] = []

        def answer(path: str, body: dict[str, Any]) -> Any:
            self.calls.append(path)
            if path == "/server_info":
                return {"dp_size": 1, "tp_size": 1}
            if path == BEGIN:
                weights.begin_update()
            elif path == END:
                weights.end_update()
            elif path == "/init_weights_update_group":
                weights.join(
                    body["group_name"],
                    body["master_address"],
                    body["master_port"],
                    body["rank_offset"],
                    body["world_size"],
                    body["backend"],
                )
            elif path == "/destroy_weights_update_group":
                weights.leave(body["group_name"])
            else:
                bucket = Bucket(body["names"], body["dtypes"], body["shapes"])
                numbers = [torch.Size(shape).numel() for shape in bucket.shapes]
                self.buckets.append((4 * sum(numbers), len(numbers)))
                version = body.get("weight_version")
                weights.receive(body["group_name"], bucket, True, version)
            return {"success": True, "message": ""}

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                content = json.dumps(answer(self.path, json.loads(sent or b"{}"))).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"


def test_weights_of_stages_and_of_experts_arrive_whole(tmp_path: Path) -> None:
    for kind in ("dense", "moe"):
        save_random_model(tmp_path / kind, moe=kind == "moe")
    save_random_model(tmp_path / "deep", num_hidden_layers=4)
    config = Config.from_dict({"device": "cpu"})
    with initialized(config):
        models, served, servers = {}, {}, {}
        for name, layout in LAYOUTS.items():
            source = open_model_source(str(tmp_path / layout.model), "--load")
            models[name] = build_model(source.architecture, config)
            served[name] = ServedWeights(models[name], source.architecture, lambda: None)
            servers[name] = _Server(served[name])
        run_distributed(_send, 2, tmp_path, {name: server.url for name, server in servers.items()})
        for name, layout in LAYOUTS.items():
            source = open_model_source(str(tmp_path / layout.model), "--load")
            expected = build_model(source.architecture, config)
            source.load_into(expected)
            assert served[name].version == "7"
            found = dict(models[name].named_parameters())
            for parameter, values in expected.named_parameters():
                assert torch.equal(found[parameter], values), (name, parameter)
            buckets = servers[name].buckets
            assert len(buckets) > 8, name
            assert all(size <= BUCKET_BYTES or tensors == 1 for size, tensors in buckets), name
            assert servers[name].calls.count("/init_weights_update_group") == 1
            assert servers[name].calls.count(BEGIN) == servers[name].calls.count(END) == 2
            servers[name].http.shutdown()
            servers[name].http.server_close()
