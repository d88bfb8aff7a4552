# docker build -f docker/cuda.Dockerfile -t two_level_mha:cuda .
# docker run --rm --gpus all --ipc host two_level_mha:cuda torchrun --nproc-per-node 8 -m two_level_mha check
# The toolkit has the major version of torch's CUDA, which `pip install torch` chooses: CUDA=..  follows it.
ARG CUDA=13.0.2
FROM nvidia/cuda:${CUDA}-devel-ubuntu24.04
RUN apt-get update && apt-get install -y --no-install-recommends g++ python3-dev python3-venv && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/venv/bin:$PATH
RUN python3 -m venv /opt/venv
ARG TORCH=torch
RUN pip install --no-cache-dir "$TORCH" "setuptools>=77" ninja
WORKDIR /source
COPY . .
ENV FORCE_CUDA=1
RUN pip install --no-cache-dir --no-build-isolation '.[hf]' && two-level-mha info
WORKDIR /work
CMD ["two-level-mha", "info"]
