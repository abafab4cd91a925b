"""Nothing of another library is imported before it is asked for."""

import subprocess
import sys

CODE = """
import sys
import fastpcgrad
import fastpcgrad.integrations

fastpcgrad.integrations.Surgery(), dir(fastpcgrad.integrations)
others = "transformers accelerate lightning pytorch_lightning peft torchjd jax LibMTL sentence_transformers trl pandas"
print([name for name in [*others.split(), "matplotlib"] if name in sys.modules])
try:
    fastpcgrad.integrations.keras
except AttributeError as error:
    print(error)
"""


def test_importing_the_package_and_its_integrations_imports_no_other_library():
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", CODE], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found, error = result.stdout.splitlines()
    assert found == "[]"
    assert (
        "it has Surgery and accelerate, jax, libmtl, lightning, sentence_transformers, torchjd, transformers, trl"
        in error
    )
