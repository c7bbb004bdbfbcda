# syntax=docker/dockerfile:1
# The server's image. CPU by default:
#   docker build -t gearshift .
#   docker run --rm -p 127.0.0.1:8001:8001 -p 127.0.0.1:8002:8002 -e GEARSHIFT_INSECURE_BIND=true \
#     -v "$PWD/examples/digits/repository:/models:ro" gearshift
# Inside a container the server binds every address, which it refuses without TLS, tokens or, as here where only this
# machine's loopback is published, consent.
# With CUDA (torch's wheels bring the CUDA libraries, so the plain base serves; the host needs the NVIDIA runtime):
#   docker build -t gearshift:gpu --build-arg TORCH_INDEX= --build-arg EXTRAS=gpu .
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=openvino
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# torch first and alone: its layer is the big one and changes least
RUN python -m venv /opt/gearshift \
    && /opt/gearshift/bin/pip install --no-deps --retries 1 ${TORCH_INDEX:+--extra-index-url ${TORCH_INDEX}} "${TORCH}"
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY protos protos
COPY server server
COPY variants variants
# onnxruntime and onnxruntime-gpu install the same Python package, so only one of them may stay
RUN /opt/gearshift/bin/pip install ".[${EXTRAS}]" \
    && case ",${EXTRAS}," in *,gpu,*) \
      /opt/gearshift/bin/pip uninstall -y onnxruntime onnxruntime-gpu \
      && /opt/gearshift/bin/pip install --no-deps "onnxruntime-gpu>=1.22" ;; \
    esac

FROM ${BASE}
RUN useradd --uid 10001 --create-home --home-dir /home/gearshift --shell /usr/sbin/nologin gearshift
COPY --from=build /opt/gearshift /opt/gearshift
ENV PATH=/opt/gearshift/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    GEARSHIFT_MODELS=/models \
    GEARSHIFT_HOST=0.0.0.0
USER 10001:10001
WORKDIR /home/gearshift
VOLUME /models
EXPOSE 8001 8002
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s \
    CMD ["sh", "-c", "exec python -m server.healthcheck ${GEARSHIFT_GRPC_PORT:-8001}"]
ENTRYPOINT ["gearshift"]
CMD ["serve"]
