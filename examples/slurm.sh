#!/bin/bash
# Train on several nodes. SLURM may stop, preempt and requeue the job until the run is done. From the checkout, in its environment:
#     sbatch examples/slurm.sh runs/loca_b16 --method loca --shards /data/shards
# The first argument is the run's folder, on storage that all nodes share; the rest are run.py options. See docs/cluster.md.
#SBATCH --job-name=pretrain
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@300
set -u
out=$1; shift
before=$(cat "$out/status.json" 2>/dev/null)
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=1 torchrun \
    --nnodes="$SLURM_NNODES" --nproc-per-node="${RANKS_PER_NODE:-gpu}" --max-restarts=3 \
    --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$first:$((20000 + SLURM_JOB_ID % 10000))" \
    --signals-to-handle=SIGTERM,SIGINT,SIGUSR1 --shutdown-timeout=240 \
    trainer/run.py --out "$out" "$@"
code=$?
after=$(cat "$out/status.json" 2>/dev/null)
case $after in
    *'"done"'*) exit 0 ;;
    *'"stopped"'*) # an unchanged status means that this start made no progress, so another would make none either
        if [ "$after" != "$before" ]; then scontrol requeue "$SLURM_JOB_ID"; fi ;;
esac
exit "$code"
