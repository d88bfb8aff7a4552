# docker build -f docker/cpu.Dockerfile -t two_level_mha:cpu .
# docker run --rm two_level_mha:cpu torchrun --nproc-per-node 4 -m two_level_mha check --device-type cpu
FROM python:3.12-slim
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
ARG TORCH=torch
RUN pip install --no-cache-dir "$TORCH" "setuptools>=77" ninja
WORKDIR /source
COPY . .
ENV TLM_CUDA=0
RUN pip install --no-cache-dir --no-build-isolation '.[hf]' && two-level-mha info
WORKDIR /work
CMD ["two-level-mha", "info"]
