"""The verbs that look: presets, validate, methods, schema, explain, diff, completion, init."""

from __future__ import annotations

import http.server
import json
import re
import resource
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from mixedprec_plugin.cli.main import VERBS
from mixedprec_plugin.methods.registry import METHODS
from mixedprec_plugin.preset.load import load_preset
from mixedprec_plugin.resources import preset_names
from tests import published
from tests.checkpoints import write_llama
from tests.commands import converted, run
from tests.presets import write_preset

UP, GATE_UP = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_up_proj"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "model")


class TestPresets:
    def test_show_resolves_parents_and_overrides(self) -> None:
        code, out, _ = run("presets", "show", "moe-hot-experts", "--set", "lists.hot=[5]")
        shown = yaml.safe_load(out)
        assert code == 0
        assert shown["rules"][-1] == {"match": "*.experts.5.*", "scheme": "hot"}
        assert "extends" not in shown
        made = run("presets", "show", "moe-hot-experts", "--json")[1]
        assert json.loads(made) == dict(load_preset("moe-hot-experts").resolved)

    def test_a_copy_names_its_schema_and_is_the_same_preset(self, tmp_path: Path) -> None:
        path = tmp_path / "mine.yaml"
        assert run("presets", "copy", "awq", path)[0] == 0
        first = path.read_text().splitlines()[0]
        schema = Path(first.removeprefix("# yaml-language-server: $schema="))
        assert schema.is_absolute()
        Draft202012Validator.check_schema(json.loads(schema.read_text()))
        assert path.read_text().count("yaml-language-server") == 1
        assert load_preset(path).resolved == load_preset("awq").resolved
        code, _, err = run("presets", "copy", "awq", path)
        assert (code, err) == (
            1,
            f"mixedprec: error: {path}: already exists; name another file\n",
        )

    def test_a_name_is_needed(self) -> None:
        code, _, err = run("presets", "show")
        assert code == 2
        assert err == "mixedprec: error: show: names no preset; mixedprec presets lists some\n"


def test_validate_tells_of_every_file(tmp_path: Path) -> None:
    good = write_preset(tmp_path / "good", 'match: "*", method: fp8')
    bad = write_preset(tmp_path / "bad", 'match: "*", method: fp9')
    code, out, err = run("validate", good, bad, "nowhere.yaml", "awq")
    assert code == 1
    assert out == f"{good}: fine, 1 rule\nawq: fine, 1 rule\n"
    assert [line.split(": ")[2] for line in err.splitlines()] == [f"{bad}:3", "nowhere.yaml"]
    assert run("validate", *preset_names())[0] == 0


class TestMethods:
    def test_every_method_is_listed_with_its_bits(self) -> None:
        code, out, _ = run("methods")
        rows = {line.split()[0]: line.split() for line in out.splitlines() if line}
        assert code == 0
        assert set(METHODS) <= set(rows)
        # a 16-bit scale and a 4-bit zero point for each of 128 codes of 4 bits
        assert float(rows["awq"][1]) == pytest.approx(4 + 20 / 128, abs=5e-3)

    def test_cards_are_those_that_sglang_names(self) -> None:
        cards = {x["name"]: x["capabilities"] for x in json.loads(run("methods", "--json")[1])}
        # W8A8Fp8Config.get_min_capability: 89; int8_scaled_mm has no code for 10.0 and up
        assert cards["fp8_channel"][0] == "8.9"
        assert cards["int8_channel"][-1] == "9.0"

    def test_one_method_by_an_alias_has_arguments_and_tensors(self) -> None:
        code, out, _ = run("methods", "gptq_int8")
        assert code == 0
        assert out.startswith("gptq: ")
        assert "gptq_int8  (bits: 8)" in out
        assert "group_size  default 128; one of " in out
        assert "qweight  I32 [512, 4096]" in out

    def test_an_unknown_one_is_not_guessed_at(self) -> None:
        code, _, err = run("methods", "int4")
        assert code == 2
        assert err.endswith("did you mean 'awq_int4' or 'gptq_int4'?\n")


