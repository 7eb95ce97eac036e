"""The application: ingress replicas in front of mixture replicas, and of experts placed on their own behind those.

    serve run serve.app:build_app mixture=winner.yaml
    serve deploy config.yaml                                # see serve/config.yaml

Serve reads the annotations of `build_app`, so this module has real ones.
"""

import dataclasses
import ipaddress
import warnings
from pathlib import Path
from typing import Any, cast

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, BackpressureConfig
from ray.serve.schema import LoggingConfig
from transformers import PreTrainedTokenizerFast

from flexmore_ray.errors import FlexmoreError, UsageError
from flexmore_ray.mixture import Parts, load_tokenizer
from flexmore_ray.placement import Needs, check_room
from flexmore_ray.runtime import cluster, nodes, on_running_cluster
from flexmore_ray.source import Guest, absent_experts
from flexmore_ray.spec import FULL, MixtureSpec
from serve.deployment import LEASE_LIFETIME_SECONDS, ExpertReplica, MakeEngine, MixtureReplica, load_engine
from serve.expert import given_sources, introduce, open_shared
from serve.gate import key_digest
from serve.ingress import Front, Ingress
from serve.service import Description, ExpertInfo, HttpSettings
from serve.settings import Settings, environment_key, read_keys
from serve.transport import replica_environment

LOOK_BACK_SECONDS = 5.0  # over which Serve averages the load
REPORT_SECONDS = 1.0  # between two reports of it; Serve's own 10 would also delay the start from no replica
RETRY_AFTER_SECONDS = 1.0
_INGRESS_REQUESTS = 4096  # connections of an ingress replica; what the mixture does not take, the replica tells 429
_CONTROLLER_SECONDS = 30.0
_LEASES = 1000  # of one replica of an expert
_OWNER_SECONDS = 300.0  # for the nodes of owners to have a process free, and to read their experts once


def build_app(args: Settings) -> serve.Application:
    """The application, for ``serve run``, a Serve config file or `serve.run`.

    The mixture file is read here, and what has to be computed of its weights is computed here, once.

    Raises:
        FlexmoreError: the mixture cannot be made, or a setting breaks its rule.
    """
    api_keys = (*read_keys(args.api_key_file, where="api_key_file"), *environment_key())
    if args.require_key and not api_keys:
        _check_loopback()
    return bind(
        args,
        api_keys=tuple(map(key_digest, api_keys)),
        admin_keys=tuple(map(key_digest, read_keys(args.admin_key_file, where="admin_key_file"))),
    )


def _check_loopback() -> None:
    """Refuse to be put, without a key, where Serve listens for other machines too.

    Raises:
        UsageError: it does.
    """
    if not ray.is_initialized():
        return
    try:
        controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:  # Serve starts after this, with its default, the loopback
        return
    config: Any = ray.get(controller.get_http_config.remote(), timeout=_CONTROLLER_SECONDS)
    host = config.host
    if host and host != "localhost" and not ipaddress.ip_address(host).is_loopback:
        raise UsageError(
            f"api_key_file: Serve listens on {host}, for other machines too, and there is no key; name a file of keys, "
            "or set http_options.host to 127.0.0.1, or require_key to false where something in front asks for keys"
        )


