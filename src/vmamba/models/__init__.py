"""The network, its named variants (registered with timm), and its checkpoints."""

from .ablations import ABLATIONS, Ablation, create_ablation
from .checkpoint import convert, load_checkpoint, read_checkpoint, save_checkpoint
from .config import VMambaConfig
from .official import from_official
from .upernet import UPerNet, create_upernet, upernet_from_checkpoint
from .variants import list_models
from .vmamba import FeatureGetter, VMamba

__all__ = [
    "ABLATIONS",
    "Ablation",
    "FeatureGetter",
    "UPerNet",
    "VMamba",
    "VMambaConfig",
    "convert",
    "create_ablation",
    "create_upernet",
    "from_official",
    "list_models",
    "load_checkpoint",
    "read_checkpoint",
    "save_checkpoint",
    "upernet_from_checkpoint",
]
