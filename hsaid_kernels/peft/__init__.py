"""HSAID as a method of PEFT: `get_peft_model(model, HSAIDConfig(intrinsic_dim=5000))` (docs/integration.md).

Importing this module registers the method; PEFT can load adapters of it from then on.
"""

NEEDED = "peft >= 0.21"

try:
    import peft
except ImportError as error:
    raise ImportError(f'hsaid_kernels.peft needs {NEEDED}: pip install "hsaid_kernels[peft]"') from error

try:
    # What is newest of what is used: from 0.21 on, a method says itself which values are its own.
    from peft.tuners.tuners_utils import BaseTuner

    BaseTuner._get_adapter_state_dict, BaseTuner._remap_adapter_state_dict_for_load  # noqa: B018
except (ImportError, AttributeError) as error:
    raise ImportError(f"hsaid_kernels.peft: expected {NEEDED}, got {peft.__version__}: pip install -U peft") from error

from hsaid_kernels.peft.config import HSAIDConfig  # noqa: E402
from hsaid_kernels.peft.tuner import HSAIDModel, register  # noqa: E402

__all__ = ["HSAIDConfig", "HSAIDModel"]

register()
