"""A server of a tiny block-causal model that speaks SGLang's native HTTP API, from its documents, not from our client.

Requests and answers: docs.sglang.io, "SGLang Native APIs", "Sampling Parameters" and "SGLang for RL Systems"; step maps: pull
request 27943 (1-based steps of each block, aligned with `output_ids`; steps count where tokens were written). What the documents
do not list is refused with HTTP 400, so a client that asks for something else fails. Decoding is LowConfidence on full logits,
in blocks of the sequence; with a temperature tokens are drawn and their probabilities are the confidence.
"""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

GENERATE = {"text", "input_ids", "sampling_params", "rid", "return_logprob", "logprob_start_len", "top_logprobs_num", "stream"}
SAMPLING = {"max_new_tokens", "stop", "stop_token_ids", "temperature", "top_p", "top_k", "min_p", "frequency_penalty",
            "presence_penalty", "repetition_penalty", "min_new_tokens", "n", "ignore_eos", "skip_special_tokens",
            "spaces_between_special_tokens", "no_stop_trim"}  # fmt: skip
UPDATE = {"model_path", "load_format", "abort_all_requests", "weight_version", "is_async", "torch_empty_cache", "keep_pause",
          "recapture_cuda_graph", "token_step", "flush_cache"}  # fmt: skip


HANG_UP, CUT = object(), object()  # faults: the connection breaks, before or in the middle of the answer


class Refusal(Exception):  # noqa: N818 - an answer, not a failure
    """HTTP 400."""