def test_schema_checks_presets(tmp_path: Path) -> None:
    schema = json.loads(run("schema")[1])
    validator = Draft202012Validator(schema)
    for name in preset_names():
        text = (Path(load_preset(name).path)).read_text()
        assert validator.is_valid(yaml.safe_load(text)), name
    assert not validator.is_valid({"version": 1, "rules": [{"match": "*", "method": "fp9"}]})
    path = run("schema", "--path")[1].strip()
    assert Path(path).is_file()
    assert json.loads(run("schema", "--path", "--json")[1]) == path


class TestExplain:
    def test_every_rule_is_told_and_the_last_wins(self, model: Path, tmp_path: Path) -> None:
        preset = write_preset(
            tmp_path, 'match: "*", method: fp8', 'match: "*.k_proj", method: bf16, optional: true',
            'match: "*.mlp.*", method: awq',
        )  # fmt: skip
        code, out, err = run("explain", UP, "--model", model, "--preset", preset)
        assert (code, err) == (0, "")
        lines = [line.split(maxsplit=1) for line in out.splitlines()[1:]]
        assert [text for key, text in lines if key == "rule"] == [
            f"{preset}:3: rules[0]: '*' -> fp8  (matches, a later rule wins)",
            f"{preset}:5: rules[2]: '*.mlp.*' -> awq  (wins)",
        ]
        assert ["part", f"of    {GATE_UP}"] in lines
        (runs,) = [text for key, text in lines if key == "runs"]
        assert runs.startswith("in    sglang.srt.layers.quantization.awq")
        out = run("explain", UP, "--model", model, "--preset", preset, "--gpu", "H100")[1]
        assert out.splitlines()[-1].split() == ["kernel", "Marlin"]

    def test_a_module_stands_for_its_parts_and_faults_are_told(
        self, model: Path, tmp_path: Path
    ) -> None:
        preset = write_preset(tmp_path, 'match: "*", method: fp8_block')
        argv = ("explain", GATE_UP, "--model", model, "--preset", preset)
        code, out, _ = run(*argv, "--json")
        assert code == 0
        assert [x["layer"] for x in json.loads(out)["layers"]] == [UP.replace("up", "gate"), UP]
        code, _, err = run(*argv, "--tp", "3")
        assert code == 1
        assert err.count("\n") == 1
        assert "mlp.gate_proj" in err

    def test_layers_without_a_rule_say_why(self, model: Path, tmp_path: Path) -> None:
        preset = write_preset(tmp_path, 'match: "*.mlp.*", method: awq')
        flags = ("--model", model, "--preset", preset)
        assert "no rule matches it" in run("explain", "model.layers.0.self_attn.q_proj", *flags)[1]
        assert "stays as stored: " in run("explain", "model.norm", *flags)[1]
        code, _, err = run("explain", "lm_head", *flags)
        assert code == 2
        assert "lm_head: shares the weight of model.embed_tokens; explain model.embed_tokens" in err
        assert run("explain", "lm_head", *flags, "--set", "untie_lm_head=true")[0] == 0
        code, _, err = run("explain", "model.layers.0.mlp.up", *flags)
        assert code == 2
        assert f"did you mean {UP}" in err


