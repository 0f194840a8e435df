"""Makes the package importable from a bare checkout, then runs it: ``python benchmarks/sass --help``."""

import sys
from pathlib import Path

_FOLDER = Path(__file__).resolve().parent
sys.path = [str(_FOLDER.parent), *(path for path in sys.path if Path(path or ".").resolve() != _FOLDER)]

from sass.main import main  # noqa: E402 needs the path above

if __name__ == "__main__":
    sys.exit(main())