def bind(
    settings: Settings,
    *,
    api_keys: tuple[str, ...] = (),
    admin_keys: tuple[str, ...] = (),
    make_engine: MakeEngine = load_engine,
) -> serve.Application:
    """`build_app` with the digests of keys in place of their files.

    Args:
        settings: of the application.
        api_keys: digests of keys for the API; none means that no key is needed.
        admin_keys: digests of keys for the admin endpoints; none closes them.
        make_engine: what answers requests.

    Raises:
        FlexmoreError: the mixture cannot be made, or a setting breaks its rule.
    """
    given = settings.spec()
    guests = ask_owners(given)
    parts = open_shared(given, guests, verify=True)
    prepare(parts)
    spec = dataclasses.replace(parts.spec, mixture_id=parts.identified().mixture_id)
    http = HttpSettings(
        model=settings.model_name,
        max_model_len=_model_length(settings, parts),
        vocab_size=parts.source.shape.vocab_size,
        api_keys=api_keys,
        admin_keys=admin_keys,
        max_body_bytes=settings.max_body_bytes,
        request_timeout_s=settings.request_timeout_s,
        retry_after_s=RETRY_AFTER_SECONDS,
    )
    front = Front(
        http=http,
        description=describe(parts, str(spec.mixture_id)),
        tokenizer=cast(PreTrainedTokenizerFast, load_tokenizer(parts.source)),
        scales_to_zero=settings.min_replicas == 0,
    )
    own = {
        name: _deployment(ExpertReplica, _expert_options(name, need, settings), spec, settings, name, guests.get(name))
        for name, need in needs(settings, spec).items()
        if name in spec.own
    }
    mixture = _deployment(MixtureReplica, _mixture_options(settings), spec, settings, own, guests, make_engine)
    return _deployment(serve.ingress()(Ingress), _ingress_options(settings), front, mixture)


def _deployment(kind: Any, options: dict[str, Any], *args: Any) -> serve.Application:
    deployment: Any = serve.deployment(kind)
    application: serve.Application = deployment.options(**options).bind(*args)
    return application


def needs(settings: Settings, spec: MixtureSpec) -> dict[str, Needs]:
    """What one replica of each kind asks of a node: "mixture", and each expert placed on its own by its name."""
    expert = Needs(num_cpus=settings.expert_cpus, num_gpus=settings.expert_gpus)
    return {
        "mixture": Needs(num_cpus=settings.cpus, num_gpus=settings.gpus),
        **{name: dataclasses.replace(expert, pin=nodes) for name, nodes in spec.own.items()},
    }


def ask_owners(spec: MixtureSpec) -> dict[str, Guest]:
    """Of experts pinned to nodes whose folder is not here: what these nodes find there; see `serve.expert`.

    Raises:
        FlexmoreError: there is no cluster to ask, it has no such node, that node cannot open the folder, or it does
            not answer within 5 minutes.
    """
    absent = absent_experts(given_sources(spec), [name for name, pin in spec.own.items() if pin])
    if not absent:
        return {}
    if not (ray.is_initialized() or on_running_cluster()):
        raise UsageError(f"{absent[0]}: its folder is not here, and RAY_ADDRESS names no cluster whose nodes have it")
    with cluster():
        pins = {name: Needs(pin=spec.own[name]) for name in absent}
        check_room(pins, nodes())
        ask = ray.remote(introduce)
        tasks = {name: ask.options(**pin.options()).remote(spec, name) for name, pin in pins.items()}
        guests: dict[str, Guest] = {}
        for name, task in tasks.items():
            try:
                told = ray.get(task, timeout=_OWNER_SECONDS)
            except RayError as error:  # a time-out too
                reason = str(error).strip().rpartition("\n")[2][:200]
                raise FlexmoreError(f"{name}: the nodes of its owner do not tell of it ({reason})") from error
            if isinstance(told, FlexmoreError):
                raise FlexmoreError(f"{name}: on the nodes of its owner, {told}")
            guests[name] = told
    return guests


def prepare(parts: Parts) -> None:
    """Decompose the source now, where ranks need it and no store has it; replicas then find the result.

    Experts placed on their own are left to their own replicas.
    """
    born, own = parts.source.born_ranks, parts.spec.own
    keys = (key for key in parts.matrix_keys() if key.expert not in own)
    cut = (key for key in keys if parts.assignment.rank(key) not in (FULL, born.get(key)))
    if (key := next(cut, None)) is not None:
        parts.piece(key)


