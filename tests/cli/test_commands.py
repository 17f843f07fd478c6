"""Help, exit codes and error messages of the commands; what they print of a checkpoint."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import mokernels
from mokernels.cli import app
from mokernels.demo import hub
from tests.support.checkpoints import edit_json, edit_tensors, make_checkpoint

DATA = Path(__file__).parents[1] / "data" / "checkpoints"
COMMANDS = ("demo", "inspect", "check", "generate", "quantize", "tune", "serve", "chat", "run",
            "compare", "dequantize")  # fmt: skip
runner = CliRunner()


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    monkeypatch.setattr(hub, "hub_reachable", lambda repo: False)


def run(*arguments: object, code: int = 0):
    """Run the command line, with room for long lines; the exit code has to be ``code``."""
    result = runner.invoke(app, [str(word) for word in arguments], env={"COLUMNS": "300"})
    assert result.exit_code == code, f"{result.exit_code}: {result.output}"
    return result


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example_that_parses(command):
    text = run(command, "--help").output
    example = next(line for line in text.splitlines() if "Example:" in line).split("Example:")[1]
    assert example.split()[:2] == ["mokernels", command]
    options = [word for word in example.split() if word.startswith("-")]
    assert all(option in text for option in options)


def test_help_lists_the_commands():
    text = run("--help").output
    assert "Example: mokernels check" in text
    assert all(command in text for command in COMMANDS)


def test_version():
    assert run("--version").output.strip() == f"mokernels {mokernels.__version__}"


@pytest.mark.parametrize(
    "words",
    [
        ("chek", "x"),
        ("check",),
        ("check", "x", "--no-such-option"),
        ("generate", "x"),
        ("generate", "x", "-p", "hi", "--max-new-tokens", "0"),
        ("generate", "x", "-p", "hi", "--temperature", "-1"),
        ("demo", "--format", "INT3"),
        ("check", DATA / "fp8", "--values", "some"),
        ("demo", "--device", "abacus"),
    ],
)
def test_wrong_use_is_exit_code_2(words):
    assert "Traceback" not in run(*words, code=2).output


def test_the_console_script_runs_without_transformers():
    code = (
        "import sys; from mokernels.cli import main; sys.argv[0] = 'x'\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'transformers', 'huggingface_hub', 'triton'} & sys.modules.keys()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--version"], check=True, capture_output=True, text=True
    )
    assert done.stdout.startswith("mokernels ")


ONE_FORMAT = sorted(path.name for path in DATA.iterdir() if path.name != "mixed")


def test_a_mixed_export_is_told_by_format():
    output = run("check", DATA / "mixed").stdout
    assert f"{DATA / 'mixed'}: ok\n" in output
    assert "2 layers of FP8_PB_WO, 8 layers of FP8, 2 layers of NVFP4" in output
    output = run("inspect", DATA / "mixed").stdout
    assert table_row(output, "algorithm")[1] == "MIXED_PRECISION"
    counts = {name: table_row(output, name)[2] for name in ("FP8", "FP8_PB_WO", "NVFP4")}
    assert counts == {"FP8": "8", "FP8_PB_WO": "2", "NVFP4": "2"}


@pytest.mark.parametrize("name", ONE_FORMAT)
def test_real_exports_pass_the_check(name):
    output = run("check", DATA / name).stdout
    assert f"{DATA / name}: ok\n" in output
    assert "14 layers of " in output


def test_a_damaged_checkpoint_fails_the_check(tmp_path):
    folder = make_checkpoint(tmp_path / "c", "FP8_PER_CHANNEL_PER_TOKEN")
    layer = "model.layers.0.mlp.up_proj"

    def damage(tensors):
        tensors[f"{layer}.weight_scale"][3] = -1.0
        del tensors["model.layers.0.mlp.down_proj.weight_scale"]

    edit_tensors(folder, damage)
    result = run("check", folder, code=1)
    lines = result.stdout.splitlines()
    findings = mokernels.check(folder).errors
    assert len(findings) >= 2
    for finding in findings:  # each on one line, to the letter
        assert f"error [{finding.rule}] {finding}" in lines
    assert f"{folder}: not ok, {len(findings)} errors" in lines


def test_the_check_as_json(tmp_path):
    folder = make_checkpoint(tmp_path / "c", "MXFP8")
    found = json.loads(run("check", folder, "--json").stdout)
    assert (found["ok"], found["errors"], found["layers"]) == (True, [], {"MXFP8": 5})
    edit_json(
        folder / "hf_quant_config.json", lambda data: data["quantization"].update(quant_algo="X")
    )
    found = json.loads(run("check", folder, "--json", code=1).stdout)
    assert not found["ok"]
    (error,) = found["errors"]
    assert error["rule"] == "format-unsupported"
    assert error["file"] == "hf_quant_config.json"
    assert "wanted one of FP8" in error["message"]


def test_warnings_do_not_fail_the_check(tmp_path):
    folder = make_checkpoint(tmp_path / "c", "FP8", input_scales=False)
    output = run("check", folder).stdout
    assert "warning [input-scale-absent] " in output
    assert f"{folder}: ok, 1 warning\n" in output


def test_values_says_what_is_read(tmp_path):
    folder = make_checkpoint(tmp_path / "c", "FP8_PER_CHANNEL_PER_TOKEN")

    def damage(tensors):
        tensors["model.layers.0.mlp.up_proj.weight_scale"][3] = -1.0

    edit_tensors(folder, damage)
    assert "read: no values" in run("check", folder, "--values", "none").stdout
    run("check", folder, "--values", "scales", code=1)


def test_a_file_is_no_checkpoint(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    assert "error [folder-missing]" in run("check", file, code=1).stdout
    assert not json.loads(run("check", file, "--json", code=1).stdout)["ok"]


@pytest.mark.parametrize("command", ["check", "inspect", "generate"])
def test_a_path_that_does_not_exist(command, tmp_path):
    options = ("-p", "hi") if command == "generate" else ()
    result = run(command, tmp_path / "nothing", *options, code=1)
    assert f"The path '{tmp_path / 'nothing'}' does not exist" in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.output


@pytest.mark.parametrize("words", [("--debug", "check"), ("check", "--debug")])
def test_debug_shows_the_traceback(words, tmp_path):
    result = run(*words, tmp_path / "nothing", code=1)
    assert "Traceback (most recent call last)" in result.stderr
    assert "HubError: The path" in result.stderr


def test_a_model_of_the_hub_without_the_hub(monkeypatch):
    monkeypatch.setattr(hub, "cached_snapshot", lambda repo: None)
    result = run("check", "nvidia/Some-Model-FP8", code=1)
    assert "as a model of the Hugging Face hub it cannot be fetched" in result.stderr


def test_an_unforeseen_error_is_one_line(monkeypatch):
    def fail(path):
        raise LookupError("[red]brackets[/red] stay")

    monkeypatch.setattr(hub, "local_folder", fail)
    result = run("check", "x", code=1)
    assert result.stderr.splitlines() == [
        "LookupError: [red]brackets[/red] stay",
        "Run it again with --debug to see where.",
    ]


@pytest.mark.parametrize("name", ONE_FORMAT)
def test_inspect_accounts_for_every_byte(name):
    output = run("inspect", DATA / name).stdout
    report = mokernels.check(DATA / name, values="none")
    kinds = ("quantized weights", "their scales", "not quantized")
    sizes = [table_row(output, kind) for kind in kinds]
    assert sum(int(size[2].replace(",", "")) for size in sizes) == report.nbytes
    assert sum(int(size[1]) for size in sizes) == report.tensors
    assert table_row(output, "all")[2] == f"{report.nbytes:,}"
    assert table_row(output, "producer")[1] == "modelopt 0.47.0"
    assert table_row(output, "excluded")[1] == "lm_head, model.embed_tokens"
    row = table_row(output, report.plan.layers[0].format.name)
    assert row[2] == "14"
    # Two layers of 256 x 256 (q, o), 64 x 256 (k, v), 512 x 256 (gate, up) and 256 x 512 (down)
    # each: 557,056 weights; with a scale of 32 bits per channel that is 1,920 channels.
    bits = {"nvfp4": 4.5, "mxfp8": 8.25, "fp8_pc_pt": 8 + 32 * 1920 / 557056}.get(name, 8.0)
    assert float(row[4]) == pytest.approx(bits, abs=0.006)


def table_row(output: str, first: str) -> list[str]:
    """Cells of the only row of a table that starts with ``first``."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines()]
    (found,) = [row for row in rows if row and row[0] == first]
    return found


