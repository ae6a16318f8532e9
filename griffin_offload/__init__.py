"""Run language models larger than the device: streamed once per prompt, generated on the device.

Names are imported when they are used, so that `griffin-offload --help` needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from griffin_offload.blocks.layouts import FeedForwardLayout, register_block, register_layout
    from griffin_offload.config import LoadConfig
    from griffin_offload.engine.model import GriffinModel
    from griffin_offload.engine.report import PrefillReport, RunReport
    from griffin_offload.engine.structure import Structure
    from griffin_offload.errors import BudgetExceeded, DoesNotFit, GriffinError, ModelError, UsageError
    from griffin_offload.planner.plan import Plan

__version__ = "0.1.0"

_HOMES = {
    "BudgetExceeded": "errors",
    "DoesNotFit": "errors",
    "FeedForwardLayout": "blocks.layouts",
    "GriffinError": "errors",
    "GriffinModel": "engine.model",
    "LoadConfig": "config",
    "ModelError": "errors",
    "Plan": "planner.plan",
    "PrefillReport": "engine.report",
    "RunReport": "engine.report",
    "Structure": "engine.structure",
    "UsageError": "errors",
    "register_block": "blocks.layouts",
    "register_layout": "blocks.layouts",
}
__all__ = [
    "BudgetExceeded",
    "DoesNotFit",
    "FeedForwardLayout",
    "GriffinError",
    "GriffinModel",
    "LoadConfig",
    "ModelError",
    "Plan",
    "PrefillReport",
    "RunReport",
    "Structure",
    "UsageError",
    "__version__",
    "register_block",
    "register_layout",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
