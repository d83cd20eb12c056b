"""What a server of `sparsec.loading.isolation` imports in a test: ONNX Runtime with its known faults left in, and with made-up ones.

A graph named `crashes` ends the process, one named `hangs` never returns.
"""

from __future__ import annotations

import os
import signal
from typing import Any

from sparsec.loading import load as loading
from sparsec.proving import ort_faults, ort_session

ort_faults.OF_HALF = ()
warm = loading.warm
_open = ort_session._open


def _faulty(source: Any, proto: Any, *rest: Any) -> Any:
    if proto is not None and proto.graph.name == "crashes":
        os.kill(os.getpid(), signal.SIGSEGV)
    while proto is not None and proto.graph.name == "hangs":
        pass
    return _open(source, proto, *rest)


ort_session._open = _faulty
