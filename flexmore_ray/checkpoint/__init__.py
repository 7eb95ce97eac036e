"""Checkpoints on disk, read lazily. Only this package knows tensor names and layouts.

A `Checkpoint` is one folder in any layout that FlexOlmo and FlexMoRE models are found in; an
`Adapter` is a PEFT LoRA on the public model's MLP. Nothing reads a tensor before it is asked for,
and no method holds more than the tensor it returns.

    layout        tensors of expert E in layer L, under model.layers.L.mlp.
    per-expert    experts.E.{gate,up,down}_proj.weight
    fused         experts.gate_up_proj (E, 2I, H), experts.down_proj (E, H, I)
    flex_more     per-expert, or experts.E.{gate,up,down}_proj_{a,b}.weight for a low-rank matrix
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flexmore_ray.errors import CheckpointError
from flexmore_ray.spec import PROJECTIONS, ModelShape
from flexmore_ray.spectra import Factors
from flexmore_ray.storage import AnyPath, StorageError
from flexmore_ray.storage.cache import local_file

MODEL_TYPES = ("flex_olmo", "flex_more")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "chat_template*")
_JSON_BYTES = 64 << 20  # the index of a checkpoint of a million tensors is smaller
_MOST = {"num_layers": 10_000, "num_experts": 10_000}
_QUANTIFIER = re.compile(r"[*+?{]")


# ----------------------------------------------------------------------------- tensor names


def expert_tensor(layer: int, expert: int, projection: str, part: str = "") -> str:
    """Per-expert tensor name; `part` is "" for the dense matrix, "_a" or "_b" for a factor."""
    return f"model.layers.{layer}.mlp.experts.{expert}.{projection}{part}.weight"


def router_tensor(layer: int) -> str:
    """Router matrix of one layer, one row per expert."""
    return f"model.layers.{layer}.mlp.gate.weight"


def fused_tensor(layer: int, projection: str) -> str:
    """Fused tensor that holds a projection of all experts."""
    return f"model.layers.{layer}.mlp.experts.{'down_proj' if projection == 'down_proj' else 'gate_up_proj'}"


def shared_tensors(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that all experts share: all but experts and router."""
    d, query, key = shape.hidden_size, shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab_size, d)}
    for layer in range(shape.num_layers):
        attention = f"model.layers.{layer}.self_attn"
        out |= {
            f"{attention}.q_proj.weight": (query, d),
            f"{attention}.k_proj.weight": (key, d),
            f"{attention}.v_proj.weight": (key, d),
            f"{attention}.o_proj.weight": (d, query),
            f"{attention}.q_norm.weight": (query,),
            f"{attention}.k_norm.weight": (key,),
            f"model.layers.{layer}.post_attention_layernorm.weight": (d,),
            f"model.layers.{layer}.post_feedforward_layernorm.weight": (d,),
        }
    out["model.norm.weight"] = (d,)
    return out if shape.tied else out | {"lm_head.weight": (shape.vocab_size, d)}


# --------------------------------------------------------------------------------- reading


