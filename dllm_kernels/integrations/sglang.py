"""Rollouts of an SGLang server of diffusion language models, over its native HTTP API.

What is asked and answered is as documented (docs.sglang.io: "SGLang Native APIs", "Sampling Parameters", "SGLang for RL
Systems"): `POST /generate` by token ids, `POST /update_weights_from_disk`, `GET /get_model_info`. Step maps are those of its
pull request 27943: `return_step_maps` asks for `meta_info["step_maps"]`, for each token the step of its own block that wrote
it, from 1. Algorithm, threshold and block size of the decoding are the server's, given at its launch.

No GPU has been asked: this was tested against a server of our own that answers as the documents say.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dllm_kernels import checks
from dllm_kernels.rollouts.foreign import Ids
from dllm_kernels.rollouts.rollout import Rollout

LONGEST_WAIT = 30.0  # seconds between two tries
TRY_AGAIN = (408, 429, 500, 502, 503, 504)
_SHOWN = 200  # characters of an answer in a message


class ServerError(RuntimeError):
    """The server cannot be reached, refuses, or answers what it should not."""


class OtherWeightsError(ServerError):
    """The server's weights are not those that it was told to load."""


def check_url(url: str) -> None:
    """Raises ValueError, for the argument `url`, for what is no address of a server."""
    try:
        parts = urllib.parse.urlsplit(url)
        known = parts.scheme in ("http", "https") and parts.hostname is not None and parts.port != 0
    except ValueError:  # half an IPv6 address, or a port that is no number up to 65535
        known = False
    if not known or not url.isprintable() or " " in url:
        raise ValueError(f"url must be http:// or https://, a host and a port, such as http://node7:30000, got {url!r}")


