#!/usr/bin/env bash
# A distillation under Slurm, from the root of a clone on a file system that all nodes share:
#   make .venv/ready && sbatch deploy/slurm.sh configs/multi-node.yaml [train.steps=100 …]
# Five minutes before its time is over the job stops at a safe point and is queued again; so is one whose node failed.
#SBATCH --job-name=jf-cluster
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?this script is for sbatch}"
configuration=${1:?name a configuration, for example configs/multi-node.yaml}
# shellcheck disable=SC1091
. .venv/bin/activate

# Ray's servers leave 127.0.0.1 for the nodes' network; the token keeps other users of the cluster out.
export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=1 RAY_AUTH_MODE=token
ray get-auth-token --generate > /dev/null

# Since Slurm 22.05 a step gets one core unless srun is told as well.
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
ip=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}')
export RAY_ADDRESS=$ip:$((20000 + SLURM_JOB_ID % 20000))
resources=(--num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="${SLURM_GPUS_ON_NODE:-0}")

trap 'kill $(jobs -p) 2> /dev/null || true' EXIT
start_head() {
    srun --nodes=1 --ntasks=1 --nodelist="$head" \
        ray start --head --node-ip-address="$ip" --port="${RAY_ADDRESS##*:}" --include-dashboard=false "${resources[@]}" --block &
    ray=$!
    until timeout 30 ray status 2> /dev/null | grep CPU > /dev/null; do # it answers before the head's own node has joined
        kill -0 $ray 2> /dev/null || return 1
        sleep 2
    done
}
# Ray gives a node a fixed half minute to start, which one with a cold disk may not keep to.
start_head || start_head || start_head || { echo "error: Ray's head did not start on $head" >&2; exit 1; }
if ((${#nodes[@]} > 1)); then
    srun --nodes=$((${#nodes[@]} - 1)) --ntasks=$((${#nodes[@]} - 1)) --exclude="$head" \
        ray start --address="$RAY_ADDRESS" "${resources[@]}" --block &
fi

python jobs/distill.py --config "$configuration" "${@:2}" &
driver=$!
trap 'kill -TERM $driver || true' TERM
while kill -0 $driver 2> /dev/null && kill -0 $ray 2> /dev/null; do
    sleep 2 &
    wait $! || true # a signal ends this wait, where it would have to wait for a sleep in the foreground
done
if ! kill -0 $ray 2> /dev/null; then # without it the driver would go on as long as Ray's time limits let it
    echo "error: Ray's head on $head ended; submitted again, the job carries on with what is on disk" >&2
    kill -KILL $driver 2> /dev/null || true
    exit 1
fi
code=0
wait $driver || code=$?
if ((code == 143)); then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