def read_json(path: AnyPath) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: the file is missing or holds something else.
    """
    try:
        if path.stat().st_size > _JSON_BYTES:
            raise ValueError(f"it has more than {_JSON_BYTES:,} bytes")
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: no {path.name}; a checkpoint folder has one") from None
    except StorageError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: a JSON object is needed, got {type(data).__name__}")
    return data


def open_safetensors(path: AnyPath) -> Any:
    """Open one safetensors file for lazy reading.

    Raises:
        CheckpointError: the file is missing, truncated or not safetensors.
    """
    try:
        return safe_open(str(local_file(path)), framework="pt")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: the file is missing; copy the checkpoint again") from None
    except StorageError:
        raise
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: damaged or not safetensors ({reason}); copy it again") from None


class TensorFolder:
    """The tensors of a folder with one ``*.safetensors`` file, or shards and an index.

    Raises:
        CheckpointError: a file is missing or damaged, or the index and the files disagree.
    """

    def __init__(self, folder: AnyPath, stem: str = "model") -> None:
        self.folder = folder
        index = folder / f"{stem}.safetensors.index.json"
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise CheckpointError(f"{index}: no weight_map; the index is damaged")
            for file in weight_map.values():
                if not isinstance(file, str) or file in ("", "..") or Path(file).name != file:
                    raise CheckpointError(f"{index}: a tensor's file is a file of this folder, got {str(file)[:80]!r}")
            self._file_of: dict[str, str] = weight_map
        else:
            name = f"{stem}.safetensors"
            if not (folder / name).exists():
                raise CheckpointError(f"{folder}: no {name} and no {index.name}; nothing to read weights from")
            self._file_of = dict.fromkeys(open_safetensors(folder / name).keys(), name)
        self._open = {name: open_safetensors(folder / name) for name in sorted(set(self._file_of.values()))}
        held = {name: set(file.keys()) for name, file in self._open.items()}
        for tensor, name in self._file_of.items():
            if tensor not in held[name]:
                raise CheckpointError(f"{folder / name}: tensor {tensor} is missing, though the index promises it")

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def names(self) -> list[str]:
        """All tensor names."""
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header alone."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of a tensor, from the header alone."""
        stored = self._slice(name).get_dtype()
        if stored not in _STORED:
            known = ", ".join(_STORED)
            raise CheckpointError(f"{self.folder}: tensor {name} is stored as {stored}; readable are {known}")
        return _STORED[stored]

    def require(self, name: str, shape: tuple[int, ...]) -> None:
        """Check that a tensor is there with this shape and a floating-point dtype."""
        if self.shape(name) != shape:
            raise CheckpointError(
                f"{self.folder}: tensor {name} has shape {self.shape(name)}, the config asks for {shape}"
            )
        self.dtype(name)

    def read(self, name: str, index: Any = ...) -> Tensor:
        """Read a tensor, or the part of it that `index` selects, and check that it is finite."""
        values: Tensor = self._slice(name)[index]
        if not torch.isfinite(values).all():
            raise CheckpointError(f"{self.folder}: tensor {name} holds NaN or infinity; the weights are damaged")
        return values

    def _slice(self, name: str) -> Any:
        if name not in self._file_of:
            raise CheckpointError(f"{self.folder}: tensor {name} is missing; the checkpoint is incomplete")
        return self._open[self._file_of[name]].get_slice(name)


