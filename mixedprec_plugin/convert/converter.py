"""Plan -> folder."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixedprec_plugin.checkpoint.converted import FOLDED_KEY, fold_layers, is_converted
from mixedprec_plugin.checkpoint.recorded import (
    CALIBRATION_NAME,
    PROVENANCE_NAME,
    damage,
    file_digest,
    reading,
)
from mixedprec_plugin.checkpoint.source import INDEX_NAME
from mixedprec_plugin.compose.stream import compose_layer, in_file_order
from mixedprec_plugin.convert import folder
from mixedprec_plugin.convert.form import Form
from mixedprec_plugin.convert.inputs import RECORDED, changed, copied_files, input_facts
from mixedprec_plugin.convert.journal import FinishedPart, Journal
from mixedprec_plugin.convert.parts import Part, plan_parts
from mixedprec_plugin.convert.provenance import sources_provenance
from mixedprec_plugin.convert.writing import write_part
from mixedprec_plugin.errors import CheckpointError, ConvertError, PlanError, Problem
from mixedprec_plugin.methods.stored import FLOAT_DTYPES
from mixedprec_plugin.plan.model import Plan

if TYPE_CHECKING:
    from mixedprec_plugin.calibrate.calibrator import Calibration

# is told how many bytes of how many are written
Progress = Callable[[int, int], object]


@dataclasses.dataclass(frozen=True)
class Converted:
    """What a conversion did.

    Attributes:
        num_bytes: of all parts.
        num_kept: parts that an earlier run had finished; all of them where nothing was to do.
    """

    num_bytes: int
    num_parts: int
    num_kept: int


@dataclasses.dataclass(frozen=True)
class _Job:
    """What is written, where, and of what."""

    plan: Plan
    form: Form
    out: Path
    overwrite: bool
    parts: tuple[Part, ...]
    inputs: dict[str, str]
    calibration: Calibration | None


def convert(
    plan: Plan,
    form: Form,
    out: Path,
    max_part_bytes: int,
    *,
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
    calibration: Calibration | None = None,
) -> Converted:
    """Write a plan's virtual checkpoint to a folder, one layer in memory at a time.

    What it writes depends on plan, form and part size alone. Killed at any moment it leaves
    nothing that passes for a whole checkpoint, and the same call continues where it was. Before
    anything is put into place, the sources are held against what was planned with and read.

    Args:
        out: a new or empty folder, or one that the same call left unfinished.
        overwrite: replace what another conversion wrote there, or what is damaged.
        calibration: rounds layers; the others are rounded to the nearest code.
    Raises:
        PlanError: the plan has errors, or layers that the form cannot hold.
        ConvertError: the folder is in the way, or cannot be written.
        CheckpointError, ShapeError: a source is damaged, or changed meanwhile.
    """
    plan.check()
    if problems := form.problems(plan):
        raise PlanError(problems)
    folder.check_apart(out, plan)
    for source in plan.sources.values():
        source.check_unchanged(exact=True)
    outputs = {layer.name: form.outputs(layer) for layer in plan.layers}
    parts = plan_parts(in_file_order(plan.layers), outputs, max_part_bytes)
    copied = copied_files(plan.source.path)
    digests = {path.name: file_digest(path) for path in copied}
    inputs = input_facts(plan, form.name, parts, digests, _rounding(calibration))
    job = _Job(plan, form, out, overwrite, parts, inputs, calibration)
    kept = {part.file for part in parts}
    with folder.write_errors(out):
        if not _is_done(job):
            with contextlib.closing(Journal(folder.open_work(out))) as journal:
                if _is_in_place(job):
                    folder.clear_work(out)
                else:
                    _take_up(job, journal)
                    kept = {part.file for part in parts if _is_whole(part, out, journal)}
                    with reading(plan.source.path):
                        size = sum(path.stat().st_size for path in copied)
                    size += sum(part.num_bytes for part in parts if part.file not in kept)
                    work = journal.path.with_name("calibration")
                    if calibration is not None:
                        size += calibration.disk_bytes(work)
                    folder.require_space(out, size)
                    if calibration is not None:
                        calibration.prepare(work)
                    _write_parts(job, kept, journal, progress)
                    _publish(job, journal)
    return Converted(sum(part.num_bytes for part in parts), len(parts), len(kept))


def _rounding(calibration: Calibration | None) -> str:
    return json.dumps(calibration.facts()) if calibration else "none"


def _is_done(job: _Job) -> bool:
    state = folder.state_of(job.out)
    if state == "foreign":
        text = "is not empty, and no conversion wrote it"
        raise ConvertError(Problem(str(job.out), text, "name a new folder", "out-foreign"))
    if state != "complete":
        return False
    recorded = folder.record(job.out / PROVENANCE_NAME, RECORDED)
    differences = changed(recorded["inputs"], job.inputs, recorded["layers"], job.plan)
    if differences and not job.overwrite:
        text = f"holds a conversion of other inputs ({', '.join(differences)} changed)"
        remedy = "add --overwrite to replace it, or name another folder"
        raise ConvertError(Problem(str(job.out), text, remedy, "out-complete"))
    problems = damage(job.out, digests=job.overwrite)
    if problems and not job.overwrite:
        remedy = "add --overwrite to write everything again"
        raise ConvertError([dataclasses.replace(p, remedy=remedy) for p in problems])
    return not differences and not problems


def _is_in_place(job: _Job) -> bool:
    """Whether all of these inputs' output is there, and only the cleaning up was stopped."""
    if folder.is_replaced(job.out) or not (job.out / folder.CONFIG_NAME).exists():
        return False
    recorded = folder.record(job.out / PROVENANCE_NAME, RECORDED)
    return recorded["inputs"] == job.inputs and not damage(job.out, digests=job.overwrite)


