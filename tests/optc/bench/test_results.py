from __future__ import annotations

import subprocess
import sys


def test_results_do_not_import_torch() -> None:
    code = "import sys, optc.bench.results; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
