"""What fastpcgrad costs: against whom, on which machine, at which commit.

Calls, by pytest-benchmark (``pytest benchmarks --benchmark-only``):
``test_kernels`` ops on a packed J; ``test_methods`` every method; ``conftest`` what the plugin lacks; ``saved`` its
report as rows.

Measured here: ``steps`` whole training steps in turn; ``memory`` their peaks; ``gradnorm`` a step of GradNorm; ``gpu``
all of it on a GPU, where there is no plugin (``gpu_compile`` comes before); ``tune`` finds csrc/cuda/tuned.h,
``tune_triton`` the sizes of Triton's kernels among ``triton_candidates``.
``overlap``: reductions within backward passes, on several processes.
``quality``: what small networks come to, trained by every rule (``quality_problems``, ``quality_rules``,
``quality_tables``).
``gpu_plan`` is what ``make gpu`` does there, in the order of worth; ``gpu_build`` compiles for it elsewhere.

Who and what: ``cases`` as data; ``models``; ``kernels`` who competes in an op; ``modes`` the ways through a step;
``method_cases``; ``peers``; ``check`` the oracle's word on each of them before a clock starts.

How: ``timing`` in turn, or alone in a GPU's stream; ``bandwidth`` of the machine; ``session`` one run; ``run`` its
commands.

What comes of it: ``rows`` in benchmarks/results; ``targets``; ``tables`` in Markdown; ``plot``.
"""
