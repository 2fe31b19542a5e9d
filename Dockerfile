# The whole environment on a CUDA base. Not built by CI: it needs Docker and several GB. The driver comes from the host.
#   docker build -t dense-ssl . && docker run --gpus all --ipc host -v /data:/data dense-ssl \
#     torchrun --nproc_per_node 8 trainer/run.py --method loca --shards /data/shards --out /data/runs/loca
FROM nvidia/cuda:13.0.2-base-ubuntu24.04
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-venv && rm -rf /var/lib/apt/lists/*
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH
RUN python3 -m venv $VIRTUAL_ENV
WORKDIR /opt/dense-ssl
COPY . .
RUN pip install --no-cache-dir -c constraints.txt -e ".[bench]"
