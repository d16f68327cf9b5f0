from __future__ import annotations

from mixedprec_plugin.names import fold_numbers
from mixedprec_plugin.plan.folding import fold_names, natural_key, unfold_names


def test_numbers_fold_to_ranges() -> None:
    assert fold_numbers([3, 0, 1, 2, 7, 9, 10]) == "0-3,7,9-10"


def test_names_fold_over_their_first_number() -> None:
    names = ["m.0.a", "m.1.a", "m.2.a", "m.0.b", "m.4.a", "head"]
    assert fold_names(names) == ["m.0-2,4.a", "m.0.b", "head"]


def test_names_fold_over_their_second_number_where_the_first_ones_are_alike() -> None:
    names = [f"l.{layer}.e.{expert}.w" for layer in (0, 1) for expert in (3, 4, 9)]
    assert fold_names(names) == ["l.0-1.e.3-4,9.w"]
    assert fold_names(["l.0.e.0-7", "l.1.e.0-7", "l.2.e.8"]) == ["l.0-1.e.0-7", "l.2.e.8"]
    assert fold_names(["l.0.e.1", "l.0.e.2"]) == ["l.0.e.1-2"]


def test_second_number_does_not_fold_where_the_first_ones_differ() -> None:
    assert fold_names(["l.0.e.1.w", "l.1.e.1.w", "l.0.e.2.w"]) == ["l.0-1.e.1.w", "l.0.e.2.w"]


def test_natural_order_puts_2_before_10() -> None:
    assert sorted(["l.10.a", "l.2.b", "l.2.a"], key=natural_key) == ["l.2.a", "l.2.b", "l.10.a"]


def test_unfolding_gives_the_names_back() -> None:
    names = [f"model.layers.{n}.mlp.experts.{e}.up_proj" for n in (0, 1, 2, 7) for e in (3, 5, 6)]
    names += ["model.norm", "lm_head", "model.layers.12.mlp.gate"]
    assert sorted(unfold_names(", ".join(fold_names(names)), len(names))) == sorted(names)


def test_name_that_nobody_folded_is_one_name() -> None:
    for name in ("model.layers.0-9999999.mlp", "a.0-99.b.0-99", "preset.yaml:5: rules[2]"):
        assert unfold_names(name, 100) == [name]
