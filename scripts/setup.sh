#!/bin/sh
# Make a virtual environment with what this machine can use: the CUDA set if a driver answers, else the
# CPU set with the wheels that compile CUDA without a driver. `setup.sh dev` adds the test tools.
# Nothing outside $VENV is touched.
set -eu
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
more=${1:-}

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "rooftune needs Python 3.11 or newer; $("$PYTHON" --version 2>&1) is too old. Try: make bench PYTHON=python3.12" >&2
  exit 2
}
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"

if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then
  # "CUDA Version: 13.0" is the newest runtime the driver can serve
  major=$(nvidia-smi | sed -n 's/.*CUDA Version: *\([0-9]*\).*/\1/p' | head -n 1)
  if [ "${major:-12}" -ge 13 ]; then extras=cuda13; else extras=cuda12; fi
  pin=""
else
  extras=cpu,offline
  pin="-c constraints/cpu.txt"
fi
extras=$extras${more:+,$more}
echo "rooftune: installing the [$extras] set into $VENV" >&2
# --no-compile: byte code is written when a module is first imported; doing it for all took a minute of two.
# shellcheck disable=SC2086  # $pin is two words or none
"$VENV/bin/python" -m pip install --no-compile --disable-pip-version-check -q $pin -e ".[$extras]"
touch "$VENV/.${more:-ready}"