class TestDiff:
    def test_presets_differ_in_what_they_say(self, model: Path, tmp_path: Path) -> None:
        one = write_preset(tmp_path / "1", 'match: "*", method: awq')
        two = write_preset(
            tmp_path / "2", 'match: "*", method: awq', 'match: "*.down_proj", method: fp8'
        )
        code, out, _ = run("diff", one, two, "--model", model)
        assert code == 0
        (row,) = [line for line in out.splitlines() if line.startswith("model.")]
        assert row.startswith("model.layers.0-2.mlp.down_proj")
        assert out.endswith("3 of 29 layers differ\n")
        made = json.loads(run("diff", one, two, "--model", model, "--json")[1])
        grown = sum(change["bytes"] for change in made["layers"])
        assert grown == made["b"]["bytes"] - made["a"]["bytes"] > 0

    def test_a_converted_folder_a_plan_and_a_server_are_what_they_were_made_of(
        self, model: Path, tmp_path: Path
    ) -> None:
        preset = write_preset(tmp_path, 'match: "*.mlp.*", method: awq')
        folder = converted(model, preset, tmp_path / "out")
        flags = ("--model", model, "--preset", preset, "--json")
        (tmp_path / "plan.json").write_text(run("plan", *flags)[1])

        class Plan(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200 if self.path == "/mixedprec/plan" else 404)
                self.end_headers()
                self.wfile.write((tmp_path / "plan.json").read_bytes())

            def log_message(self, *_: object) -> None:
                pass

        with http.server.HTTPServer(("127.0.0.1", 0), Plan) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            address = f"http://127.0.0.1:{server.server_port}"
            for other in (folder, tmp_path / "plan.json", address):
                code, out, err = run("diff", preset, other, "--model", model)
                assert (code, err) == (0, "")
                assert out.endswith("0 of 29 layers differ\n")
            server.shutdown()
        code, _, err = run("diff", preset, address, "--model", model)
        assert code == 2
        assert f"{address}/mixedprec/plan: gave no plan" in err

    def test_a_preset_needs_a_model(self) -> None:
        code, _, err = run("diff", "awq", "gptq")
        assert code == 2
        assert "there is no model to plan 'awq' over; add --model DIR" in err


