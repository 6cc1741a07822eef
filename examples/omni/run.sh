#!/usr/bin/env bash
# Writes the media and trains on six CPU processes: some minutes on two cores. It needs `pip install captcha pillow`.
#
#     examples/omni/run.sh [--set KEY=VALUE ...]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python "$here/make.py"
mimogrid train "$here/job.toml" "$@"
