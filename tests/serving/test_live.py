"""What a server tells of its plan, where the server itself is not needed."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from mixedprec_plugin.errors import CheckpointError
from mixedprec_plugin.serving.planner import plan_of
from tests.checkpoints import write_llama

pytestmark = [pytest.mark.sglang, pytest.mark.filterwarnings("ignore")]


def test_the_plan_of_a_start_outlives_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mixedprec_plugin.serving import live

    model = write_llama(tmp_path / "model")
    extra = json.dumps({"mixedprec_config": "awq"})
    args = argparse.Namespace(
        model_path=str(model), load_format="mixedprec", dtype="auto", tp_size=1,
        model_loader_extra_config=extra, enable_metrics=False,
    )  # fmt: skip
    manager = SimpleNamespace(server_args=args)
    monkeypatch.setattr(
        live, "get_global_state", lambda: SimpleNamespace(tokenizer_manager=manager)
    )
    plan = plan_of(args)
    shutil.rmtree(model)
    assert live.Served().plan() is plan
    # other weights are planned anew, and what is not there is an error
    served = live.Served()
    served.plan()
    (tmp_path / "empty").mkdir()
    manager.model_path = str(tmp_path / "empty")
    with pytest.raises(CheckpointError):
        served.plan()
