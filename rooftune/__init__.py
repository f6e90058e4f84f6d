"""rooftune: races competing kernels, tunes them to the hardware's roof, tells the truth about the result.

>>> import rooftune
>>> rooftune.ops()
('attention', 'attention_bwd', 'gemm', 'layernorm', 'layernorm_bwd', 'softmax', 'softmax_bwd')
>>> fast = rooftune.best("softmax[m=4096,n=1024]")     # doctest: +SKIP
>>> fast(out, x)                                       # doctest: +SKIP
>>> y = rooftune.call("softmax", x)                    # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_here = Path(__file__).resolve().parent
if not (_here / "kernels").is_dir():  # a clone without symbolic links (Windows): the folders lie beside us
    __path__.append(str(_here.parent))

if TYPE_CHECKING:
    from rooftune.api import compare, ops, run, tune
    from rooftune.autotune.production import best, call, forget

_LAZY = {
    "best": "rooftune.autotune.production",
    "call": "rooftune.autotune.production",
    "compare": "rooftune.api",
    "forget": "rooftune.autotune.production",
    "ops": "rooftune.api",
    "run": "rooftune.api",
    "tune": "rooftune.api",
}
__all__ = ["__version__", "best", "call", "compare", "forget", "ops", "run", "tune"]


def __getattr__(name: str) -> Any:
    """Public names are imported when they are used: `import rooftune` costs nothing."""
    if name in _LAZY:
        found = globals()[name] = getattr(importlib.import_module(_LAZY[name]), name)  # 2 us saved at every next use
        return found
    raise AttributeError(f"module 'rooftune' has no attribute '{name}'; it has {', '.join(__all__)}")