def test_inspect_lists_layers_and_plain_tensors(tmp_path):
    folder = make_checkpoint(tmp_path / "c", "NVFP4", kv_cache="FP8")
    output = run("inspect", folder, "--layers").stdout
    assert table_row(output, "KV cache")[1] == "FP8"
    assert table_row(output, "KV-cache scales")[1] == "2"
    assert table_row(output, "their biases")[1:3] == ["1", "128"]
    query = table_row(output, "model.layers.0.self_attn.q_proj")
    # 64 x 64: codes 2048, block scales 256, two fp32 scalars 8, a bf16 bias 128 bytes
    assert query[1:] == ["NVFP4", "64 x 64, bias", "nvfp4", "2,440"]
    assert table_row(output, "lm_head.weight")[1:] == ["bfloat16", "48 x 64", "", "6,144"]


def test_inspect_shows_a_checkpoint_that_is_not_quantized(tmp_path):
    folder = make_checkpoint(tmp_path / "c", layers=())
    (folder / "hf_quant_config.json").unlink()
    edit_json(folder / "config.json", lambda data: data.pop("quantization_config"))
    output = run("inspect", folder, "--layers").stdout
    assert table_row(output, "algorithm")[1] == "none"
    assert table_row(output, "not quantized")[3] == "100.0%"
    assert "bits per weight" not in output


def test_inspect_says_that_a_checkpoint_is_broken(tmp_path):
    folder = make_checkpoint(tmp_path / "c", "FP8_PER_CHANNEL_PER_TOKEN")
    edit_tensors(folder, lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.weight_scale"))
    assert "this checkpoint does not load. `mokernels check" in run("inspect", folder).stdout


def test_inspect_of_a_broken_file(tmp_path):
    folder = make_checkpoint(tmp_path / "c")
    (folder / "model.safetensors").write_bytes(b"\xff" * 40)
    assert "[header-length]" in run("inspect", folder, code=1).stderr


def test_tables_keep_their_rows_when_piped(tmp_path):
    folder = make_checkpoint(tmp_path / "c")
    environment = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
    result = runner.invoke(
        app, ["inspect", str(folder), "--layers"], env={**environment, "COLUMNS": None}
    )
    layer = "model.layers.0.self_attn.q_proj"
    assert table_row(result.stdout, layer)[4] == f"{64 * 64 + 4 + 4 + 128:,}"
