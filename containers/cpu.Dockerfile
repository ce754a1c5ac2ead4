# tokensieve's commands on CPUs. From the repository's root:
#   docker build -f containers/cpu.Dockerfile --build-arg TORCH_INDEX=<PyTorch's index of CPU builds> -t tokensieve:cpu .
#   docker run --rm -v "$PWD/runs:/home/tokensieve/runs" tokensieve:cpu demo
# Without TORCH_INDEX it works as well, but brings the CUDA libraries along.
FROM python:3.12-slim

# torch.compile builds its CPU kernels with a compiler.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

ARG TORCH_INDEX
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch==2.13.0

WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY tokensieve tokensieve
RUN pip install --no-cache-dir -c constraints.txt .

RUN useradd --create-home tokensieve
USER tokensieve
WORKDIR /home/tokensieve
RUN mkdir runs

ENTRYPOINT ["tokensieve"]
CMD ["doctor"]
