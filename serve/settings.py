"""All that the application is told: what `build_app` takes, from the command line or from a Serve config file.

serve run serve.app:build_app mixture=winner.yaml max_replicas=4
"""

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import ray
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    model_validator,
)
from pydantic import ValidationError as PydanticError

from flexmore_ray.errors import UsageError
from flexmore_ray.mixture import read_spec
from flexmore_ray.spec import MixtureSpec
from flexmore_ray.storage import open_path
from serve.confine import check_places

KEY_CHARACTERS = 16
"""Of a key at least; drawn at random these are more than anybody can try over a network."""
_KEY_FILE_BYTES = 2**20


def _names(value: Any) -> Any:
    """A list of names, which on a command line is one word: A,B,..."""
    return [name.strip() for name in value.split(",")] if isinstance(value, str) else value


class Settings(BaseModel):
    """What to serve, and how. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mixture: str | dict[str, Any] = Field(description="a mixture file, a SOURCE, or what a mixture file holds")
    experts: Annotated[list[str] | None, BeforeValidator(_names)] = Field(
        None, description="names for the experts of an N-expert checkpoint; null keeps what the mixture says"
    )
    name: str | None = Field(
        None, min_length=1, max_length=200, description="of the model, for clients; null: of the file or the source"
    )
    allow: Annotated[list[str], BeforeValidator(_names)] = Field(
        [], description="folders, or SOURCEs, that a mixture file may name outside its own folder; see serve/confine.py"
    )
    device: str = Field("cpu", description="where mixture and experts compute: cpu, cuda, ...")
    dtype: str | None = Field(None, description="null: float32 on the CPU, the checkpoint's own elsewhere")

    min_replicas: NonNegativeInt = Field(1, description="mixture replicas at least; with 0 the first request waits")
    max_replicas: PositiveInt = Field(1, description="mixture replicas at most")
    target_ongoing_requests: float = Field(
        16, gt=0, description="requests per mixture replica, waiting ones included, that replicas are added for"
    )
    upscale_delay_s: NonNegativeFloat = Field(5, description="seconds of load before replicas are added")
    downscale_delay_s: NonNegativeFloat = Field(60, description="seconds of less load before replicas are stopped")
    cpus: NonNegativeFloat = Field(1, description="CPUs that a mixture replica reserves")
    gpus: NonNegativeFloat = Field(0, description="GPUs that a mixture replica reserves; a fraction shares one")

    expert_min_replicas: NonNegativeInt = Field(1, description="replicas at least, of each expert placed on its own")
    expert_max_replicas: PositiveInt = Field(1, description="replicas at most, of each of them")
    expert_target_busy: float = Field(
        0.5, gt=0, description="share of its time that such a replica computes, which replicas are added for"
    )
    expert_cpus: NonNegativeFloat = Field(1, description="CPUs that each of these replicas reserves")
    expert_gpus: NonNegativeFloat = Field(0, description="GPUs that each of them reserves")
    on_lost: Literal["continue", "refuse"] = Field(
        "continue", description="what becomes of requests that need an expert which is lost: go on without it, or 503"
    )

    max_ongoing_requests: PositiveInt = Field(64, description="requests, and sequences of a batch, of one replica")
    max_queued_requests: PositiveInt = Field(
        256, description="requests that wait for a replica, per ingress replica; more are told 429"
    )
    max_batch_tokens: PositiveInt = Field(512, description="tokens of one step; longer prompts are read in parts")
    cache_tokens: PositiveInt | None = Field(
        None, description="tokens of the KV cache; null: 32,768 on the CPU, what the memory allows on a GPU"
    )
    max_model_len: PositiveInt | None = Field(
        None, description="tokens of a prompt and its answer at most; null: what the model was made for"
    )

    ingress_replicas: PositiveInt = Field(1, description="processes that speak HTTP")
    api_key_file: str | None = Field(None, description="file of keys, one a line; null: no key is needed")
    admin_key_file: str | None = Field(None, description="likewise for /admin; null closes it")
    require_key: bool = Field(
        True, description="whether to refuse to listen beyond the loopback without a key; false: for others to guard"
    )
    request_timeout_s: float = Field(600, gt=0, description="seconds that a request may take, waiting included")
    max_body_bytes: PositiveInt = Field(4 * 2**20, description="bytes of a request at most")

    @model_validator(mode="after")
    def _bounds(self) -> "Settings":
        for kind in ("", "expert_"):
            least, most = getattr(self, f"{kind}min_replicas"), getattr(self, f"{kind}max_replicas")
            if least > most:
                raise ValueError(f"{kind}max_replicas: at least {kind}min_replicas ({least}) is needed, got {most}")
        if self.name is not None and not self.name.isprintable():  # it goes into logs and into answers
            raise ValueError(f"name: a model's name has printable characters alone, got {self.name!r}")
        return self

    @property
    def model_name(self) -> str:
        """What clients call the model."""
        if self.name is not None:
            return self.name
        if isinstance(self.mixture, dict):
            return "mixture"
        return Path(self.mixture.partition("://")[2] or self.mixture.rpartition("=")[2]).stem or "mixture"

    def spec(self) -> MixtureSpec:
        """The mixture's description, read from its file now.

        Raises:
            UsageError: the file is missing, breaks a rule, or names a place that it may not; see `serve.confine`.
        """
        mixture = self.mixture
        if isinstance(mixture, dict):
            return read_spec(MixtureSpec.from_dict(mixture, where="mixture"), self.experts)
        spec = read_spec(mixture, self.experts)
        if mixture.endswith((".yaml", ".yml")):
            check_places(spec, mixture, open_path(mixture).read_bytes(), self.allow)
        return spec


def read_settings(given: dict[str, Any]) -> Settings:
    """Check settings that a command was given.

    Raises:
        UsageError: names the setting, the rule and the value.
    """
    try:
        return Settings.model_validate(given)
    except PydanticError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        got = f", got {first['input']!r}" if where else ""
        text = first["msg"].removeprefix("Value error, ")
        raise UsageError(f"{where}: {text[:1].lower()}{text[1:]}{got}" if where else text) from None


def environment_key() -> tuple[str, ...]:
    """The key in ``FLEXMORE_API_KEY``, which leaves the environment, so that no process started later has it."""
    if _is_told_to_ray("FLEXMORE_API_KEY"):
        raise UsageError(
            "FLEXMORE_API_KEY: it came through a runtime_env, which Ray keeps and shows to all who see the cluster; "
            "use a new key, in a file on the node (api_key_file) or in the environment that Ray was started in"
        )
    key = os.environ.pop("FLEXMORE_API_KEY", "")
    return (check_key(key, where="FLEXMORE_API_KEY"),) if key else ()


def _is_told_to_ray(name: str) -> bool:
    """Whether a variable came with the job, or with the application's config, rather than with the node."""
    told = [json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}").get("runtime_env")]
    if ray.is_initialized():
        told.append(ray.get_runtime_context().runtime_env)
    return any(name in ((environment or {}).get("env_vars") or {}) for environment in told)


