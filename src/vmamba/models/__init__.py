"""The network, its named variants (registered with timm), and its checkpoints."""

from .config import VMambaConfig
from .variants import list_models
from .vmamba import FeatureGetter, VMamba

__all__ = ["FeatureGetter", "VMamba", "VMambaConfig", "list_models"]