def describe(parts: Parts, mixture_id: str) -> Description:
    """What clients are told of the mixture. The same every time, so that a redeployment restarts nothing."""
    count, spec = parts.count(), parts.spec
    return Description(
        mixture_id=mixture_id,
        experts=tuple(
            ExpertInfo(
                name=name,
                rank=parts.assignment.compact(name),
                parameters=count.experts[name],
                placement="own" if name in spec.own else "local",
            )
            for name in parts.assignment.ranks
        ),
        parameters={"total": count.total, "active": count.active, "full": count.full_total},
        active=parts.assignment.active,
        source=tuple(map(_told, spec.source or ((spec.store,) if spec.store else ()))),
    )


def _told(source: str) -> str:
    """What clients are told of a SOURCE: its name, and not where it lies on the disks of who serves it."""
    name, equals, place = source.rpartition("=")
    return source if place.startswith("zoo://") else f"{name}{equals}{Path(place).name}"


def _model_length(settings: Settings, parts: Parts) -> int:
    most = int(parts.source.config["max_position_embeddings"])
    length = settings.max_model_len or most
    if length > most:
        raise UsageError(f"max_model_len: at most {most:,}, what the model was made for, got {length:,}")
    return length


# ------------------------------------------------------------------------------- options of the deployments


def _common(settings: Settings) -> dict[str, Any]:
    return {
        "health_check_period_s": 2.0,
        "health_check_timeout_s": 30.0,
        "graceful_shutdown_wait_loop_s": 0.5,
        "graceful_shutdown_timeout_s": settings.request_timeout_s,  # what is in flight is finished
        "logging_config": LoggingConfig(enable_access_log=False),
        "backpressure_config": BackpressureConfig(status_code=429, retry_after_s=RETRY_AFTER_SECONDS),
    }


def _ingress_options(settings: Settings) -> dict[str, Any]:
    return {
        **_common(settings),
        "name": "ingress",
        "num_replicas": settings.ingress_replicas,
        "max_ongoing_requests": _INGRESS_REQUESTS,
        "max_queued_requests": _INGRESS_REQUESTS,
        "ray_actor_options": {"num_cpus": 0, **replica_environment(FLEXMORE_LIGHT="1")},
    }


def _mixture_options(settings: Settings) -> dict[str, Any]:
    return {
        **_common(settings),
        **_replicas(settings, settings.min_replicas, settings.max_replicas, settings.target_ongoing_requests),
        "name": "mixture",
        "max_ongoing_requests": settings.max_ongoing_requests,
        "max_queued_requests": settings.max_queued_requests,
        "ray_actor_options": {
            **Needs(num_cpus=settings.cpus, num_gpus=settings.gpus).options(),
            **replica_environment(),
        },
    }


def _expert_options(name: str, need: Needs, settings: Settings) -> dict[str, Any]:
    policy = AutoscalingPolicy(policy_function="serve.deployment:scale_by_busy_share")
    least, most = settings.expert_min_replicas, settings.expert_max_replicas
    return {
        **_common(settings),
        **_replicas(settings, least, most, settings.expert_target_busy, policy=policy),
        "name": f"expert-{name}",
        "max_ongoing_requests": _LEASES,
        "graceful_shutdown_timeout_s": 2 * LEASE_LIFETIME_SECONDS,  # within which every lease has moved on
        "ray_actor_options": {**need.options(), **replica_environment()},
    }


def _replicas(settings: Settings, least: int, most: int, target: float, **more: Any) -> dict[str, Any]:
    """Autoscaling between two numbers of replicas, or just so many."""
    if least == most:
        return {"num_replicas": most}
    with warnings.catch_warnings():  # that environment variables will replace the interval, which 2.60 does not read
        warnings.simplefilter("ignore", DeprecationWarning)
        scaling = AutoscalingConfig(
            min_replicas=least,
            max_replicas=most,
            target_ongoing_requests=target,
            upscale_delay_s=settings.upscale_delay_s,
            downscale_delay_s=settings.downscale_delay_s,
            metrics_interval_s=REPORT_SECONDS,
            look_back_period_s=LOOK_BACK_SECONDS,
            **more,
        )
    return {"num_replicas": None, "autoscaling_config": scaling}