def _take_up(job: _Job, journal: Journal) -> None:
    differences: list[str] = []
    if journal.inputs and not journal.damage:
        layers = [entry for part in journal.finished.values() for entry in part.provenance]
        # codes that were calibrated are of all layers, and not only of those that are finished
        known = None if job.calibration else layers
        differences = changed(journal.inputs, job.inputs, known, job.plan)
    text = f"holds an unfinished conversion of other inputs ({', '.join(differences)} changed)"
    where, text = (journal.path, journal.damage) if journal.damage else (job.out, text)
    if (differences or journal.damage) and not job.overwrite:
        remedy = "add --overwrite to start over, or name another folder"
        raise ConvertError(Problem(str(where), text, remedy, "out-partial"))
    if differences or journal.damage or not journal.inputs:
        folder.empty_work(journal.path.parent)
        journal.start(job.inputs)


def _is_whole(part: Part, out: Path, journal: Journal) -> bool:
    """Whether an earlier run finished a part and it is still what it was."""
    finished, path = journal.finished.get(part.file), folder.find_part(out, part.file)
    return bool(finished and path and file_digest(path) == finished.sha256)


def _write_parts(job: _Job, kept: set[str], journal: Journal, progress: Progress) -> None:
    total = sum(part.num_bytes for part in job.parts)
    done = 0

    def advance(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        progress(done, total)

    for part in job.parts:
        if part.file in kept:
            advance(part.num_bytes)
            continue
        path = journal.path.with_name(part.file)
        temporary = path.with_name(f"{part.file}.tmp")
        compose = job.calibration.compose if job.calibration else compose_layer
        layers = write_part(part, job.plan, job.form, temporary, advance, compose)
        advance(len(part.header))
        finished = FinishedPart(part.file, file_digest(temporary), layers)
        temporary.rename(path)
        journal.finish(finished)


def _publish(job: _Job, journal: Journal) -> None:
    """Put everything into place, if the sources are still what was planned with and read."""
    finished = [journal.finished[part.file] for part in job.parts]
    layers = [entry for part in finished for entry in part.provenance]
    copies = folder.copy_staged(job.out, copied_files(job.plan.source.path))
    _check_sources(job, copies, layers)
    written: dict[str, bytes] = {}
    if len(finished) > 1:
        written[INDEX_NAME] = _json(_index(job.parts))
    if job.calibration is not None:
        written[CALIBRATION_NAME] = _json(job.calibration.record())
    written[PROVENANCE_NAME] = _json(
        {
            "sources": sources_provenance(job.plan),
            "layers": layers,
            "parts": {
                part.file: {
                    "bytes": part.num_bytes,
                    "sha256": journal.finished[part.file].sha256,
                    "header_sha256": hashlib.sha256(part.header).hexdigest(),
                }
                for part in job.parts
            },
            "files": [*(part.file for part in job.parts), *written, *copies],
            "inputs": job.inputs,
        }
    )
    folded = job.calibration.folded if job.calibration else []
    written[folder.CONFIG_NAME] = _json(_config(job.plan, job.form, folded))
    folder.publish(job.out, written)


def _check_sources(job: _Job, copies: Mapping[str, str], layers: Sequence[dict[str, Any]]) -> None:
    remedy = "run it again with --overwrite once nothing writes to it"
    for source in job.plan.sources.values():
        source.check_unchanged(remedy, exact=True)
    rounding = _rounding(job.calibration)
    now = input_facts(job.plan, job.form.name, job.parts, copies, rounding)
    if differences := changed(job.inputs, now, layers, job.plan):
        what = f"changed while it was read: {', '.join(differences)}"
        raise CheckpointError(Problem(str(job.plan.source.path), what, remedy, "changed"))


def _index(parts: tuple[Part, ...]) -> dict[str, Any]:
    total = sum(tensor.spec.num_bytes for part in parts for tensor in part.tensors.values())
    return {
        "metadata": {"total_size": total},
        "weight_map": dict(sorted((name, part.file) for part in parts for name in part.tensors)),
    }


def _config(plan: Plan, form: Form, folded: Sequence[str]) -> dict[str, Any]:
    """The model's config.json for the written weights.

    Args:
        folded: norms and layers that are divided for what reads them; other engines' configs have
            no place for it.
    """
    dtype = FLOAT_DTYPES[plan.target.dtype]
    config = _of_written(plan.source.config, dtype)
    if "dtype" not in config:
        config["torch_dtype"] = dtype
    said = form.quantization_config(plan)
    if folded and is_converted(said):
        said[FOLDED_KEY] = fold_layers(folded)
    return config | {"quantization_config": said}


def _of_written(said: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """What config.json, or a section of it, says: not of how the weights were stored before."""
    kept = {
        key: _of_written(value, dtype) if isinstance(value, Mapping) else value
        for key, value in said.items()
        if key not in ("quantization_config", "compression_config")
    }
    return kept | {key: dtype for key in ("torch_dtype", "dtype") if key in kept}


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
