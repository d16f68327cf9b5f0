"""Everything that the plugin needs of one SGLang release, looked up in its sources."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator

from packaging.version import Version

from compat.constructors import Construction, construction_fault, constructions, fault_elsewhere
from compat.definitions import Definition, Function, Missing, find, lineage, own_members
from compat.fields import field_uses, has_field
from compat.hooks import HookRow, hook_faults, read_hooks, self_types
from compat.places import elsewhere, modules_elsewhere
from compat.signatures import call_signature, kind, misfit, rejected, signature
from compat.sources import Sources
from compat.uses import OURS, SGLANG, Call, Use, collect
from mixedprec_plugin.methods.registry import METHODS

METHOD_FEATURES = tuple(name for name, method in METHODS.items() if method.config_classes)
FEATURES = (
    "plugin framework",
    "hooks",
    "loader",
    "update_weights_from_disk",
    "experts in several schemes",
    *METHOD_FEATURES,
    "CPU platform",
    "doctor",
)
_UPDATE_SCOPES = ("_update_weights_from_disk", "MixedPrecisionLoader._get_weights_iterator")
_ENTRY_POINT_GROUPS = ("sglang.srt.plugins", "sglang.srt.platforms")
# every process that serves must load the plugins; the third is spawned for each rank
_LOADING = (
    "sglang.launch_server",
    "sglang.srt.entrypoints.engine",
    "sglang.srt.managers.scheduler",
)
_FIELDS = ("field", "option")
_RESTORE = "restore_weights_before_loading"
_V2_LOADER = "sglang.srt.layers.linear.WEIGHT_LOADER_V2_SUPPORTED"


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something that a release lacks.

    Attributes:
        feature: one of FEATURES.
        where: file and line of ours to look at.
        target: dotted name in SGLang.
        what: what is wrong with it.
        moved: where the same name is defined in that release.
    """

    feature: str
    where: str
    target: str
    what: str
    moved: tuple[str, ...] = ()

    def __str__(self) -> str:
        moved = f"; defined in {', '.join(self.moved)}" if self.moved else ""
        return f"{self.where}: {self.target}: {self.what}{moved}"


