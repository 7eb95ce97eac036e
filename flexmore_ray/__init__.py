"""FlexMoRE on Ray: mixtures of full-size and low-rank experts, from checkpoint to scores.

Importing this package registers the `flex_more` model type with transformers, and starts neither
Ray nor lm-eval. A process that runs no model sets ``FLEXMORE_LIGHT=1`` to leave transformers out,
which takes seconds to import; expert actors do.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flexmore_ray.mixture import Mixture, load_mixture
    from flexmore_ray.modeling import FlexMoreConfig, FlexMoreForCausalLM
    from flexmore_ray.spec import MixtureSpec

__all__ = ["FlexMoreConfig", "FlexMoreForCausalLM", "Mixture", "MixtureSpec", "load_mixture"]

_WHERE = {
    "FlexMoreConfig": "modeling",
    "FlexMoreForCausalLM": "modeling",
    "Mixture": "mixture",
    "MixtureSpec": "spec",
    "load_mixture": "mixture",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)


if not os.environ.get("FLEXMORE_LIGHT"):
    importlib.import_module(f"{__name__}.modeling")  # registers the model type