class Checkpoint:
    """One FlexOlmo or FlexMoRE folder with N experts; expert 0 is the public one.

    Raises:
        CheckpointError: the folder is missing, incomplete, damaged or of another model type.
    """

    def __init__(self, folder: AnyPath) -> None:
        if folder.is_file():
            raise CheckpointError(f"{folder}: a checkpoint is a folder, this is a file; a mixture file ends in .yaml")
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder")
        if (folder / "manifest.json").exists():
            raise CheckpointError(f"{folder}: a store, not a checkpoint; name it in a mixture file as store: {folder}")
        self.folder = folder
        self.config = read_json(folder / "config.json")
        model_type = self.config.get("model_type")
        if model_type not in MODEL_TYPES:
            raise CheckpointError(f"{folder}: model_type is {model_type!r}, needed is one of {', '.join(MODEL_TYPES)}")
        try:
            self.shape = ModelShape.from_config(self.config)
            self.num_experts = int(self.config["num_experts"])
            active = int(self.config.get("num_experts_per_tok") or 1)
        except (KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
            raise CheckpointError(f"{folder}/config.json: missing or unusable entry: {error}") from None
        sizes = dataclasses.asdict(self.shape) | {"num_experts": self.num_experts}
        for name, size in sizes.items():
            most = _MOST.get(name, 2**31)
            if not isinstance(size, int) or size > most:
                got = str(size)[:40]
                raise CheckpointError(f"{folder}/config.json: {name} is an integer up to {most:,}, got {got}")
        if self.shape.num_layers < 1 or not 1 <= active <= self.num_experts:
            raise CheckpointError(
                f"{folder}/config.json: at least 1 layer and 1 to num_experts experts per token are needed, got "
                f"{self.shape.num_layers} layers, {active} of {self.num_experts} experts"
            )
        self.tensors = TensorFolder(folder)
        self._check()

    @property
    def layout(self) -> str:
        """How experts are stored: "per-expert", "fused" or "flex_more"."""
        if fused_tensor(0, "gate_proj") in self.tensors:
            return "fused"
        return "flex_more" if self.config["model_type"] == "flex_more" else "per-expert"

    @property
    def dtype(self) -> torch.dtype:
        """Stored dtype of the public expert."""
        fused = self.layout == "fused"
        return self.tensors.dtype(fused_tensor(0, "down_proj") if fused else expert_tensor(0, 0, "down_proj"))

    @property
    def names(self) -> tuple[str, ...]:
        """Expert names: the config's ``expert_names``, else public, expert-1, expert-2, ..."""
        names = self.config.get("expert_names")
        if names is not None and not isinstance(names, list):
            raise CheckpointError(f"{self.folder}/config.json: expert_names is a list, got {str(names)[:40]}")
        return tuple(names) if names else ("public", *(f"expert-{i}" for i in range(1, self.num_experts)))

    def shared(self, name: str) -> Tensor:
        """A tensor that all experts share."""
        return self.tensors.read(name)

    def router(self, layer: int) -> Tensor:
        """Router matrix (num_experts, hidden) of one layer."""
        return self.tensors.read(router_tensor(layer))

    def weight(self, expert: int, layer: int, projection: str) -> Tensor:
        """Dense matrix (out, in); a low-rank one is put together from its base and factors."""
        if self.layout == "fused":
            return self.tensors.read(fused_tensor(layer, projection), self._fused_part(expert, projection))
        name = expert_tensor(layer, expert, projection)
        if name in self.tensors or not self._is_pair(expert, layer, projection):
            return self.tensors.read(name)
        base = self.weight(self._base(expert), layer, projection)
        pair = self._own_factors(expert, layer, projection)
        return (base.float() + pair.dense()).to(base.dtype)

    def factors(self, expert: int, layer: int, projection: str) -> Factors | None:
        """Factors of a matrix that is a correction of the public expert; None if it is dense.

        A correction of a correction (``expert_bases``) is one correction with the factors of
        the whole chain concatenated; the scaling alpha / rank is multiplied into lora_b.
        """
        chain = []
        while expert != 0:
            if not self._is_pair(expert, layer, projection):
                return None
            chain.append(self._own_factors(expert, layer, projection))
            expert = self._base(expert)
        if not chain:
            return None
        return Factors(a=torch.cat([f.a for f in chain]), bt=torch.cat([f.bt for f in chain]))

    def rank(self, expert: int, layer: int, projection: str) -> int | None:
        """Rank of a matrix stored low-rank, whole chain of bases included; None if it is dense."""
        total = 0
        while expert != 0:
            if not self._is_pair(expert, layer, projection):
                return None
            total += self.tensors.shape(expert_tensor(layer, expert, projection, "_a"))[0]
            expert = self._base(expert)
        return total or None

    def _is_pair(self, expert: int, layer: int, projection: str) -> bool:
        return expert_tensor(layer, expert, projection, "_a") in self.tensors

    def _base(self, expert: int) -> int:
        bases = self.config.get("expert_bases")
        return int(bases[expert] or 0) if bases else 0

    def _own_factors(self, expert: int, layer: int, projection: str) -> Factors:
        a = self.tensors.read(expert_tensor(layer, expert, projection, "_a"))
        b = self.tensors.read(expert_tensor(layer, expert, projection, "_b"))
        scale = self._scale(expert)
        return Factors(a=a, bt=(b if scale == 1.0 else b * scale).T.contiguous())

    def _scale(self, expert: int) -> float:
        """alpha / rank; 1 where the config has none, or gives the expert a rank per matrix."""
        alphas, ranks = self.config.get("expert_alphas"), self.config.get("expert_ranks")
        if not alphas or not ranks or str(expert) in (self.config.get("expert_rank_pattern") or {}):
            return 1.0
        return float(alphas[expert]) / int(ranks[expert]) if alphas[expert] and ranks[expert] else 1.0

    def _fused_part(self, expert: int, projection: str) -> Any:
        inner = self.shape.intermediate_size
        rows = {"gate_proj": slice(0, inner), "up_proj": slice(inner, 2 * inner), "down_proj": slice(None)}
        return expert, rows[projection]

    def _check(self) -> None:
        """Check names and shapes of all tensors against the config, from the headers alone."""
        self._check_bases()
        for name, shape in shared_tensors(self.shape).items():
            self.tensors.require(name, shape)
        if len(self.names) != self.num_experts:
            raise CheckpointError(f"{self.folder}: {self.num_experts} experts but names {list(self.names)}")
        for layer in range(self.shape.num_layers):
            self.tensors.require(router_tensor(layer), (self.num_experts, self.shape.hidden_size))
            if self.layout == "fused":
                inner, hidden = self.shape.matrix("gate_proj")
                self.tensors.require(fused_tensor(layer, "gate_proj"), (self.num_experts, 2 * inner, hidden))
                self.tensors.require(fused_tensor(layer, "down_proj"), (self.num_experts, hidden, inner))
                continue
            for expert in range(self.num_experts):
                for projection in PROJECTIONS:
                    self._check_matrix(expert, layer, projection)

    def _check_matrix(self, expert: int, layer: int, projection: str) -> None:
        out, columns = self.shape.matrix(projection)
        if expert == 0 or not self._is_pair(expert, layer, projection):
            self.tensors.require(expert_tensor(layer, expert, projection), (out, columns))
            return
        rank = self._declared_rank(expert, layer, projection)
        self.tensors.require(expert_tensor(layer, expert, projection, "_a"), (rank, columns))
        self.tensors.require(expert_tensor(layer, expert, projection, "_b"), (out, rank))

    def _declared_rank(self, expert: int, layer: int, projection: str) -> int:
        """The rank that the config gives a low-rank matrix."""
        try:
            pattern = (self.config.get("expert_rank_pattern") or {}).get(str(expert))
            return int(pattern[projection][layer] if pattern else self.config["expert_ranks"][expert])
        except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self.folder}/config.json: no usable rank of expert {expert}: {error!r}") from None

    def _check_bases(self) -> None:
        """Every chain of ``expert_bases`` must end, within the experts there are."""
        for key in ("expert_bases", "expert_ranks", "expert_alphas"):
            values = self.config.get(key)
            if values is not None and (not isinstance(values, list) or len(values) != self.num_experts):
                raise CheckpointError(f"{self.folder}/config.json: {key} needs one entry per expert, got {values!r}")
            if any(not isinstance(value, int | float | None) for value in values or []):
                raise CheckpointError(f"{self.folder}/config.json: {key} holds numbers, got {values!r}")
        for expert in range(self.num_experts):
            seen = [expert]
            while seen[-1] != 0:
                base = self._base(seen[-1])
                if base in seen or not 0 <= base < self.num_experts:
                    raise CheckpointError(
                        f"{self.folder}/config.json: expert_bases form a loop or leave the list at {base}"
                    )
                seen.append(base)