class SGLang:
    """One server.

    Args:
        url: such as `http://node7:30000`.
        timeout: seconds that one request may take, which for `generate` is the whole batch.
        retries: further tries where the server does not answer, or says that it cannot now (HTTP 408, 429, 5xx); the first after
            `backoff` seconds, each later one after twice as long, at most 30. A refusal or an answer that makes no sense is an
            error at once.

    Raises ValueError naming the argument.

    Example:
        >>> SGLang("http://127.0.0.1:30000/").url
        'http://127.0.0.1:30000'
    """

    def __init__(self, url: str, *, timeout: float = 600.0, retries: int = 5, backoff: float = 1.0) -> None:
        check_url(url)
        checks.number("timeout", timeout, above=0)
        checks.count("retries", retries, 0)
        checks.number("backoff", backoff, above=0)
        self.url, self.timeout, self.retries, self.backoff = url.rstrip("/"), timeout, retries, backoff

    def model_info(self) -> dict[str, Any]:
        """`GET /get_model_info`: `model_path`, `weight_version` and others. Raises ServerError."""
        return self._object("GET", "/get_model_info", None)

    def load(self, folder: str, version: str) -> None:
        """Have the server load the weights of a folder of safetensors, which it sees under this path, as this version.

        The architecture must be that of the model it was started with. Raises ServerError with what the server says, and
        OtherWeightsError where it then serves others.
        """
        body = {"model_path": folder, "weight_version": version, "flush_cache": True}
        told = self._object("POST", "/update_weights_from_disk", body, refusals=(400,))
        if told.get("success") is not True:
            raise ServerError(
                f"{self.url} did not load the weights of {folder}: {_short(told.get('message', told))}; it must see that folder "
                "under the same path, and serve a model of the same architecture"
            )
        self._check_version(self.model_info().get("weight_version"), version)

    def generate(
        self,
        prompts: Sequence[Ids],
        *,
        length: int,
        mask_id: int,
        vocabulary: int,
        causal_block: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        step_maps: bool = True,
        logp: bool = False,
        stop_id: int | None = None,
        suppress: Sequence[int] = (),
        shift: int = 0,
        sequence_ids: Tensor | None = None,
        version: str | None = None,
    ) -> Rollout:
        """A completion of each prompt, as a `Rollout` on the CPU.

        Args:
            prompts: token ids of each, without padding; the same one several times for a group.
            length: tokens of a completion. With `step_maps` the server is asked to go on to the end of the last block, whose
                steps saw what lies there, and past an EOS.
            vocabulary: tokens that the model knows; an id beyond is an error.
            causal_block: the server's block size. temperature, top_k, top_p: of sampling; all sampling parameters are sent, as
                the server's own defaults come from the model's generation_config.json.
            step_maps: whether to ask for them; without, the rollout holds ids alone (`Rollout.from_steps(step_map=None)`).
            logp: whether to ask for log-probs; without them `score_rollout` makes them.
            stop_id: without step maps: an answer may end with this token, and is filled up with it.
            suppress: ids that have probability 0 where the rollout is scored, which the server cannot be told: an answer that
                holds one is an error.
            shift, sequence_ids: as in `Rollout.from_steps`. version: that of `load`; answers of others are an OtherWeightsError.

        Noise is the server's: nothing is a function of the sequence ids. Raises ValueError or TypeError naming the argument, and
        ServerError.
        """
        checks.count("length", length)
        checks.count("causal_block", causal_block)
        checks.number("temperature", temperature, least=0)
        if step_maps and stop_id is not None:
            raise ValueError(
                f"stop_id must be None with step_maps, got {stop_id}: what the last block holds after it is not returned, and "
                "was seen by that block's steps"
            )
        if logp and not step_maps:
            raise ValueError("logp must be False without step_maps, which say in which state a token was drawn")
        ids = [prompt.tolist() if isinstance(prompt, Tensor) else list(prompt) for prompt in prompts]
        # to the end of the last block, where its history is wanted
        asked = [length + (-(len(prompt) + length) % causal_block if step_maps else 0) for prompt in ids]
        sampling = {
            "temperature": temperature,
            "top_k": -1 if top_k is None else top_k,
            "top_p": 1.0 if top_p is None else top_p,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "ignore_eos": stop_id is None,
            "skip_special_tokens": False,
            "no_stop_trim": True,
            **({} if stop_id is None else {"stop_token_ids": [stop_id]}),
        }
        body: dict[str, Any] = {
            "input_ids": ids,
            "sampling_params": [{**sampling, "max_new_tokens": number} for number in asked],
            "stream": False,
        }
        body |= {name: True for name, wanted in (("return_step_maps", step_maps), ("return_logprob", logp)) if wanted}
        answers = self._request("POST", "/generate", body)
        if not isinstance(answers, list) or len(answers) != len(ids):
            number = f"{len(answers)} answers" if isinstance(answers, list) else _short(answers)
            raise ServerError(f"{self.url}/generate must answer each of the {len(ids)} prompts, got {number}")
        completions, maps, logps = [], [], []
        for b, (answer, prompt, wanted) in enumerate(zip(answers, ids, asked, strict=True)):
            meta = self._meta(b, answer, version)
            if (seen := meta.get("prompt_tokens", len(prompt))) != len(prompt):
                raise ServerError(
                    f"{self.url} answered a prompt of {_short(seen)} tokens where prompt {b} of {len(prompt)} was asked: it cuts "
                    "prompts, or answers in another order"
                )
            completions.append(self._completion(b, answer, wanted, mask_id, vocabulary, stop_id, frozenset(suppress)))
            if step_maps:
                maps.append(self._steps(b, meta, len(prompt), wanted, causal_block))
            if logp:
                logps.append(self._logp(b, meta, completions[-1]))
        if version is not None and any("weight_version" not in answer["meta_info"] for answer in answers):
            self._check_version(self.model_info().get("weight_version"), version)
        try:
            return Rollout.from_steps(
                ids,
                completions,
                maps if step_maps else None,
                mask_id=mask_id,
                logp=logps if logp else None,
                lengths=[length] * len(ids) if step_maps else None,
                sequence_ids=sequence_ids,
                shift=shift,
                causal_block=causal_block,
                temperature=temperature,
            )
        except ValueError as error:
            raise ServerError(f"{self.url}/generate answered what is no rollout: {error}") from error

    def _meta(self, b: int, answer: Any, version: str | None) -> dict[str, Any]:
        meta = answer.get("meta_info") if isinstance(answer, dict) else None
        if not isinstance(meta, dict):
            raise ServerError(f"{self.url}/generate must answer with output_ids and meta_info, got {_short(answer)}")
        reason = meta.get("finish_reason")
        if isinstance(reason, dict) and reason.get("type") not in ("stop", "length"):
            raise ServerError(f"{self.url} gave up prompt {b}: {_short(reason)}")
        if version is not None and "weight_version" in meta:
            self._check_version(meta["weight_version"], version)
        return meta

    def _check_version(self, served: Any, version: str) -> None:
        if served != version:
            raise OtherWeightsError(
                f"{self.url} answered with weights {_short(served)}, and was told to load {version}: it was started anew, or "
                "another run writes to it"
            )

    def _completion(
        self,
        b: int,
        answer: dict[str, Any],
        number: int,
        mask_id: int,
        vocabulary: int,
        stop_id: int | None,
        suppressed: frozenset[int],
    ) -> list[int]:
        found = answer.get("output_ids")
        if not isinstance(found, list) or not all(type(token) is int for token in found):
            raise ServerError(f"{self.url}/generate must answer with output_ids, a list of token ids, got {_short(found)}")
        if wrong := [token for token in found if not 0 <= token < vocabulary]:
            raise ServerError(
                f"{self.url} answered prompt {b} with token {wrong[0]}, of a vocabulary of {vocabulary}: it serves another model"
            )
        if mask_id in found:
            raise ServerError(f"{self.url} answered prompt {b} with the mask token {mask_id}: a place was left undecided")
        if never := [token for token in found if token in suppressed]:
            raise ServerError(
                f"{self.url} answered prompt {b} with token {never[0]}, which is suppressed here and so has probability 0: the "
                "server draws from all tokens"
            )
        if stop_id is not None and len(found) < number and found[-1:] == [stop_id]:
            return found + [stop_id] * (number - len(found))
        if len(found) != number:
            raise ServerError(
                f"{self.url} answered prompt {b} with {len(found)} tokens, and {number} were asked for "
                f"(finish_reason {_short(answer['meta_info'].get('finish_reason'))})"
            )
        return found

    def _steps(self, b: int, meta: dict[str, Any], prompt: int, number: int, block: int) -> list[int]:
        """Steps of the sequence from 0; the server's are of each block, from 1."""
        told = meta.get("step_maps")
        if told is None:
            raise ServerError(
                f"{self.url} answered without meta_info.step_maps: it takes an SGLang with pull request 27943 and the algorithm "
                "LowConfidence; algorithms that draw their own masks do without (step_maps=False)"
            )
        if not isinstance(told, list) or not all(type(step) is int and 1 <= step <= block for step in told):
            raise ServerError(
                f"{self.url}: step_maps of prompt {b} must be steps of a block, from 1 to {block}, got {_short(told)}"
            )
        if len(told) != number:
            raise ServerError(
                f"{self.url}: step_maps of prompt {b} must have one entry for each of {number} tokens, got {len(told)}"
            )
        steps, before, last, now = [], 0, 0, prompt // block
        for place, step in enumerate(told):
            if (prompt + place) // block != now:
                now, before, last = (prompt + place) // block, before + last, 0
            last = max(last, step)
            steps.append(before + step - 1)
        return steps

    def _logp(self, b: int, meta: dict[str, Any], completion: list[int]) -> list[float]:
        told = meta.get("output_token_logprobs")
        try:
            pairs = [(float(entry[0]), entry[1]) for entry in told]  # type: ignore[union-attr]
        except (TypeError, ValueError, LookupError):
            pairs = []
        if [token for _, token in pairs] != completion:
            raise ServerError(
                f"{self.url}: output_token_logprobs of prompt {b} must be (log-prob, id, text) of each token, got {_short(told)}"
            )
        return [value for value, _ in pairs]

    def _object(self, method: str, path: str, body: Any, refusals: Sequence[int] = ()) -> dict[str, Any]:
        found = self._request(method, path, body, refusals)
        if not isinstance(found, dict):
            raise ServerError(f"{self.url}{path} must answer with an object, got {_short(found)}")
        return found

    def _request(self, method: str, path: str, body: Any, refusals: Sequence[int] = ()) -> Any:
        """The JSON of an answer, also of one with a status among `refusals`."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        request = urllib.request.Request(f"{self.url}{path}", data, headers, method=method)
        started, cause = time.monotonic(), ""
        for number in range(self.retries + 1):
            if number:
                time.sleep(min(LONGEST_WAIT, self.backoff * 2 ** (number - 1)))
            end = time.monotonic() + self.timeout
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    return self._parsed(path, _read(answer, end))
            except urllib.error.HTTPError as error:
                with error:
                    text = error.read()
                if error.code in refusals:
                    return self._parsed(path, text)
                cause = f"HTTP {error.code}: {_short(text.decode(errors='replace'))}"
                if error.code not in TRY_AGAIN:
                    raise ServerError(f"{self.url} refused {method} {path}, {cause}") from error
            except (OSError, http.client.HTTPException) as error:  # no connection, one that broke, or no answer in time
                cause = _short(getattr(error, "reason", error) or type(error).__name__)
        raise ServerError(
            f"{self.url} did not answer {method} {path} in {self.retries + 1} tries and {time.monotonic() - started:.0f} s "
            f"({cause}): the server died, is overloaded, or is not there"
        )

    def _parsed(self, path: str, text: bytes) -> Any:
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            shown = _short(text.decode(errors="replace"))
            raise ServerError(f"{self.url}{path} must answer with JSON, got {shown}: this is no SGLang server") from error


def _read(answer: http.client.HTTPResponse, end: float) -> bytes:
    """All of it. A socket's own time limit is of each piece, so a server that sends a byte now and then would never run out."""
    pieces = []
    while piece := answer.read1(1 << 20):
        pieces.append(piece)
        if time.monotonic() > end:
            raise TimeoutError("timed out in the middle of an answer")
    if answer.length:
        raise http.client.IncompleteRead(b"".join(pieces), answer.length)
    return b"".join(pieces)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else str(value) if isinstance(value, BaseException) else json.dumps(value, default=str)
    text = " ".join(text.split()) or "nothing"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ..."
