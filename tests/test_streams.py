"""Standard output and error that are closed, full or narrow end no program and cost no result."""

import ast
import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, run_script

ENTRIES = ("refl_lora.py", "inference.py", "inference_lora.py", "evaluate.py", "refl/__main__.py")
PRINTS = """
import sys
from refl.system.streams import protect_streams
protect_streams()
from refl.system.errors import UserError, run_as_command
def main():
    with open("result", "w") as result:
        for stream in (sys.stdout, sys.stderr):
            print("caf\\xe9 \\udcff" * 5000, file=stream, flush=True)
            print("lazily", end="", file=stream)
        result.write("whole")
run_as_command(main)
"""


@pytest.mark.parametrize("stderr", ["", "2>&-", "2>/dev/full", "2> >(true)"])
@pytest.mark.parametrize("stdout", ["", ">&-", ">/dev/full", "> >(true)"])
@pytest.mark.parametrize("variables", ["", "PYTHONIOENCODING=ascii", "PYTHONUNBUFFERED=1"])
def test_printing(tmp_path, stdout, stderr, variables):
    """In any combination; what the program prints goes nowhere but to its streams."""
    command = f"{variables} exec {sys.executable} -c '{PRINTS}' {stdout} {stderr}"
    ran = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True
    )
    assert ran.returncode == 0
    assert (tmp_path / "result").read_text() == "whole"
    narrow = "ascii" in variables
    expected = ("caf\\xe9 \\udcff" if narrow else "café \\udcff") * 5000 + "\nlazily"
    if not stdout:
        assert ran.stdout.decode() == expected
    if not stderr:
        warning = ran.stderr.decode().removeprefix(expected)
        assert ("WARNING: what was printed is incomplete" in warning) == (stdout == ">/dev/full")
        assert "Traceback" not in warning and "Exception ignored" not in warning


def test_an_interrupt_during_imports_is_silent(tmp_path):
    code = PRINTS.replace(
        "from refl.system.errors", "open('here', 'w'); import time; time.sleep(600)\nfrom refl.x"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment, **pipes)
    while not (tmp_path / "here").exists():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.communicate() == (b"", b"")
    assert process.returncode == -signal.SIGINT


@pytest.mark.parametrize("entry", ENTRIES)
def test_scripts_protect_their_streams_before_their_imports(entry):
    _, imported, condition, *_ = ast.parse((ROOT / entry).read_text()).body
    assert ast.unparse(imported) == "from refl.system.streams import protect_streams"
    assert ast.unparse(condition) == "if __name__ == '__main__':\n    protect_streams()"
    heavy = "import refl.system.streams, sys; assert 'torch' not in sys.modules; print(len(sys.modules))"
    assert subprocess.run([sys.executable, "-c", heavy], cwd=ROOT, capture_output=True).returncode == 0


@pytest.mark.slow
def test_training_without_streams(training_options, tmp_path):
    """Both on a full disk, as with a log beside the output: what is printed is lost, and no more."""
    words = " ".join(training_options)
    command = f"exec {sys.executable} refl_lora.py {words} >/dev/full 2>/dev/full"
    ran = run_script("bash", "-c", command)
    assert ran.returncode == 0
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").exists()