class Checker:
    """Our needs, collected once, to be held against any release.

    Args:
        ours: the sources of mixedprec_plugin.
        reference: the SGLang that our sources are written for. It says which members of a class
            with bases of SGLang are SGLang's, and what kind of function a hook wraps.
    """

    def __init__(self, ours: Sources, reference: Sources) -> None:
        self.ours = ours
        self.reference = reference.joined(ours)
        self.hooks = read_hooks(ours)
        self.uses = [use for use in self._collect() if _is_theirs(use, self.reference)]
        self.constructions = list(constructions(ours))
        self.known = {
            (use, what)
            for use in self.uses
            if use.kind != "name" and (what := self._fault(use, self.reference))
        }

    def _collect(self) -> list[Use]:
        types = self_types(self.hooks, self.reference)
        return [*collect(self.reference, types), *field_uses(self.ours)]

    def check(self, release: Sources) -> list[Finding]:
        """Return what a release lacks, by feature; each fault once, at its first line."""
        sources = release.joined(self.ours)
        is_older = Version(release.version) < Version(self.reference.version)
        uses = [use for use in self.uses if not (is_older and use.kind == "option")]
        findings = [
            *self._framework(sources),
            *self._hooks(sources),
            *(found for use in uses if (found := self._use(use, sources))),
            *self._constructors(sources),
            *self._v2_loader(sources),
        ]
        first: dict[tuple[str, str, str], Finding] = {}
        for finding in findings:
            first.setdefault((finding.feature, finding.target, finding.what), finding)
        return sorted(first.values(), key=lambda finding: FEATURES.index(finding.feature))

    def _framework(self, sources: Sources) -> Iterator[Finding]:
        module = "sglang.srt.plugins"
        tree = sources.tree(module)
        nodes = ast.walk(tree) if tree else ()
        known = {node.value for node in nodes if isinstance(node, ast.Constant)}
        for group in _ENTRY_POINT_GROUPS:
            if group not in known:
                what = f"the entry point group {group} is not read"
                yield Finding("plugin framework", "setup.cfg", module, what)
        for caller in _LOADING:
            if caller not in sources or "load_plugins()" not in sources.text(caller):
                yield Finding("plugin framework", "setup.cfg", caller, "does not load plugins")

    def _hooks(self, sources: Sources) -> Iterator[Finding]:
        for row in self.hooks:
            for what in hook_faults(row, sources, self.reference):
                moved = self._moved(sources, row.target) if what.startswith("no ") else ()
                yield Finding(_hook_feature(row), row.where, row.target, what, moved)

    def _use(self, use: Use, sources: Sources) -> Finding | None:
        what = self._fault(use, sources)
        if not what or (use, what) in self.known:
            return None
        if use.kind == "name":
            moved = self._moved(sources, use.target) if what.startswith("no ") else ()
            return Finding(_use_feature(use), use.where, use.target, what, moved)
        owner, _, name = use.target.rpartition(".")
        target = f"{_sglang_class(self.reference, owner)}.{name}"
        return Finding(_use_feature(use), use.where, target, what)

    def _fault(self, use: Use, sources: Sources) -> str:
        """What is wrong with a use in these sources; empty if nothing is."""
        if use.kind == "name":
            target = find(sources, use.target)
            if isinstance(target, Missing):
                return f"no {target.name} in {target.within}"
            return self._misfit(use, sources, target)
        owner, _, name = use.target.rpartition(".")
        if use.kind in _FIELDS:
            return "" if has_field(sources, use.target) else f"has no {name}"
        if isinstance(find(sources, owner), Missing) or not _has_bases(sources, owner):
            return ""  # the import of the class or of its base is a finding by itself
        found = member(sources, use.target)
        if found is None and use.kind == "override":
            if name == _RESTORE:
                return ""  # the loader calls it before an update, whatever SGLang does
            return f"has no {name}, so that SGLang does not call ours"
        return self._misfit(use, sources, found) if found else f"has no {name}"

    def _moved(self, sources: Sources, target: str) -> tuple[str, ...]:
        known = find(self.reference, target)
        is_module = isinstance(known, Definition) and known.node is None
        return tuple((modules_elsewhere if is_module else elsewhere)(sources, target))

    def _misfit(self, use: Use, sources: Sources, target: Definition) -> str:
        if use.function is not None and isinstance(target.node, Function):
            if kind(use.function) != kind(target.node):
                return f"is a {kind(target.node)} (ours is a {kind(use.function)})"
            theirs = signature(target.node, is_bound=True)
            more = [
                name
                for name in rejected(signature(use.function, is_bound=True), theirs)
                if _is_passed(sources, use.function.name, name)
            ]
            return f"is called with what ours does not take: {', '.join(more)}" if more else ""
        if use.call is None:
            return ""
        return call_fault(use, use.call, sources, target)

    def _constructors(self, sources: Sources) -> Iterator[Finding]:
        for construction in self.constructions:
            what = construction_fault(construction, sources)
            if what:
                target = construction.config_class
                moved = self._moved(sources, target) if what.startswith("no ") else ()
                moved = tuple(
                    f"{place} ({fault_elsewhere(construction, sources, place)})" for place in moved
                )
                feature = _construction_feature(construction)
                yield Finding(feature, construction.where, target, what, moved)

    def _v2_loader(self, sources: Sources) -> Iterator[Finding]:
        """What a release gives another loader than the one that ours is written for."""
        names = _names_in(sources, _V2_LOADER)
        expected = _names_in(self.reference, _V2_LOADER)
        for module, node in linear_methods(self.ours, self.reference):
            if node.name in expected and node.name not in names:
                where = f"{self.ours.path(module)}:{node.lineno}"
                yield Finding("CPU platform", where, _V2_LOADER, f"does not name {node.name}")


def _names_in(sources: Sources, target: str) -> set[object]:
    """The constants of a list."""
    found = find(sources, target)
    nodes = ast.walk(found.node) if isinstance(found, Definition) and found.node else ()
    return {node.value for node in nodes if isinstance(node, ast.Constant)}


