#!/bin/bash
# The image's ENTRYPOINT. Without arguments or with `train ...`: training and dashboard under supervision. `bash`, `sh`: a
# shell. Anything else: that command of the application, such as `status`.
set -euo pipefail
cd /opt/hybrid_vit_cascade
# configs/demo.yaml is meant from here; a shell by SSH gets the same variable and starts elsewhere.
if [[ -f ${CONFIG:-} ]]; then
    CONFIG=$(realpath "$CONFIG")
    export CONFIG
fi

case ${1:-train} in
    train) exec python -m app supervise "${@:2}" ;;
    bash | sh) exec "$@" ;;
    *) exec python -m app "$@" ;;
esac
