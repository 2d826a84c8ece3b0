"""The zoo: tiny worlds of experts and a policy that are trained on the spot, so that a run needs no download."""

from cluster.zoo.paths import ensure, is_zoo, resolve, worlds_named_by, zoo_root
from cluster.zoo.recipe import ZooError, load_recipe, worlds

__all__ = ["ZooError", "ensure", "is_zoo", "load_recipe", "resolve", "worlds", "worlds_named_by", "zoo_root"]
