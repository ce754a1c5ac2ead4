# tokensieve's commands on NVIDIA GPUs. From the repository's root:
#   docker build -f containers/cuda.Dockerfile -t tokensieve:cuda .
#   docker run --rm --gpus all -v "$PWD/runs:/home/tokensieve/runs" tokensieve:cuda doctor
# The host gives the driver (NVIDIA Container Toolkit); torch's CUDA build brings every library above it.
FROM python:3.12-slim

# Triton builds the launchers of its kernels with a compiler.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

ARG TORCH_INDEX
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch==2.13.0

WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY tokensieve tokensieve
RUN pip install --no-cache-dir -c constraints.txt ".[hopper]"

RUN useradd --create-home tokensieve
USER tokensieve
WORKDIR /home/tokensieve
RUN mkdir runs

ENTRYPOINT ["tokensieve"]
CMD ["doctor"]
