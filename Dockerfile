# Ropeway on the CPU:      docker build -t ropeway .
# Ropeway with CUDA:       docker build -t ropeway --build-arg TORCH_INDEX=https://pypi.org/simple .
# Run it:                  docker run --rm -p 8000:8000 ropeway
# Your own model:          docker run --rm -p 8000:8000 -v ./model:/model:ro ropeway serve /model
#
# Options can be given as variables too: -e ROPEWAY_SERVE_MAX_NUM_SEQS=32. `docker stop` waits 10 s
# by itself; running streams may take --drain-timeout (30 s): docker stop -t 35.

ARG BASE=python:3.12-slim

FROM ${BASE} AS builder
# The CPU build of PyTorch is a tenth as large; PyPI's own brings CUDA.
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/ropeway
ENV PATH=/opt/ropeway/bin:$PATH
# A layer of its own: it is by far the largest, and changes least.
RUN pip install --no-cache-dir --index-url "${TORCH_INDEX}" "${TORCH}"
WORKDIR /src
COPY pyproject.toml setup.py README.md LICENSE ./
COPY engine engine
COPY server server
COPY weights weights
COPY loadtest loadtest
RUN pip install --no-cache-dir .

# Same base, so the same Python at the same path: the environment can be copied as it is.
FROM ${BASE}
RUN useradd --create-home --uid 1000 ropeway
COPY --from=builder /opt/ropeway /opt/ropeway
ENV PATH=/opt/ropeway/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    ROPEWAY_SERVE_HOST=0.0.0.0 \
    ROPEWAY_SERVE_PORT=8000
USER ropeway
WORKDIR /home/ropeway
# Converted checkpoints: -v ropeway-cache:/home/ropeway/.cache/ropeway keeps them.
RUN mkdir -p .cache/ropeway
EXPOSE 8000
# http.client and not urllib, which would take a proxy's address from the environment.
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s CMD ["python", "-c", \
    "import os, http.client as h; c = h.HTTPConnection('127.0.0.1', int(os.environ['ROPEWAY_SERVE_PORT']), timeout=2); c.request('GET', '/ready'); raise SystemExit(c.getresponse().status != 200)"]
ENTRYPOINT ["ropeway"]
CMD ["serve"]