def linear_methods(ours: Sources, reference: Sources) -> Iterator[tuple[str, ast.ClassDef]]:
    """Our linear methods, whose weight loader SGLang chooses by the class's name."""
    for module in ours.mentions(r"^class \w+LinearMethod\(", OURS):
        tree = reference.tree(module)
        assert tree is not None
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and node.name.endswith("LinearMethod"):
                yield module, node


def member(sources: Sources, target: str) -> Definition | None:
    """Where a class's bases in SGLang, or a class of SGLang, define a member; None if nowhere."""
    owner, _, name = target.rpartition(".")
    start = find(sources, owner)
    if isinstance(start, Missing):
        return None
    for definition in lineage(sources, start):
        if isinstance(definition.node, ast.ClassDef) and _package(definition.module) == SGLANG:
            node = own_members(definition.node).get(name)
            if node is not None:
                return Definition(definition.module, node)
    return None


def call_fault(use: Use, call: Call, sources: Sources, target: Definition) -> str:
    """Why a call of ours does not fit what it calls; empty if it does or cannot be told."""
    wanted = call_signature(sources, target)
    if isinstance(target.node, Function):
        owner = find(sources, use.target.rpartition(".")[0])
        in_class = isinstance(owner, Definition) and owner.is_class
        by_class = use.kind == "name" and kind(target.node) == "method"
        wanted = signature(target.node, is_bound=in_class and not by_class)
    if wanted is None:
        return ""
    if not call.is_open:
        return misfit(wanted, call.num_positional, call.keywords)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in wanted.parameters.values())
    unknown = [k for k in call.keywords if k not in wanted.parameters and not takes_any]
    return f"does not take {', '.join(unknown)}" if unknown else ""


def _is_passed(sources: Sources, function: str, keyword: str) -> bool:
    """Whether some call in SGLang names an argument; by position its name does not matter."""
    pattern = rf"\b{re.escape(function)}\([^()]*\b{re.escape(keyword)}\s*="
    words = (f"{function}(", keyword)
    return any(True for _ in sources.mentions(pattern, "sglang.srt", *words))


def _is_theirs(use: Use, reference: Sources) -> bool:
    if use.kind in _FIELDS:
        return has_field(reference, use.target)
    return use.kind == "name" or member(reference, use.target) is not None


def _has_bases(sources: Sources, owner: str) -> bool:
    start = find(sources, owner)
    assert isinstance(start, Definition)
    return any(
        isinstance(d.node, ast.ClassDef) and _package(d.module) == SGLANG
        for d in lineage(sources, start)
    )


def _sglang_class(reference: Sources, owner: str) -> str:
    """The dotted class of SGLang that a class of ours derives from; or the class itself."""
    start = find(reference, owner)
    assert isinstance(start, Definition)
    return next(
        f"{d.module}.{d.node.name}"
        for d in lineage(reference, start)
        if isinstance(d.node, ast.ClassDef) and _package(d.module) == SGLANG
    )


def _package(module: str) -> str:
    return module.partition(".")[0]


def _hook_feature(row: HookRow) -> str:
    is_update = row.target.endswith(".update_weights_from_disk")
    return "update_weights_from_disk" if is_update else "hooks"


def _use_feature(use: Use) -> str:
    path = use.where.removeprefix(f"{OURS}/")
    if use.scope in _UPDATE_SCOPES or use.scope.endswith(".restore_weights_before_loading"):
        return "update_weights_from_disk"
    if path.startswith("serving/hooks.py"):
        return "hooks"
    folder, _, rest = path.partition("/")
    # what is imported with the module, every load needs
    if folder == "methods" and rest.endswith("/sglang.py") and use.scope:
        return "CPU platform"
    if path.startswith("experts/") and use.scope:
        return "experts in several schemes"
    return {"cpu": "CPU platform", "cli": "doctor"}.get(folder, "loader")


def _construction_feature(construction: Construction) -> str:
    return "CPU platform" if construction.platform == "cpu" else construction.method
