"""The process that compiles a model for Qualcomm's HTP: one file that needs only onnxruntime and onnxruntime-qnn.

    python qualcomm_worker.py request.json

It runs apart because the vendor's compiler may bring its process down or not come back. What it refuses is told on
stderr by the provider, which `edgekd.devices.qualcomm` reads.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main() -> int:
    """Compile as the request says; write versions and the error, if any, to its `result`."""
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    result: dict[str, Any] = {"versions": {}, "error": ""}
    try:
        compile_model(request, result["versions"])
    except Exception as error:  # noqa: BLE001 - the parent decides what it means
        result["error"] = f"{type(error).__name__}: {error}"
    Path(request["result"]).write_text(json.dumps(result), encoding="utf-8")
    return 0


def compile_model(request: dict[str, Any], versions: dict[str, str]) -> None:
    """Creating the session compiles, writes the context binary and the vendor's profile."""
    import onnxruntime as ort
    import onnxruntime_qnn as qnn

    versions["onnxruntime"] = ort.__version__
    versions["onnxruntime-qnn"] = getattr(qnn, "__version__", "unknown")
    info = getattr(qnn, "build_and_package_info", None)
    versions["QNN SDK"] = getattr(info, "qnn_version", "unknown")
    ort.register_execution_provider_library(qnn.get_ep_name(), qnn.get_library_path())
    devices = [device for device in ort.get_ep_devices() if device.ep_name == qnn.get_ep_name()]
    if not devices:
        raise RuntimeError("onnxruntime-qnn offers no device here")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    for key, value in request["session"].items():
        options.add_session_config_entry(key, value)
    options.add_provider_for_devices(devices[:1], {"backend_path": qnn.get_qnn_htp_path(), **request["provider"]})
    ort.InferenceSession(request["model"], options)


if __name__ == "__main__":
    raise SystemExit(main())