def check_key(key: str, *, where: str) -> str:
    """A key that a header can carry.

    Raises:
        UsageError: it has other characters than visible ASCII ones, or too few of them.
    """
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UsageError(f"{where}: a key has visible ASCII characters alone, for a header carries no others")
    if len(key) < KEY_CHARACTERS:
        raise UsageError(
            f"{where}: a key has {KEY_CHARACTERS} characters at least, as shorter ones can be guessed, got {len(key)}; "
            "make one with: openssl rand -hex 24"
        )
    return key


def read_keys(file: str | None, *, where: str) -> tuple[str, ...]:
    """The keys of a file, one a line; blank lines and lines that start with # are left out.

    Raises:
        UsageError: the file cannot be read, or holds no key, or one that breaks the rule of `check_key`.
    """
    if file is None:
        return ()
    try:
        with Path(file).open(encoding="ascii") as content:
            text = content.read(_KEY_FILE_BYTES)
    except OSError as error:
        raise UsageError(f"{where}: {file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{where}: {file} has other than ASCII characters; a header carries no others") from None
    keys = tuple(key for line in text.splitlines() if (key := line.strip()) and not key.startswith("#"))
    if not keys:
        raise UsageError(f"{where}: {file} holds no key; write one a line, or leave the option out")
    return tuple(check_key(key, where=f"{where}: {file}") for key in keys)
