"""Nothing of another library is imported before it is asked for."""

import subprocess
import sys

OTHERS = ("transformers", "accelerate", "lightning", "pytorch_lightning", "peft", "pandas", "matplotlib")


def run(code):
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_importing_the_package_and_its_integrations_imports_no_other_library():
    code = "import sys, fastpcgrad, fastpcgrad.integrations as i; i.Surgery(); dir(i); "
    assert run(code + f"print([name for name in {OTHERS} if name in sys.modules])") == "[]"


def test_a_module_that_is_not_there_is_named_with_those_that_are():
    code = """
import fastpcgrad
try:
    fastpcgrad.integrations.keras
except AttributeError as error:
    print(error)
"""
    assert "accelerate, lightning, transformers" in run(code)
