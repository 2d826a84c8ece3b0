#!/usr/bin/env bash
# Trains on an allocation of Slurm: a Ray node on every machine, the driver on the first.
#
#   sbatch --nodes=4 slurm.sh recipe.yaml run=mine learner.ranks=8
#
# What stands behind the recipe goes to `musketeers train`.  The run goes on with --auto-resume: after a node failure
# Slurm starts the job again, and shortly before the time limit the script saves a checkpoint and does so itself.
# To stop by hand, with a checkpoint: scancel --batch --signal=INT JOB
#
#SBATCH --job-name=musketeers
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
# This many seconds before the limit, for a step and its checkpoint.  USR1, because TERM also means scancel, after which
# the job must not come back.
#SBATCH --signal=B:USR1@300

set -euo pipefail

# Each can be set in the environment of sbatch.
SHARED=${SHARED:-$HOME}                # a folder that all machines see
VENV=${VENV:-$SHARED/n-musketeers/.venv}
JOIN_DEADLINE=${JOIN_DEADLINE:-600}    # seconds until all machines must have joined
PORT=${PORT:-$((20000 + SLURM_JOB_ID % 10000))}
HEAD_IP=${HEAD_IP:-$(hostname -I | cut -d ' ' -f 1)}  # where machines have several networks, name the fast one's

CONFIG=${1:?usage: sbatch slurm.sh RECIPE [key=value ...]}
shift

# shellcheck disable=SC1091
source "$VENV/bin/activate"
export MUSKETEERS_ZOO=${MUSKETEERS_ZOO:-$SHARED/zoo}
export RAY_USAGE_STATS_ENABLED=0 VLLM_NO_USAGE_STATS=1 PIP_DISABLE_PIP_VERSION_CHECK=1
export RAY_ADDRESS="$HEAD_IP:$PORT"

# Ray's control plane runs anybody's code who knows the token: it lies where only its owner can read.
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH=${RAY_AUTH_TOKEN_PATH:-$SHARED/.musketeers/auth_token}
make_token() {
    local fresh
    (umask 077 && mkdir -p "$(dirname "$RAY_AUTH_TOKEN_PATH")")
    fresh=$(mktemp "$RAY_AUTH_TOKEN_PATH.XXXXXX")  # mode 600
    python -c 'import secrets; print(secrets.token_hex(32), end="")' >"$fresh"
    ln "$fresh" "$RAY_AUTH_TOKEN_PATH" 2>/dev/null || true  # fails where another job has just made one
    rm "$fresh"
}
[[ -s $RAY_AUTH_TOKEN_PATH ]] || make_token
chmod 600 "$RAY_AUTH_TOKEN_PATH"

steps=() driver='' caught='' requeue=''
# shellcheck disable=SC2329  # called by the traps
stop() {  # the driver finishes its step, writes a checkpoint and ends with status 130
    [[ -n $driver ]] || exit 1
    if kill -TERM "$driver" 2>/dev/null; then caught=yes; fi
}
trap 'requeue=yes; stop' USR1
trap stop INT
# With TERM Slurm ends all processes of the job, so the driver has it too; a second one would cost the checkpoint.
trap 'if [[ -z $driver ]]; then exit 1; else caught=yes; fi' TERM
trap '((${#steps[@]} == 0)) || kill "${steps[@]}" 2>/dev/null || true' EXIT

start_ray() {  # start_ray <arguments of srun> -- <arguments of ray start>
    local where=()
    while [[ $1 != -- ]]; do where+=("$1"); shift; done
    shift
    srun "${where[@]}" --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
        ray start "$@" --num-cpus="$SLURM_CPUS_PER_TASK" --block &
    steps+=($!)
}

nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head_node=${nodes%%$'\n'*}  # `| head` would end scontrol by SIGPIPE now and then, and with it the job
workers=$((SLURM_JOB_NUM_NODES - 1))
start_ray --nodes=1 --ntasks=1 --nodelist="$head_node" -- \
    --head --node-ip-address="$HEAD_IP" --port="$PORT" --dashboard-host=127.0.0.1
until ray status >/dev/null 2>&1; do
    kill -0 "${steps[0]}" 2>/dev/null || { echo "error: the head on $head_node ended, see above" >&2; exit 1; }
    ((SECONDS < JOIN_DEADLINE)) || { echo "error: no head on $head_node after $SECONDS s" >&2; exit 1; }
    sleep 1
done
if ((workers > 0)); then
    start_ray --nodes="$workers" --ntasks="$workers" --exclude="$head_node" -- --address="$RAY_ADDRESS"
fi
python - "$SLURM_JOB_NUM_NODES" "$((JOIN_DEADLINE - SECONDS))" <<'PYTHON'
import sys, time
import ray

wanted, deadline = int(sys.argv[1]), time.monotonic() + int(sys.argv[2])
ray.init(log_to_driver=False, logging_level="ERROR")
while (joined := sum(node["Alive"] for node in ray.nodes())) < wanted:
    if time.monotonic() > deadline:
        sys.exit(f"error: only {joined} of {wanted} machines have joined the Ray cluster")
    time.sleep(1)
print(f"{joined} machines have joined the Ray cluster", flush=True)
PYTHON

musketeers train "$CONFIG" root="$SHARED/runs" --auto-resume "$@" &
driver=$!
while true; do  # `wait` also ends when a signal comes in
    caught='' status=0
    wait "$driver" || status=$?
    [[ -n $caught ]] || break
done

if [[ -n $requeue ]] && ((status == 130)); then
    echo "time is up: back to the queue with a checkpoint"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
