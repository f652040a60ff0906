# The latentd server, without torch. Build from the root of the repository:
#
#   docker build -f deploy/docker/server.Dockerfile -t latentd-server:0.1.0 .
#   docker build -f deploy/docker/server.Dockerfile -t latentd-server:0.1.0-gpu --build-arg FLAVOUR=gpu .
#
# FLAVOUR picks the ONNX Runtime. The GPU one brings CUDA and cuDNN as wheels, so a plain Python image serves both;
# the node brings the driver. For a release pin the base: --build-arg BASE=python:3.11-slim@sha256:...
ARG BASE=python:3.11-slim

FROM ${BASE} AS wheels
ARG FLAVOUR=cpu
WORKDIR /src
COPY deploy/docker/server-${FLAVOUR}.lock server.lock
RUN pip wheel --no-cache-dir --require-hashes --only-binary :all: --wheel-dir /wheels --requirement server.lock
COPY pyproject.toml README.md LICENSE ./
COPY protos protos
COPY server server
COPY client client
COPY trainer trainer
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM ${BASE}
LABEL org.opencontainers.image.title="latentd-server" \
      org.opencontainers.image.description="Serves deep generative models over gRPC" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN --mount=type=bind,from=wheels,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-index --no-deps /wheels/*.whl \
    && pip check
# The promise that no pickle is ever read here rests on this.
RUN if python -c "import torch" 2>/dev/null; then echo "torch does not belong in this image" >&2; exit 1; fi \
    && latentd --help >/dev/null

# Nothing is written but below /tmp, so the root file system can be mounted read-only.
ENV HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    LATENTD_MODELS=/models \
    LATENTD_LISTEN=0.0.0.0:8500 \
    LATENTD_HEALTH=0.0.0.0:8501 \
    LATENTD_HTTP=0.0.0.0:9090
# Numeric, so that Kubernetes can see that it is not root.
USER 10001:10001
# Empty, since ONNX Runtime would look there for weights kept outside a graph.
WORKDIR /var/lib/latentd
EXPOSE 8500 8501 9090
STOPSIGNAL SIGTERM
ENTRYPOINT ["latentd"]
