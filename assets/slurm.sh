#!/bin/bash
# sbatch assets/slurm.sh: a job that is out of time gets a SIGTERM, saves, and is queued again
#SBATCH --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --signal=TERM@300 --requeue --open-mode=append
export MASTER_ADDR=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1) MASTER_PORT=29500
ls out/ngpt_1b/ckpt* > /dev/null 2>&1 && resume=--resume
srun bash -c "RANK=\$SLURM_PROCID LOCAL_RANK=\$SLURM_LOCALID WORLD_SIZE=\$SLURM_NTASKS \
    python train.py configs/ngpt_1b.py $resume"
[ $? = 75 ] && scontrol requeue $SLURM_JOB_ID       # without torchrun, which makes 1 of every status
