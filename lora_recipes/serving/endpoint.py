"""A running vLLM server, as its clients see it: the OpenAI routes, /tokenize, and adding and removing
adapters. Imports no torch.
"""

import http.client
import json
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

from lora_recipes.core import cli
from lora_recipes.core.errors import Problem, RecipeError


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The API key goes to the server that was named, to no other."""

    def redirect_request(self, *_: Any) -> None:
        """Refuse: the answer is then an error."""


_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect)  # nor through a proxy


@dataclass(frozen=True)
class Answer:
    """A text, and whether it `ended` by itself rather than at the most tokens that were asked for."""

    text: str
    ended: bool


class Endpoint:
    """A vLLM server at `url` (`http://host:port`). The API key is that of VLLM_API_KEY. Errors of the server
    are RecipeErrors.
    """

    def __init__(self, url: str, timeout: float = 120):
        self.url, self.timeout = url.rstrip("/").removesuffix("/v1"), timeout

    def models(self) -> dict[str, str]:
        """The names that a request may choose -> the folder or hub id behind each; the base comes first."""
        answer = self._ask("/v1/models")
        try:
            return {model["id"]: model.get("root") or model["id"] for model in answer["data"]}
        except (TypeError, KeyError, AttributeError):
            raise RecipeError(
                Problem(self.url, "what answers there is no vLLM server", "check host and port")
            ) from None

    def healthy(self) -> bool:
        """Does it answer /health?"""
        try:
            self._ask("/health", timeout=5)
        except RecipeError:
            return False
        return True

    def logprobs(self, model: str, ids: list[int]) -> list[float]:
        """The log-probability (nats) that `model` gives each token of `ids` but the first."""
        asked = {"model": model, "prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        entries = self._ask("/v1/completions", asked)["choices"][0]["prompt_logprobs"]
        return [entry[str(token)]["logprob"] for entry, token in zip(entries[1:], ids[1:], strict=True)]

    def likeliest(self, model: str, ids: list[int], count: int) -> list[dict[int, float]]:
        """For each token of `ids` but the first: the log-probabilities (nats) that `model` gives the `count`
        likeliest tokens there, and that token. vLLM says at most 20 unless told otherwise.

        By the route that makes no text of them: the other ends vLLM 0.32 where a likely token has none, as
        of the rows of an embedding that the tokenizer does not use (tokenizers/detokenizer_utils.py). A
        server has it with --enable-scale-out.
        """
        how = {"max_tokens": 1, "temperature": 0, "prompt_logprobs": count, "detokenize": False}
        asked = {"model": model, "token_ids": ids, "sampling_params": how}
        entries = self._ask("/inference/v1/generate", asked)["prompt_logprobs"]
        return [{int(token): said["logprob"] for token, said in entry.items()} for entry in entries[1:]]

    def tokens(self, model: str, prompt: str | list[dict[str, Any]], options: dict[str, Any]) -> list[int]:
        """The tokens that the server makes of a text, or of messages by its chat template."""
        asked = (
            {"prompt": prompt}
            if isinstance(prompt, str)
            else {"messages": prompt, "add_generation_prompt": True, **options}
        )
        found: list[int] = self._ask("/tokenize", {"model": model, **asked})["tokens"]
        return found

    def write(
        self, model: str, prompt: str | list[dict[str, Any]], options: dict[str, Any], max_tokens: int
    ) -> Answer:
        """What `model` answers, greedily: the continuation of a text, or the reply to messages. `options` go
        with the request.
        """
        asked = {"model": model, "max_tokens": max_tokens, "temperature": 0, **options}
        if isinstance(prompt, str):
            said = self._ask("/v1/completions", asked | {"prompt": prompt})["choices"][0]
            return Answer(str(said["text"]), said["finish_reason"] == "stop")
        said = self._ask("/v1/chat/completions", asked | {"messages": prompt})["choices"][0]
        # Where the server is told to parse tool calls, a call is no text, and a reason of its own.
        ended = said["finish_reason"] in ("stop", "tool_calls")
        return Answer(str(said["message"].get("content") or ""), ended)

    def stops_at(
        self, model: str, prompt: str | list[dict[str, Any]], options: dict[str, Any], token: int
    ) -> bool:
        """Does an answer of `model` end where it writes `token`? It is made to: no other one is allowed."""
        return self.write(model, prompt, options | {"allowed_token_ids": [token]}, 2).ended

    def shares(self, model: str, text: str) -> list[float]:
        """The probability that `model`, a classifier, gives each class of `text`."""
        found: list[float] = self._ask("/classify", {"model": model, "input": text})["data"][0]["probs"]
        return found

    def load(self, name: str, path: str) -> None:
        """Add an adapter. vLLM has this route only with VLLM_ALLOW_RUNTIME_LORA_UPDATING."""
        self._ask("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})

    def unload(self, name: str) -> None:
        """Remove an adapter."""
        self._ask("/v1/unload_lora_adapter", {"lora_name": name})

    def _ask(self, route: str, body: dict[str, Any] | None = None, timeout: float | None = None) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("VLLM_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        try:
            request = urllib.request.Request(
                self.url + route, None if body is None else json.dumps(body).encode(), headers
            )
            with _OPENER.open(request, timeout=timeout or self.timeout) as answer:
                text = answer.read().decode()
        except urllib.error.HTTPError as error:
            raise RecipeError(Problem(self.url + route, *_refusal(error, route))) from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise RecipeError(
                Problem(
                    self.url,
                    f"no server answers: {reason}",
                    f"{cli.command('serve')} starts one; at another address: {cli.command(URL='http://host:port')}",
                )
            ) from None
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            return text


def _refusal(error: urllib.error.HTTPError, route: str) -> tuple[str, str]:
    """(found, do) for an answer that is an error."""
    text = error.read().decode(errors="replace")
    try:
        said = json.loads(text)
        message = str((said.get("error") or said).get("message") or said.get("detail") or text)
    except (json.JSONDecodeError, AttributeError):
        message = text[:300]
    if error.code == 401:
        return "the server wants another API key", "set VLLM_API_KEY"
    if error.code == 404 and "lora_adapter" in route and message == "Not Found":
        return (
            "the server does not let adapters be added or removed",
            f"start it with {cli.command(DYNAMIC=True)}",
        )
    return f"the server answers {error.code}: {message}", ""
