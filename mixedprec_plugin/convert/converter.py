"""Plan -> folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from mixedprec_plugin.checkpoint.source import INDEX_NAME
from mixedprec_plugin.compose.stream import in_file_order
from mixedprec_plugin.convert import folder
from mixedprec_plugin.convert.form import Form
from mixedprec_plugin.convert.inputs import changed, input_facts
from mixedprec_plugin.convert.journal import FinishedPart, Journal
from mixedprec_plugin.convert.parts import Part, plan_parts
from mixedprec_plugin.convert.provenance import PROVENANCE_NAME, sources_provenance
from mixedprec_plugin.convert.writing import HashingReader, file_digest, weight_map, write_part
from mixedprec_plugin.errors import ConvertError, PlanError, Problem
from mixedprec_plugin.plan.model import Plan

_TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16"}


class Watcher(Protocol):
    """Is told how far a conversion is."""

    def start(self, num_bytes: int) -> None:
        """Before the first part, with the bytes of all."""

    def advance(self, num_bytes: int) -> None:
        """After each tensor, or each part that was already there."""


class SilentWatcher:
    """Watches and says nothing."""

    def start(self, num_bytes: int) -> None:
        """Say nothing."""

    def advance(self, num_bytes: int) -> None:
        """Say nothing."""


@dataclasses.dataclass(frozen=True)
class Converted:
    """What a conversion did.

    Attributes:
        num_bytes: of all parts.
        num_parts: number of safetensors files.
        num_kept: parts that an earlier run had finished; all of them where nothing was to do.
    """

    num_bytes: int
    num_parts: int
    num_kept: int


def convert(
    plan: Plan,
    form: Form,
    out: Path,
    max_part_bytes: int,
    *,
    overwrite: bool = False,
    watcher: Watcher | None = None,
) -> Converted:
    """Write a plan's virtual checkpoint to a folder, one layer in memory at a time.

    What it writes depends on plan, form and part size alone. Killed at any moment it leaves
    nothing that passes for a whole checkpoint, and the same call continues where it was.

    Args:
        out: a new or empty folder, or one that the same call left unfinished.
        overwrite: replace what another conversion wrote there.
    Raises:
        PlanError: the plan has errors, or layers that the form cannot hold.
        ConvertError: the folder is in the way, or cannot be written.
        CheckpointError, ShapeError: a source is damaged.
    """
    plan.check()
    if problems := form.problems(plan):
        raise PlanError(problems)
    watcher = watcher or SilentWatcher()
    folder.check_apart(out, plan)
    outputs = {layer.name: form.outputs(layer) for layer in plan.layers}
    parts = plan_parts(in_file_order(plan.layers), outputs, max_part_bytes)
    inputs = input_facts(plan, form.name, parts)
    done = Converted(sum(part.num_bytes for part in parts), len(parts), len(parts))
    with folder.write_errors(out):
        if _is_done(out, inputs, overwrite):
            return done
        (out / folder.WORK_NAME).mkdir(parents=True, exist_ok=True)
        journal = Journal(out / folder.WORK_NAME)
        try:
            if folder.is_published(out, inputs):
                folder.clear_work(out)
                return done
            _take_up(journal, inputs, out, overwrite)
            num_kept = _write_parts(plan, form, parts, out, journal, watcher)
            _publish(plan, form, parts, out, journal)
        finally:
            journal.close()
    return dataclasses.replace(done, num_kept=num_kept)


def _is_done(out: Path, inputs: dict[str, str], overwrite: bool) -> bool:
    """Whether the very same output is there.

    Raises:
        ConvertError: something else is.
    """
    state = folder.state_of(out)
    if state == "foreign":
        text = "is not empty, and no conversion wrote it"
        raise ConvertError(Problem(str(out), text, "name a new folder", "out-foreign"))
    if state != "complete":
        return False
    differences = changed(folder.recorded_inputs(out), inputs)
    if differences and not overwrite:
        text = f"holds a conversion of other inputs ({', '.join(differences)} changed)"
        remedy = "add --overwrite to replace it, or name another folder"
        raise ConvertError(Problem(str(out), text, remedy, "out-complete"))
    return not differences


def _take_up(journal: Journal, inputs: dict[str, str], out: Path, overwrite: bool) -> None:
    """Continue what the journal tells of, or begin."""
    differences = changed(journal.inputs, inputs) if journal.inputs else []
    if differences and not overwrite:
        text = f"holds an unfinished conversion of other inputs ({', '.join(differences)} changed)"
        remedy = "add --overwrite to start anew, or name another folder"
        raise ConvertError(Problem(str(out), text, remedy, "out-partial"))
    if differences or not journal.inputs:
        for path in journal.path.parent.glob("*.safetensors*"):
            path.unlink()
        journal.start(inputs)


def _write_parts(
    plan: Plan, form: Form, parts: tuple[Part, ...], out: Path, journal: Journal, watcher: Watcher
) -> int:
    work = out / folder.WORK_NAME
    watcher.start(sum(part.num_bytes for part in parts))
    kept = {part.file for part in parts if _is_whole(part, out, journal)}
    missing = [part for part in parts if part.file not in kept]
    watcher.advance(sum(part.num_bytes for part in parts if part.file in kept))
    folder.require_space(out, sum(part.num_bytes for part in missing))
    with HashingReader() as reader:
        for part in missing:
            temporary = work / f"{part.file}.tmp"
            watcher.advance(len(part.header))
            layers = write_part(part, plan, form, temporary, reader, watcher.advance)
            finished = FinishedPart(part.file, part.num_bytes, file_digest(temporary), layers)
            temporary.rename(work / part.file)
            journal.finish(finished)
    return len(kept)


def _is_whole(part: Part, out: Path, journal: Journal) -> bool:
    """Whether an earlier run finished a part and it is still what it was."""
    finished, path = journal.finished.get(part.file), folder.find_part(out, part.file)
    if finished is None or path is None or path.stat().st_size != finished.num_bytes:
        return False
    return file_digest(path) == finished.sha256


def _publish(plan: Plan, form: Form, parts: tuple[Part, ...], out: Path, journal: Journal) -> None:
    copied = folder.copied_files(plan.source.path)
    finished = [journal.finished[part.file] for part in parts]
    written: dict[str, bytes] = {}
    if len(parts) > 1:
        written[INDEX_NAME] = _json(_index(parts))
    files = [*(part.file for part in parts), *written, *(path.name for path in copied)]
    written[PROVENANCE_NAME] = _json(_provenance(plan, journal.inputs, finished, files))
    written[folder.CONFIG_NAME] = _json(_config(plan, form))
    folder.publish(out, written, copied)


def _index(parts: tuple[Part, ...]) -> dict[str, Any]:
    total = sum(tensor.num_bytes for part in parts for tensor in part.tensors.values())
    return {
        "metadata": {"total_size": total},
        "weight_map": dict(sorted(weight_map(parts).items())),
    }


def _provenance(
    plan: Plan, inputs: Mapping[str, str], finished: list[FinishedPart], files: list[str]
) -> dict[str, Any]:
    return {
        "sources": sources_provenance(plan),
        "layers": [entry for part in finished for entry in part.provenance],
        "parts": {part.file: {"bytes": part.num_bytes, "sha256": part.sha256} for part in finished},
        "files": files,
        "inputs": dict(inputs),
    }


def _config(plan: Plan, form: Form) -> dict[str, Any]:
    """The model's config.json for the written weights."""
    config = {
        key: value for key, value in plan.source.config.items() if key != "compression_config"
    }
    for key in ("torch_dtype", "dtype"):
        if key in config:
            config[key] = _TORCH_NAMES[plan.target.dtype]
    if "dtype" not in config:
        config["torch_dtype"] = _TORCH_NAMES[plan.target.dtype]
    config["quantization_config"] = form.quantization_config(plan)
    return config


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