class Adapter:
    """A PEFT LoRA adapter on the public model's MLP: an expert that was born low-rank.

    It has no router row of its own unless its folder holds ``router.safetensors`` with a tensor
    ``router`` (layers, hidden), as our own PEFT export writes it.

    Raises:
        CheckpointError: the folder is not a LoRA adapter on gate, up and down projections.
    """

    def __init__(self, folder: AnyPath) -> None:
        self.folder = folder
        self.config = read_json(folder / "adapter_config.json")
        if self.config.get("peft_type") != "LORA" or self.config.get("use_dora"):
            raise CheckpointError(f"{folder}: a plain LoRA adapter is needed, got {self.config.get('peft_type')!r}")
        self.tensors = TensorFolder(folder, "adapter_model")
        self._prefix = self._find_prefix()

    def factors(self, layer: int, projection: str) -> Factors:
        """Factors (scaling included) of one matrix.

        Raises:
            CheckpointError: the adapter has none for it.
        """
        module = f"model.layers.{layer}.mlp.{projection}"
        name = f"{self._prefix}{module}.lora_A.weight"
        if name not in self.tensors:
            raise CheckpointError(f"{self.folder}: the adapter has no {module}; it must cover the whole MLP")
        a = self.tensors.read(name)
        b = self.tensors.read(f"{self._prefix}{module}.lora_B.weight")
        scale = self._scale(module, a.shape[0])
        return Factors(a=a, bt=(b * scale if scale != 1.0 else b).T.contiguous())

    def rank(self, layer: int, projection: str) -> int:
        """Rank of the adapter at one matrix."""
        return self.tensors.shape(f"{self._prefix}model.layers.{layer}.mlp.{projection}.lora_A.weight")[0]

    def router_row(self, layer: int) -> Tensor | None:
        """The adapter's router row in one layer, where its folder holds one."""
        if not (self.folder / "router.safetensors").exists():
            return None
        return TensorFolder(self.folder, "router").read("router", layer)

    def check(self, shape: ModelShape) -> None:
        """Check that the adapter fits a model of this shape, covering every MLP matrix."""
        if (self.folder / "router.safetensors").exists():
            TensorFolder(self.folder, "router").require("router", (shape.num_layers, shape.hidden_size))
        known = set()
        for key in shape.keys("expert"):
            out, columns = shape.matrix(key.projection)
            stem = f"{self._prefix}model.layers.{key.layer}.mlp.{key.projection}"
            rank = self.tensors.shape(f"{stem}.lora_A.weight")[0]
            self.tensors.require(f"{stem}.lora_A.weight", (rank, columns))
            self.tensors.require(f"{stem}.lora_B.weight", (out, rank))
            known |= {f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"}
        if other := sorted(set(self.tensors.names()) - known):
            raise CheckpointError(
                f"{self.folder}: the adapter also changes {other[0]}; an expert may only change the MLP"
            )

    def _find_prefix(self) -> str:
        for name in self.tensors.names():
            if match := re.match(r"(.*?)model\.layers\.\d+\.mlp\.", name):
                return match[1]
        raise CheckpointError(f"{self.folder}: the adapter has no tensor on model.layers.*.mlp")

    def _scale(self, module: str, rank: int) -> float:
        alpha = _pattern(self.config.get("alpha_pattern"), module, self.config.get("lora_alpha", rank))
        if isinstance(alpha, bool) or not isinstance(alpha, int | float):
            raise CheckpointError(f"{self.folder}/adapter_config.json: lora_alpha is a number, got {alpha!r}")
        return float(alpha) / (rank**0.5 if self.config.get("use_rslora") else rank)


def _pattern(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rank_pattern and alpha_pattern: the first key that matches the end of a module's name."""
    if not isinstance(pattern, Mapping | None):
        raise CheckpointError(f"adapter_config.json: a pattern is a mapping from modules to values, got {pattern!r}")
    for key, value in (pattern or {}).items():
        if len(_QUANTIFIER.findall(key)) > 2 or re.search(r"\)[*+?{]", key):  # which may take for ever
            rule = "a pattern repeats something twice at most, and no group"
            raise CheckpointError(f"adapter_config.json: {rule}, got {key[:80]!r}")
        try:
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        except (re.error, OverflowError) as error:
            raise CheckpointError(f"adapter_config.json: {key[:80]!r} is no pattern: {error}") from None
    return default


def digest(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of tensors: dtype, shape and bytes of each in turn."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        sha.update(tensor.contiguous().view(torch.uint8).flatten().numpy().data)
    return sha.hexdigest()