class DiffusionServer:
    """`faults` befall the next answers: an HTTP status or bytes in their place, a function of them, HANG_UP, CUT, or None."""

    def __init__(self, folder: Path, *, block: int, mask_id: int, threshold: float = 0.95, eos_id: int | None = None,
                 step_maps: bool = True, greedy: bool = False) -> None:  # fmt: skip
        self.block, self.mask_id, self.threshold, self.eos_id = block, mask_id, threshold, eos_id
        self.step_maps, self.greedy = step_maps, greedy  # what an SGLang without the pull request does
        self.info = {"model_path": str(folder), "tokenizer_path": str(folder), "is_generation": True,
                     "preferred_sampling_params": None, "weight_version": "default"}  # fmt: skip
        self.model = self._read(folder)
        self.generator = torch.Generator().manual_seed(0)
        self.faults: list[Any] = []
        self.asked: list[tuple[str, Any]] = []
        self.lock = threading.Lock()

    @staticmethod
    def _read(folder: Path | str) -> Any:
        from transformers import AutoModelForMaskedLM

        return AutoModelForMaskedLM.from_pretrained(folder).eval()

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        with self.lock:
            self.asked.append((path, body))
            try:
                if path == "/get_model_info":
                    return 200, self.info
                if path == "/generate":
                    return 200, self._generate(body)
                if path == "/update_weights_from_disk":
                    return self._update(body)
            except Refusal as refusal:
                return 400, {"error": {"message": str(refusal)}}
            return 404, {"detail": "Not Found"}

    def _update(self, body: Any) -> tuple[int, Any]:
        _known(body, UPDATE)
        try:
            self.model = self._read(body["model_path"])
        except (OSError, ValueError) as error:  # transformers 4 calls no folder a bad name
            return 400, {"success": False, "message": f"Failed to get weights iterator: {error}", "num_paused_requests": 0}
        self.info["model_path"] = body["model_path"]
        if body.get("weight_version") is not None:
            self.info["weight_version"] = body["weight_version"]
        return 200, {"success": True, "message": "Succeeded to update model weights.", "num_paused_requests": 0}

    def _generate(self, body: Any) -> Any:
        _known(body, GENERATE | ({"return_step_maps"} if self.step_maps else set()))
        prompts, params = body["input_ids"], body.get("sampling_params") or {}
        if not isinstance(prompts[0], list):
            raise Refusal("this server answers batches")
        many = params if isinstance(params, list) else [params] * len(prompts)
        return [self._one(ids, own, body) for ids, own in zip(prompts, many, strict=True)]

    def _one(self, prompt: list[int], params: Any, body: Any) -> Any:
        _known(params, SAMPLING)
        ids, logp, steps = self._decode(prompt, params)
        meta: dict[str, Any] = {
            "id": uuid.uuid4().hex,
            "finish_reason": {"type": "length", "length": params["max_new_tokens"]},
            "prompt_tokens": len(prompt),
            "weight_version": self.info["weight_version"],
            "total_retractions": 0,
        }
        ends = [i for i, token in enumerate(ids) if token == self.eos_id or token in params.get("stop_token_ids", ())]
        if ends and not params.get("ignore_eos"):
            ids, logp, steps = (values[: ends[0] + 1] for values in (ids, logp, steps))
            meta["finish_reason"] = {"type": "stop", "matched": ids[-1]}
        meta |= {"completion_tokens": len(ids), "cached_tokens": 0, "e2e_latency": 0.1}
        if body.get("return_step_maps"):
            meta["step_maps"] = steps
        if body.get("return_logprob"):
            meta["output_token_logprobs"] = [[value, token, None] for value, token in zip(logp, ids, strict=True)]
        return {"text": "", "output_ids": ids, "meta_info": meta}

    @torch.no_grad()
    def _decode(self, prompt: list[int], params: Any) -> tuple[list[int], list[float], list[int]]:
        total = len(prompt) + params["max_new_tokens"]
        ids, logps, steps = list(prompt), [0.0] * len(prompt), [0] * len(prompt)
        while len(ids) < total:
            end = (len(ids) // self.block + 1) * self.block
            more = end - len(ids)
            ids, logps, steps = ids + [self.mask_id] * more, logps + [0.0] * more, steps + [0] * more
            step = 0
            while self.mask_id in ids:
                step += 1
                chosen = self._step(ids, params)
                for place, (token, value) in chosen.items():
                    ids[place], logps[place], steps[place] = token, value, step
        span = slice(len(prompt), total)
        return ids[span], logps[span], steps[span]

    def _step(self, ids: list[int], params: Any) -> dict[int, tuple[int, float]]:
        """Place -> token and its log-prob, at temperature 1, for those that this step writes."""
        block_T = torch.arange(len(ids)) // self.block
        sees_TT = block_T[None, :] <= block_T[:, None]
        bias = torch.zeros(sees_TT.shape).masked_fill(~sees_TT, torch.finfo(torch.float32).min)
        z_TV: Tensor = self.model(torch.tensor([ids]), attention_mask=bias[None, None]).logits[0].float()
        z_TV[:, self.mask_id] = -torch.inf
        temperature = 0.0 if self.greedy else params.get("temperature", 1.0)
        p_TV = (z_TV / temperature if temperature else z_TV).softmax(-1)
        drawn_T = torch.multinomial(p_TV, 1, generator=self.generator)[:, 0] if temperature else p_TV.argmax(-1)
        confidence_T = p_TV.gather(1, drawn_T[:, None])[:, 0]
        places = [place for place, token in enumerate(ids) if token == self.mask_id]
        sure = [place for place in places if confidence_T[place] > self.threshold]
        logp_TV = z_TV.log_softmax(-1)
        where = sure or [max(places, key=lambda place: float(confidence_T[place]))]
        return {place: (int(drawn_T[place]), float(logp_TV[place, drawn_T[place]])) for place in where}


def _known(body: Any, keys: set[str]) -> None:
    if unknown := set(body) - keys:
        raise Refusal(f"unexpected keyword argument {sorted(unknown)[0]!r}")


@contextmanager
def serving(server: DiffusionServer) -> Iterator[str]:
    """The url of the server while the context lasts."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._reply(None)

        def do_POST(self) -> None:
            self._reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _reply(self, body: Any) -> None:
            fault = server.faults.pop(0) if server.faults else None
            if fault is CUT:
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b"[{")
            if fault in (HANG_UP, CUT):
                self.close_connection = True
                return
            status, found = (fault, {"detail": "fault"}) if isinstance(fault, int) else server.answer(self.path, body)
            data = fault if isinstance(fault, bytes) else json.dumps(fault(found) if callable(fault) else found).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}"
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
