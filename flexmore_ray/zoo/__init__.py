"""The embedded mixture ``zoo://nano``: seven trained experts, their tokenizer, their texts and their scores."""

from __future__ import annotations

import json
import shutil
from itertools import islice
from pathlib import Path

from flexmore_ray.errors import UsageError
from flexmore_ray.zoo.domains import EXPERTS, document_text, training_documents

_FOLDERS = {"nano": Path(__file__).parent / "nano"}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def zoo_path(name: str = "nano") -> Path:
    """Folder of an embedded mixture, a FlexOlmo checkpoint.

    Raises:
        UsageError: there is no mixture of that name.
    """
    if name not in _FOLDERS:
        raise UsageError(
            f"zoo://{name}: no such embedded mixture; there is {', '.join(f'zoo://{n}' for n in _FOLDERS)}"
        )
    return _FOLDERS[name]


def domain_text(expert: str, count: int = 2000, seed: int = 0) -> list[str]:
    """The first ``count`` training documents of an expert's domain, decided by ``(expert, seed)``.

    Raises:
        UsageError: no expert has that name.
    """
    _check_expert(expert, EXPERTS)
    return [document_text(lines) for lines in islice(training_documents(expert, seed), count)]


def write_domain_text(expert: str, path: str | Path, count: int = 2000, seed: int = 0) -> None:
    r"""Write a domain's first training documents as a file for ``--data``.

    A file whose name ends with ``.jsonl`` has a question and its answer a line, as ``prompt`` and ``completion``; any
    other one is `domain_text`, a document a line, with line breaks as ``\n``.
    """
    if Path(path).suffix == ".jsonl":
        _check_expert(expert, EXPERTS)
        pairs = [
            {"prompt": line.context, "completion": document_text([line])[len(line.context) :]}
            for document in islice(training_documents(expert, seed), count)
            for line in document
        ]
        Path(path).write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
        return
    escaped = (text.replace("\\", "\\\\").replace("\n", "\\n") for text in domain_text(expert, count, seed))
    Path(path).write_text("".join(line + "\n" for line in escaped), encoding="utf-8")


def write_pair(expert: str, folder: str | Path, name: str = "nano") -> Path:
    """Write the two-expert FlexOlmo checkpoint of one domain, as it was before the merge.

    Args:
        expert: a domain expert of the mixture.
        folder: where to write; made if it is not there.
        name: the mixture.

    Returns:
        The folder: public expert, that expert, their two router rows as trained in isolation, tokenizer.

    Raises:
        UsageError: the mixture or the expert does not exist, or the expert is the public one.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    source = zoo_path(name)
    config = json.loads((source / "config.json").read_text())
    names = config["expert_names"]
    _check_expert(expert, names[1:])
    index = names.index(expert)
    tensors = {}
    with safe_open(source / "routers.safetensors", "pt") as routers:
        rows = routers.get_tensor(expert)
    with safe_open(source / "model.safetensors", "pt") as model:
        for key in model.keys():  # noqa: SIM118  (safe_open is no mapping)
            before, is_expert, after = key.partition(".mlp.experts.")
            number, _, matrix = after.partition(".")
            if key.endswith(".mlp.gate.weight"):
                tensors[key] = rows[int(key.split(".")[2])].contiguous()
            elif not is_expert:
                tensors[key] = model.get_tensor(key)
            elif int(number) in (0, index):
                tensors[f"{before}{is_expert}{0 if number == '0' else 1}.{matrix}"] = model.get_tensor(key)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config |= {"num_experts": 2, "num_experts_per_tok": 2, "expert_names": ["public", expert]}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for file in _TOKENIZER_FILES:
        shutil.copyfile(source / file, folder / file)
    return folder


def _check_expert(expert: str, names: tuple[str, ...] | list[str]) -> None:
    if expert not in names:
        raise UsageError(f"the zoo has no expert {expert!r} here; choose one of {', '.join(names)}")
