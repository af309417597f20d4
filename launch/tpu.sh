#!/bin/bash
# Trains on a Cloud TPU slice: the same command on every host of it, which JAX joins by itself.
#
#   TPU=my-slice ZONE=us-east5-a launch/tpu.sh setup
#   TPU=my-slice ZONE=us-east5-a launch/tpu.sh launch/train.py \
#       --config configs/ti2t/llava_dpo.py --workdir gs-mounted/runs/dpo ...
#   TPU=my-slice ZONE=us-east5-a launch/tpu.sh stop
#
# `setup` copies this checkout to every host and installs it there. A run goes on when this terminal
# closes; its log is ~/aa_jax/run.log on each host, that of host 0 is shown. The run directory must
# be on storage that all hosts share. `stop` sends SIGTERM: a checkpoint at the next step, then the
# end. DRY_RUN=1 prints the commands instead.
set -eu

: "${TPU:?name of the TPU, e.g. TPU=my-slice}" "${ZONE:?its zone, e.g. ZONE=us-east5-a}"
if [ "$#" -eq 0 ]; then
    echo "usage: TPU=... ZONE=... launch/tpu.sh setup | stop | launch/train.py --config ..." >&2
    exit 2
fi

gcloud_tpu() {
    if [ -n "${DRY_RUN:-}" ]; then
        printf '%q ' gcloud compute tpus tpu-vm "$@"
        echo
    else
        gcloud compute tpus tpu-vm "$@"
    fi
}

everywhere() { gcloud_tpu ssh "$TPU" --zone "$ZONE" --worker=all --command "$1"; }

case "$1" in
setup)
    root=$(cd "$(dirname "$0")/.." && pwd)
    gcloud_tpu scp --recurse "$root" "$TPU:~/aa_jax" --zone "$ZONE" --worker=all
    everywhere "cd ~/aa_jax && python3 -m venv .venv && .venv/bin/pip install --quiet -e . 'jax[tpu]'"
    ;;
stop)
    everywhere 'if [ -f ~/aa_jax/run.pid ]; then kill -TERM "$(cat ~/aa_jax/run.pid)"; fi'
    ;;
*)
    words=$(printf '%q ' "$@")
    everywhere "cd ~/aa_jax && { AA_JAX_HOSTS=auto nohup .venv/bin/python $words > run.log 2>&1 & \
echo \$! > run.pid; }"
    gcloud_tpu ssh "$TPU" --zone "$ZONE" --worker=0 --command 'tail -f ~/aa_jax/run.log'
    ;;
esac