class TestCompletion:
    @pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
    def test_every_verb_and_option_is_in_the_script(self, shell: str, tmp_path: Path) -> None:
        code, out, _ = run("completion", shell)
        assert json.loads(run("completion", shell, "--json")[1]) == {"script": out}
        assert code == 0
        assert all(verb in out for verb in VERBS)
        assert "threshold" in out
        if shutil.which(shell):
            (tmp_path / "script").write_text(out)
            subprocess.run([shell, "-n", tmp_path / "script"], check=True)

    @pytest.mark.parametrize(
        ("words", "found"),
        [
            ("pl", {"plan"}),
            ("plan --pre", {"--preset"}),
            ("plan --preset fp8-", {"fp8-block", "fp8-channel"}),
        ],
    )  # fmt: skip
    def test_bash_completes(self, words: str, found: set[str], tmp_path: Path) -> None:
        script = tmp_path / "script"
        script.write_text(run("completion", "bash")[1])
        last = len(words.split())
        code = (
            f"source {script}; COMP_WORDS=(mixedprec {words}); COMP_CWORD={last}; _mixedprec; "
            'echo "${COMPREPLY[@]}"'
        )
        done = subprocess.run(
            ["bash", "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
        )
        assert set(done.stdout.split()) == found


class TestInit:
    def test_the_preset_is_valid_fits_and_is_commented(self, tmp_path: Path) -> None:
        model = published.qwen3_30b_a3b(num_layers=2).write(tmp_path / "model")
        path = tmp_path / "mine.yaml"
        code, said, err = run("init", "--model", model, "--bits", "4.5", "--gpu", "H100",
                              "--out", path)  # fmt: skip
        assert (code, err) == (0, "")
        code, planned, err = run("plan", "--model", model, "--preset", path, "--json")
        assert code == 0
        layers = [x for x in json.loads(planned)["layers"] if x["kind"] in ("linear", "expert")]
        weights = sum(x["shape"][0] * x["shape"][1] for x in layers)
        bits = 8 * sum(x["bytes"] for x in layers) / weights
        assert 0.97 * 4.5 < bits <= 4.5
        assert f"{bits:.2f} bits a weight of linear layers, " in said
        assert {x["method"] for x in layers} == {"fp8_channel", "awq"}
        assert "# yaml-language-server: $schema=" in path.read_text()
        assert run("init", "--model", model, "--out", path)[0] == 1

    @pytest.mark.parametrize(
        ("ranks", "remedy"),
        [(5, "or change --tp or --gpu"), (3, "use a tensor-parallel size that divides it")],
    )
    def test_ranks_that_fit_no_method_are_told_of_and_no_bits(
        self, tmp_path: Path, ranks: int, remedy: str
    ) -> None:
        model = write_llama(tmp_path / "model", intermediate_size=384)
        code, _, err = run("init", "--model", model, "--bits", "5", "--tp", ranks)
        assert code != 0
        assert err.rstrip().endswith(remedy)

    @pytest.mark.parametrize("bits", [4.3, 4.7, 5.0, 5.7, 6.6, 8.0, 10.0])
    def test_the_preset_comes_close_to_the_bits_asked_for(
        self, tmp_path: Path, bits: float
    ) -> None:
        model = tmp_path / "model"
        write_llama(model, num_hidden_layers=24)
        code, said, _ = run("init", "--model", model, "--bits", bits, "--out", tmp_path / "a.yaml")
        assert code == 0
        assert 0.97 * bits < float(said.split(" bits a weight of linear")[0].split()[-1]) <= bits
        rules = yaml.safe_load((tmp_path / "a.yaml").read_text())["rules"]
        assert len(rules) <= 3
        # ranges of layers, and no lists of some
        assert not re.search(r"\{\{|\d,\d+,", str(rules))

    def test_a_size_that_nothing_has_is_refused_with_what_there_is(self, model: Path) -> None:
        for flags, found in ((("--fit", "1MB"), "0.00 GiB a rank"), (("--bits", "2"), "2 bits")):
            code, _, err = run("init", "--model", model, *flags)
            assert code == 1
            assert err.startswith(f"mixedprec: error: {flags[0]}: {found}")
            assert "is less than anything takes (expected " in err

    def test_what_a_refusal_expects_is_enough(self, tmp_path: Path) -> None:
        model = published.llama_3_1_8b().write(tmp_path / "model")
        for flag, little in (("--fit", "3GB"), ("--bits", "3")):
            err = run("init", "--model", model, flag, little)[2]
            enough = re.findall(r"\(expected (\S+) or more\)", err)[0]
            assert ("--tp" in err) == (flag == "--fit")
            assert run("init", "--model", model, flag, enough)[0] == 0

    def test_no_part_of_a_file_stays_where_the_disk_is_full(
        self, model: Path, tmp_path: Path
    ) -> None:
        path = tmp_path / "mine.yaml"
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
        try:
            code, _, err = run("presets", "copy", "awq", path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert (code, path.exists()) == (1, False)
        assert "cannot be written (File too large)" in err

    @pytest.mark.parametrize("name", ["a\nb: c", "\udcff"])
    def test_any_folder_name_makes_a_preset_that_is_read(
        self, model: Path, tmp_path: Path, name: str
    ) -> None:
        odd, path = model.rename(tmp_path / name), tmp_path / f"{name}.yaml"
        assert run("init", "--model", odd, "--bits", "5", "--out", path)[2] == ""
        assert run("validate", path)[0] == 0

    def test_a_card_that_the_stored_model_does_not_fit_gets_fewer_bits(
        self, tmp_path: Path
    ) -> None:
        model = published.llama_3_1_8b().write(tmp_path / "model")
        path = tmp_path / "mine.yaml"
        code, out, err = run("init", "--model", model, "--gpu", "RTX4070", "--out", path)
        assert (code, err) == (0, "")
        assert "chosen by a rule of thumb" in out
        # SGLang's reserve has its place, too, and the remedy works
        assert "leave no room for a KV cache on RTX 4070 of 12 GB" in out
        assert "--mem-fraction-static 0.9" in path.read_text()
        serve = ("serve", path, "--model", model, "--gpu", "RTX4070", "--check")
        assert run(*serve)[0] == 1
        assert run(*serve, "--mem-fraction-static", "0.9")[0] == 0

    def test_more_room_is_used(self, model: Path) -> None:
        assert "100% in fp8" in run("init", "--model", model, "--fit", "24GB")[1]
