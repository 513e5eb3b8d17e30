"""Asking a language model behind an OpenAI-compatible endpoint (`/chat/completions`), with the standard
library only.

    endpoint = ChatEndpoint("http://localhost:8000/v1", "Qwen/Qwen2.5-VL-72B-Instruct")
    reply = endpoint.ask("Say hello.")
"""

import dataclasses
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable

from tracevision_jax.errors import UserError

_TRANSIENT = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
"""HTTP statuses after which the same question may well be answered."""


@dataclasses.dataclass(frozen=True)
class ChatEndpoint:
    """Where and whom to ask.

    Attributes:
        url: base address up to and including the version, such as "http://localhost:8000/v1".
        model: the model's name at that endpoint.
        key_variable: environment variable with the key, sent as a bearer token where it is set.
        timeout_seconds: longest wait for one answer.
        attempts: how often a question is sent before giving up on failures that may pass.
        pause_seconds: wait after the first such failure, doubled after each further one.
        sleep: what waits; tests put a recorder here.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    timeout_seconds: float = 60.0
    attempts: int = 4
    pause_seconds: float = 1.0
    sleep: Callable[[float], None] = time.sleep

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise UserError(f"the endpoint {self.url!r} is no address; give one like http://localhost:8000/v1")
        if self.attempts < 1 or self.timeout_seconds <= 0:
            raise UserError("an endpoint needs at least one attempt and a timeout above 0 seconds")

    def ask(self, question: str) -> str:
        """The model's answer to one question at temperature 0.

        Raises `UserError` where the endpoint refuses, cannot be reached, or answers in another form, after
        all attempts at what may pass.
        """
        problem = ""
        for attempt in range(self.attempts):
            if attempt:
                self.sleep(self.pause_seconds * 2 ** (attempt - 1))
            try:
                return _answer_text(self._post(question))
            except urllib.error.HTTPError as error:
                problem = f"status {error.code} ({_body_excerpt(error)})"
                if error.code not in _TRANSIENT:
                    raise UserError(f"{self.url} refused the question: {problem}") from error
            except (OSError, http.client.HTTPException) as error:
                problem = str(getattr(error, "reason", error)) or type(error).__name__
            except ValueError as error:
                problem = f"the answer is not of the chat form: {error}"
        raise UserError(f"{self.url} gave no answer in {self.attempts} attempts; the last problem: {problem}")

    def _post(self, question: str) -> bytes:
        message = {"role": "user", "content": question}
        body = {"model": self.model, "messages": [message], "temperature": 0}
        headers = {"Content-Type": "application/json"}
        key = os.environ.get(self.key_variable, "")
        if key:
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.url.rstrip("/") + "/chat/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=self.timeout_seconds) as reply:
            return reply.read()


def _answer_text(body: bytes) -> str:
    """The text of the first choice; raises `ValueError` where the body has none."""
    try:
        text = json.loads(body)["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError, RecursionError) as error:
        raise ValueError(f"no choices[0].message.content in {body[:80]!r}") from error
    if not isinstance(text, str):
        raise ValueError(f"its content is {type(text).__name__}, not text")
    return text


def _body_excerpt(error: urllib.error.HTTPError) -> str:
    try:
        return error.read(300).decode("utf-8", "replace").strip() or str(error.reason)
    except OSError:
        return str(error.reason)
