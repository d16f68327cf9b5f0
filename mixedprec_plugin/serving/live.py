"""What runs, told by the server itself: `GET /mixedprec/plan`, and metrics.

SGLang has no seam for a plugin's addresses (0.5.23). Its app is FastAPI's, which takes routers
until it listens; SGLang asks for its API key in front of all of them.
"""

from __future__ import annotations

import collections
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Response
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.entrypoints.http_server import app, get_global_state

from mixedprec_plugin.errors import MixedPrecisionError
from mixedprec_plugin.plan.document import plan_document
from mixedprec_plugin.plan.model import Plan
from mixedprec_plugin.plan.render import plan_as_dict
from mixedprec_plugin.serving.planner import plan_of, planner_of
from mixedprec_plugin.serving.settings import DOCUMENT_ADDRESS, PLAN_ADDRESS

router = APIRouter()


class Served:
    """The plan of what runs: made once, and again after `update_weights_from_disk`.

    The ranks are other processes, which make the same plan of the same files.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # the folder or id that it is of
        self._last: tuple[str, Plan] | None = None

    def plan(self) -> Plan:
        """Plan what the server's tokenizer manager says it serves.

        Raises:
            MixedPrecisionError: files that it needs are gone.
        """
        manager = get_global_state().tokenizer_manager
        args = manager.server_args
        # the router of several tokenizer workers has none of its own
        path = getattr(manager, "model_path", args.model_path)
        with self._lock:
            checked = planner_of(args).last
            if self._last is None and checked is not None:
                # what this process checked before it loaded, whose files may be gone by now
                self._last = path, checked
            if self._last is None or self._last[0] != path:
                before = self._last and self._last[1].preset
                self._last = path, plan_of(args, _folder(path, args), before)
            return self._last[1]


_served = Served()


def tell(server_args: Any) -> None:
    """Have the app of this process answer, and its metrics tell the preset, before it listens.

    Raises:
        MixedPrecisionError: as for `Served.plan`.
    """
    app.include_router(router)
    plan = _served.plan()
    if server_args.enable_metrics:
        _tell_metrics(plan)


@router.get(PLAN_ADDRESS)
def _plan() -> Response:
    return _answer(plan_as_dict)


@router.get(DOCUMENT_ADDRESS)
def _document() -> Response:
    return _answer(plan_document)


def _answer(made_of: Callable[[Plan], dict[str, Any]]) -> Response:
    try:
        plan = _served.plan()
    except MixedPrecisionError as error:
        return _as_json({"error": str(error)}, 503)
    return _as_json(made_of(plan))


def _as_json(content: dict[str, Any], status: int = 200) -> Response:
    return Response(json.dumps(content), status, media_type="application/json")


def _folder(model_path: str, args: Any) -> str:
    """Where the weights lie that were loaded."""
    if os.path.isdir(model_path):
        return model_path
    from mixedprec_plugin.serving.loader import MixedPrecisionLoader

    config = LoadConfig(download_dir=args.download_dir)
    return MixedPrecisionLoader(config).folder(model_path, args.revision)


def _tell_metrics(plan: Plan) -> None:
    """Gauges, as prometheus_client has no Info in a server of several processes.

    Its import waits for the folder of its processes, which SGLang names in the environment.
    """
    from prometheus_client import Gauge

    info = Gauge(
        "mixedprec_info", "The preset that is served.", ["preset", "digest"],
        multiprocess_mode="mostrecent",
    )  # fmt: skip
    info.labels(Path(plan.preset.path).stem, plan.preset.digest).set(1)
    weights = Gauge(
        "mixedprec_weight_bytes", "Bytes of weights over all ranks, by method.", ["method"],
        multiprocess_mode="mostrecent",
    )  # fmt: skip
    num_bytes: collections.Counter[str] = collections.Counter()
    for layer in plan.layers:
        num_bytes[layer.method] += layer.bytes_after
    for method, total in num_bytes.items():
        weights.labels(method).set(total)
