"""The Triton backend under the suites of the other backends, and its own (triton_rows.py).

Where there is no GPU the kernels run in Triton's interpreter, which has to be chosen before they are imported, so the
suites get processes of their own. It takes milliseconds for a block of entries, hence a choice of tests. On a GPU
``make gpu-check`` runs all of them.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")

# A line per choice. bf16 outputs are left out where the rounding matters: the interpreter truncates what a GPU rounds.
SUITES = {
    "rows": """
        test_rows.py and statistics and fp32 and 0.7 and (None or 30.0) and not 0.25
        top_k_is_exact and fp32 and (ties-97 or masked-17 or equal-17 or descending-16 or ties-3001)
        divergence_and_gradient and fp32 and 0.7 and (normal or masked or huge) and not (jsd.1 or jsd.5)
        divergence_and_gradient and fp32 and 0.7 and (skl or jsd.9) and (peaked or flat or close)
        scale_and_softcap and 30.0 and (reverse or srkl)
        test_rows.py and sizes and fp32
        bad_row and student and entry1024 and nan
        test_rows.py and identical and 0.7
        test_rows.py and symmetric and 0.1
        mixtures_close
        real_vocabulary
        one_entry
        entries_that_one_model
        infinite_says
        hardly_overlap
        student_masks
        without_entries
        transformed_logits
        large_logits
        triton_rows.py
        test_vocabulary_parts.py and those_of_the_whole and 0.7
        only_one_model_masks and teacher and skl
        among_masked_entries and student
        statistics_are_merged and 0.7 and 1000 and masked
        test_example.py
        test_properties.py
        test_operators.py and needs_room
    """,
    "engine": """
        test_objectives.py and not VCRD and not bad_token and not default_dtype
        test_vcrd.py and example_loss
        test_functional.py and test_divergence and fp32 and 0.7 and (forward or srkl)
        test_functional.py and (plackett or test_statistics or ignored or any_leading or no_tokens)
        test_logits.py and (every_function or TSDKD-one)
        test_topk.py and (is_the_reference or masked_bucket or 20.0 and (jsd.1 or skl))
        test_autograd.py and TSDKD and second
        test_masked_entries.py and objectives and TSDKD and finfo
        test_chunks.py and padded_rows
        on_identical_logits and jsd.9
        test_teacher_dtypes.py and values
    """,
    "more": """
        test_rows.py and bad_row and entry1024
        test_objectives.py and bad_token and TSDKD-teacher
        test_objectives.py and default_dtype and GKD
        test_vcrd.py and float32 and test_likelihood_ratio
        test_distillm.py and against_dense
        test_topk.py and small_budgets
        test_autograd.py and TSDKD and (frozen or detached or no_grad)
        test_autograd.py and bias_alone
        test_chunks.py and longer_than
        on_identical_logits and (srkl or statistics or TSDKD)
        test_bad_input.py
        test_terms.py and (two_divergences or groups or beside)
        test_adapted.py and every_backend and (GKD or TSDKD)
    """,
}


@pytest.mark.parametrize(
    ("name", "least"), [("rows", 115), ("engine", 50), pytest.param("more", 80, marks=pytest.mark.slow)]
)
def test_interpreted(name, least):
    lines = [line.strip() for line in SUITES[name].strip().splitlines()]
    files = sorted({f"tests/{file}" for file in re.findall(r"\w+\.py", SUITES[name])})
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    command += ["-p", "no_extension"] if name == "rows" else []  # what make gpu-check runs, where it is not there
    command += ["-k", " or ".join(f"({line})" for line in lines)]
    environment = os.environ | {
        "KDKERNELS_TEST_BACKENDS": "triton",
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True)
    print(done.stdout[-3000:])
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > least and "skipped" not in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="make gpu-check launches them on the GPU")
def test_every_variant_runs_once():
    """What compute-sanitizer is to run, in the interpreter."""
    code = "from kdkernels.kernels.triton.resources import launch; launch('cpu', rows=1, vocabulary=150)"
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, check=True)
