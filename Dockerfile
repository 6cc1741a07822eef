# mimogrid in a container: `--target cpu` (gloo) or `--target cuda` (NCCL).
#
#   docker build --target cpu --tag mimogrid:0.1.0 .
#   docker run --rm --shm-size 1g mimogrid:0.1.0 train /opt/mimogrid/examples/first/job.toml
#
# Both stages install the wheel that the first stage builds, with the versions of requirements.lock, and run as a user
# without rights. Runs are written to the working folder, /runs; mount a volume there to keep them.

FROM python:3.12.11-slim-bookworm AS wheel
WORKDIR /source
COPY . .
RUN python -m pip install --no-cache-dir build==1.6.1 \
 && python -m build --wheel --outdir /wheel \
 && cp requirements.lock /wheel/constraints.txt

FROM python:3.12.11-slim-bookworm AS cpu
COPY --from=wheel /wheel /wheel
# torch's own index has builds without CUDA; the version is the lock's. megatron-core imports triton.
RUN python -m pip install --no-cache-dir --constraint /wheel/constraints.txt \
      --extra-index-url https://download.pytorch.org/whl/cpu \
      "torch==2.13.0+cpu" \
 && python -m pip install --no-cache-dir --constraint /wheel/constraints.txt \
      "mimogrid[train,hf,data] @ file://$(find /wheel -name '*.whl')" \
 && useradd --create-home --uid 1000 mimogrid \
 && install --directory --owner=mimogrid /runs
COPY --chown=1000 examples /opt/mimogrid/examples
USER 1000
WORKDIR /runs
ENTRYPOINT ["mimogrid"]
CMD ["env"]

# torch's default build brings CUDA's libraries and NCCL as wheels; the host needs a driver only. Transformer Engine is
# not in it, since its torch part is compiled with CUDA's compiler; without it the layers are megatron-core's local ones.
FROM python:3.12.11-slim-bookworm AS cuda
COPY --from=wheel /wheel /wheel
RUN python -m pip install --no-cache-dir --constraint /wheel/constraints.txt \
      "mimogrid[train,hf,data] @ file://$(find /wheel -name '*.whl')" \
 && useradd --create-home --uid 1000 mimogrid \
 && install --directory --owner=mimogrid /runs
COPY --chown=1000 examples /opt/mimogrid/examples
USER 1000
WORKDIR /runs
ENTRYPOINT ["mimogrid"]
CMD ["env"]
