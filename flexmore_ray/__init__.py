"""FlexMoRE on Ray: mixtures of full-size and low-rank experts, from checkpoint to scores.

Importing this package registers the `flex_more` model type with transformers, and starts neither
Ray nor lm-eval.
"""

from flexmore_ray.mixture import Mixture, load_mixture
from flexmore_ray.modeling import FlexMoreConfig, FlexMoreForCausalLM
from flexmore_ray.spec import MixtureSpec

__all__ = ["FlexMoreConfig", "FlexMoreForCausalLM", "Mixture", "MixtureSpec", "load_mixture"]
