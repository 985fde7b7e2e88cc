"""The public surface: names and import cost.

Knows no internals.
"""

from __future__ import annotations

import subprocess
import sys

import promptuary
import promptuary.evaluation
import promptuary.training


def test_every_public_name_can_be_had_and_train_is_the_function() -> None:
    for name in promptuary.__all__:
        assert getattr(promptuary, name) is not None
    assert callable(promptuary.train)
    assert callable(promptuary.evaluate)


def test_importing_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); import promptuary, promptuary.registry; "
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules); print(time.perf_counter() - start)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.5  # 0.02 s when quiet; generous, since test machines are shared
