# On the CPU:        docker build -t ropeway .
# With CUDA:         docker build -t ropeway:cuda --target cuda .
# The load test:     docker build -t ropeway:loadtest --target loadtest .
# Run it:            docker run --rm -p 8000:8000 --read-only --tmpfs /tmp ropeway
# Your own model:    docker run --rm -p 8000:8000 -v ./model:/model:ro ropeway serve /model
# Baked in instead:  printf 'FROM ropeway\nCOPY . /model\nCMD ["serve", "/model"]\n' \
#                      | docker build -t my-model -f - ./model
#
# Options can be given as variables too: -e ROPEWAY_SERVE_MAX_NUM_SEQS=32. `docker stop` waits 10 s
# by itself; running streams may take --drain-timeout (30 s): docker stop -t 35.
# `make docker-proof` builds and tries all this where there is no Docker.

# Any Debian with Python 3.11 or newer.
ARG BASE=python:3.12-slim

FROM ${BASE} AS builder
RUN python3 -m venv /opt/ropeway
ENV PATH=/opt/ropeway/bin:$PATH
WORKDIR /src

# The package with its compiled kernel, which needs no PyTorch to be built.
FROM builder AS wheel
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
COPY locks/build.txt locks/
RUN pip install --no-cache-dir --no-deps --require-hashes -r locks/build.txt
COPY pyproject.toml setup.py README.md LICENSE ./
COPY engine engine
COPY server server
COPY weights weights
COPY loadtest loadtest
RUN pip wheel --no-deps --no-build-isolation --wheel-dir dist .

FROM builder AS build-cpu
# The CPU build of PyTorch is a tenth as large; PyPI's own brings CUDA.
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# Layers of their own: they are by far the largest, and change least. The headers and test programs
# of PyTorch (a quarter of it) are for those who compile against it.
RUN pip install --no-cache-dir --no-deps --index-url "${TORCH_INDEX}" "${TORCH}" \
    && cd "$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch" \
    && rm -rf include share test \
    && find bin -type f ! -name torch_shm_manager -delete
COPY locks/cpu.txt locks/
RUN pip install --no-cache-dir --no-deps --require-hashes -r locks/cpu.txt
COPY --from=wheel /src/dist dist
RUN pip install --no-cache-dir --no-deps dist/*.whl && pip check && pip uninstall --yes pip

FROM builder AS build-cuda
COPY locks/cuda.txt locks/
RUN pip install --no-cache-dir --no-deps --require-hashes -r locks/cuda.txt
COPY --from=wheel /src/dist dist
RUN pip install --no-cache-dir --no-deps dist/*.whl && pip check && pip uninstall --yes pip

# Loads a server elsewhere over HTTP, so without PyTorch, which `pip check` would miss.
FROM builder AS build-loadtest
COPY locks/loadtest.txt locks/
RUN pip install --no-cache-dir --no-deps --require-hashes -r locks/loadtest.txt
COPY --from=wheel /src/dist dist
RUN pip install --no-cache-dir --no-deps dist/*.whl && pip uninstall --yes pip

# The same base as the builders', so the same Python at the same path: an environment can be copied.
FROM ${BASE} AS runtime
RUN useradd --create-home --uid 1000 ropeway
ENV PATH=/opt/ropeway/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    ROPEWAY_SERVE_HOST=0.0.0.0 \
    ROPEWAY_SERVE_PORT=8000
WORKDIR /home/ropeway
# Converted checkpoints: -v ropeway-cache:/home/ropeway/.cache/ropeway keeps them.
RUN mkdir -p .cache/ropeway
EXPOSE 8000
STOPSIGNAL SIGTERM
# http.client and not urllib, which would take a proxy's address from the environment.
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s CMD ["python", "-c", \
    "import os, http.client as h; c = h.HTTPConnection('127.0.0.1', int(os.environ['ROPEWAY_SERVE_PORT']), timeout=2); c.request('GET', '/ready'); raise SystemExit(c.getresponse().status != 200)"]
ENTRYPOINT ["ropeway"]
CMD ["serve"]

FROM runtime AS cuda
# Triton compiles what starts its kernels with the system's C compiler, and keeps it in a folder.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
ENV TRITON_CACHE_DIR=/tmp/triton \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build-cuda /opt/ropeway /opt/ropeway
USER ropeway

FROM runtime AS loadtest
ENV MPLCONFIGDIR=/tmp/matplotlib
COPY --from=build-loadtest /opt/ropeway /opt/ropeway
USER ropeway
HEALTHCHECK NONE
ENTRYPOINT ["ropeway", "loadtest"]
CMD ["--help"]

# The last is what `docker build` makes by itself.
FROM runtime AS cpu
COPY --from=build-cpu /opt/ropeway /opt/ropeway
USER ropeway
