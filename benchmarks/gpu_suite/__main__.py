"""Makes the package importable from a bare checkout, then runs the suite: ``python benchmarks/gpu_suite --help``."""

import sys
from pathlib import Path

_FOLDER = Path(__file__).resolve().parent
sys.path = [str(_FOLDER.parent), *(path for path in sys.path if Path(path or ".").resolve() != _FOLDER)]
# Last, so that nothing installed is shadowed by kernels/ and passes/ of the repository root.
sys.path.append(str(_FOLDER.parent.parent))

from gpu_suite.main import main  # noqa: E402 needs the path above

if __name__ == "__main__":
    sys.exit(main())
