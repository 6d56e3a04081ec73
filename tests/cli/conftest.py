import shutil

import pytest

from hf_efficiency import cli
from tests.loaders import tables_kept

# small enough for the tiny model: 2 calibration sequences, 2 windows
SMALL = ["--num-samples", "2", "--seq-len", "32", "--window", "32", "--max-windows", "2"]


@pytest.fixture(scope="session")
def quantized_dir(tmp_path_factory, tiny_llama_dir):
    """What `hf-efficiency quantize` made of the tiny Llama: 4-bit GPTQ with report and card. Read only."""
    base = tmp_path_factory.mktemp("cli")
    shutil.copytree(tiny_llama_dir, base / "tiny")
    out = base / "tiny-gptq4"
    argv = ["quantize", str(base / "tiny"), "--method", "gptq", "--bits", "4", "--group-size", "32", *SMALL]
    with tables_kept():  # a session's fixture comes before any module's, and the command prefers our loaders
        assert cli.main([*argv, "--prompt", "Once upon", "--output", str(out)]) == 0
    return out


@pytest.fixture
def fails(capsys):
    """Runs a command that must end with status 2, and returns its one line of complaint."""

    def run(*argv):
        assert cli.main([str(argument) for argument in argv]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert lines[-1].startswith("hf-efficiency: error: ")
        assert not any("Traceback" in line for line in lines)
        return lines[-1].removeprefix("hf-efficiency: error: ")

    return run
