"""rooftune: races competing kernels, tunes them to the hardware's roof, tells the truth about the result."""

from pathlib import Path

__version__ = "0.1.0"

_here = Path(__file__).resolve().parent
if not (_here / "kernels").is_dir():  # a clone without symbolic links (Windows): the folders lie beside us
    __path__.append(str(_here.parent))
