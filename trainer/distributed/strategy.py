"""Which ``tf.distribute`` strategy fits this machine and cluster.

    choice = create("auto", cluster=None, gpus=None, collectives="tensorflow",
                    startup_timeout=300)
    choice.strategy, choice.reason      # "MirroredStrategy over 4 GPUs: all that are seen"

The training loop runs the same graph under every strategy, so everything but the connection to a
TPU is also tested on logical CPU devices.
"""

import dataclasses
import functools
import os
import queue
import threading
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path

from trainer.config import Collectives, Strategy
from trainer.distributed import ring
from trainer.distributed.cluster import Cluster, split_address
from trainer.distributed.ring import Ring
from trainer.errors import ConfigurationError, UsageError
from trainer.runtime import tf

# PCI vendor and device numbers of Google's TPUs (v2 and v3, v4, v5, v6e), as JAX's
# jax/_src/hardware_utils.py lists them.
_GOOGLE = "0x1ae0"
_TPUS = ("0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006e", "0x006f")


@dataclasses.dataclass(frozen=True)
class StrategyChoice:
    """The strategy of a run.

    Attributes:
        strategy: What the model is built and trained under.
        reason: A sentence for the user: which strategy it is, and why.
        notice: A sentence for the user about a requested option that is not used; or empty.
        ring: The ring that its workers all-reduce through; None: TensorFlow's own collectives.
    """

    strategy: tf.distribute.Strategy
    reason: str
    notice: str = ""
    ring: Ring | None = None


def create(
    kind: Strategy,
    *,
    cluster: Cluster | None,
    gpus: int | None,
    collectives: Collectives,
    startup_timeout: float,
) -> StrategyChoice:
    """Chooses and constructs a strategy, before TensorFlow's first operation where there are GPUs.

    Args:
        kind: The kind of strategy; ``auto``: multiworker where there is a cluster, else a TPU, else
            all GPUs where there are several, else one device.
        cluster: The workers; None: this process trains alone. All workers must be running: while
            one is missing, TensorFlow waits for it holding Python's global interpreter lock.
        gpus: Number of GPUs that this process must have, and uses; None: all that are seen; 0:
            none.
        collectives: What several workers all-reduce with: ``tensorflow`` or ``ring``.
        startup_timeout: Seconds in which a TPU must answer.

    Raises:
        ConfigurationError: The devices or the workers that were asked for do not exist.
    """
    kind, seen = _choose(kind, cluster, gpus, collectives)
    if cluster:  # And only then is the kind multiworker.
        return _multiworker(cluster, seen, collectives)
    if kind == "tpu":
        return _tpu(os.environ, startup_timeout)
    if kind == "mirrored":
        return _mirrored(seen)
    if seen:
        return StrategyChoice(tf.distribute.get_strategy(), f"one device: GPU 0 of {len(seen)}")
    why = "gpus=0" if gpus == 0 else "no GPU is seen"
    if gpus is None and _has_nvidia_gpu():
        why = f"no GPU is seen, though this machine has one. {_gpu_remedy()}"
    return StrategyChoice(tf.distribute.get_strategy(), f"one device: the CPU ({why})")


def check(
    kind: Strategy, *, cluster: Cluster | None, gpus: int | None, collectives: Collectives
) -> int:
    """Checks what ``create`` checks before it connects to other workers or to a TPU.

    Returns:
        The number of GPUs that it would use in this process.

    Raises:
        ConfigurationError: As ``create`` raises it.
    """
    return len(_choose(kind, cluster, gpus, collectives)[1])


def count_gpus(gpus: int | None) -> int:
    """Returns the number of GPUs that ``create`` uses in this process, if they exist.
    Starts no TensorFlow device, so it can be called before workers meet.
    """
    seen = len(tf.config.list_physical_devices("GPU"))
    return seen if gpus is None else min(gpus, seen)


def has_accelerator() -> bool:
    """Tells whether TensorFlow computes on GPUs or a TPU in this process; starts its devices."""
    return any(device.device_type != "CPU" for device in tf.config.list_logical_devices())


def check_batch_size(batch_size: int, replicas: int) -> None:
    """Checks that a global batch divides among the replicas.

    Raises:
        UsageError: It does not; the message names the sizes beside it that do.
    """
    if batch_size % replicas:
        below = batch_size // replicas * replicas
        sizes = " or ".join(str(size) for size in (below, below + replicas) if size)
        raise UsageError(
            f"batch_size must be a multiple of the {replicas} replicas. "
            f"Received: batch_size={batch_size}. Use {sizes}."
        )


def _choose(
    kind: Strategy, cluster: Cluster | None, gpus: int | None, collectives: Collectives
) -> tuple[Strategy, list]:
    """Returns the kind of the strategy, and the GPUs that it uses."""
    seen = _configure_gpus(gpus)
    kind = _resolve(kind, cluster, gpus, len(seen))
    if collectives == "ring":
        _check_ring(kind, len(seen))
    return kind, seen


def _resolve(kind: Strategy, cluster: Cluster | None, gpus: int | None, seen: int) -> Strategy:
    """Returns what ``auto`` stands for, and checks the kind against the cluster."""
    if cluster and kind not in ("auto", "multiworker"):
        raise ConfigurationError(
            f"Expected one worker for strategy={kind!r}. Received: {len(cluster.workers)}. "
            "Use strategy='multiworker'; to train alone, unset TF_CONFIG and set TRAINER_WORKERS=1."
        )
    if kind == "multiworker" and not cluster:
        raise ConfigurationError(
            "Expected several workers for strategy='multiworker'. Received: none described. "
            "Set TF_CONFIG, or use python -m trainer.launch --workers N on this machine."
        )
    if kind != "auto":
        return kind
    if cluster:
        return "multiworker"
    if gpus is None and has_tpu(os.environ):
        return "tpu"
    return "mirrored" if seen > 1 else "one"


def _check_ring(kind: Strategy, gpus: int) -> None:
    expected = "Expected several workers that have CPUs only for collectives='ring'. Received: "
    if kind != "multiworker":
        raise ConfigurationError(
            f"{expected}one process. Use collectives='tensorflow', the default."
        )
    if gpus:
        raise ConfigurationError(
            f"{expected}a worker with {gpus} GPUs. Use collectives='tensorflow', the default, "
            "which uses NCCL on GPUs; or gpus=0."
        )


def _configure_gpus(count: int | None) -> list:
    """Makes ``count`` GPUs visible and lets their memory grow as needed; returns them."""
    seen = tf.config.list_physical_devices("GPU")
    if count is not None:
        if len(seen) < count:
            raise ConfigurationError(
                f"Expected {count} GPUs (gpus={count}). Received: {len(seen)}. {_gpu_remedy()}"
            )
        seen = seen[:count]
        try:
            tf.config.set_visible_devices(seen, "GPU")
        except RuntimeError:
            if len(tf.config.list_logical_devices("GPU")) != count:
                raise ConfigurationError(
                    f"Expected to choose gpus={count} before TensorFlow's first operation. "
                    "Received: a TensorFlow that is running. Start a new Python."
                ) from None
    for gpu in seen:
        try:
            tf.config.experimental.set_memory_growth(gpu, True)
        except (RuntimeError, ValueError):
            break  # TensorFlow is running already, or whoever called has set a limit of memory.
    return seen


def _gpu_remedy() -> str:
    if not tf.test.is_built_with_cuda():
        return (
            "This TensorFlow is built without CUDA: pip install 'digits-trainer[gpu]' (and remove "
            "tensorflow-cpu)."
        )
    if not _has_nvidia_gpu():
        return "There is no NVIDIA device here: in a container, is the GPU passed to it?"
    return "nvidia-smi shows whether the driver works; TF_CPP_MIN_LOG_LEVEL=0 shows CUDA's errors."


def _has_nvidia_gpu() -> bool:
    return Path("/dev/nvidia0").exists()


def has_tpu(environ: Mapping[str, str], devices: Path = Path("/sys/bus/pci/devices")) -> bool:
    """Tells whether a TPU is attached to this machine, or TPU_NAME names a remote one."""
    if environ.get("TPU_NAME"):
        return True
    for device in devices.glob("*"):
        try:
            vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "device"))
        except OSError:
            continue
        if vendor == _GOOGLE and kind in _TPUS:
            return True
    return False


def _multiworker(cluster: Cluster, gpus: Sequence, collectives: Collectives) -> StrategyChoice:
    tfd = tf.distribute
    resolver = tfd.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec({"worker": list(cluster.workers)}),
        task_type="worker",
        task_id=cluster.index,
        num_accelerators={"GPU": len(gpus)},
        rpc_layer="grpc",
    )
    bypass_proxy(cluster.workers, os.environ)
    # Before TensorFlow's server listens at the port.
    connected = ring.connect(cluster) if collectives == "ring" else None
    kinds = tfd.experimental.CommunicationImplementation
    strategy = tfd.MultiWorkerMirroredStrategy(
        resolver,
        tfd.experimental.CommunicationOptions(implementation=kinds.NCCL if gpus else kinds.RING),
    )
    by, notice = ", by NCCL" if gpus else "", ""
    if connected and (problem := ring.install(connected, strategy)):
        connected.close()
        connected = None
        notice = (
            f"The ring of collectives='ring' is not used: {problem}. The workers use TensorFlow's "
            "collectives, with the same results in more time."
        )
    elif connected:
        by = ", by the ring"
    each = f"{len(gpus)} GPUs" if gpus else "one CPU"
    return StrategyChoice(
        strategy,
        f"MultiWorkerMirroredStrategy over {len(cluster.workers)} workers of {each} each{by}: "
        f"{', '.join(cluster.workers)}",
        notice,
        connected,
    )


def bypass_proxy(workers: Sequence[str], environ: MutableMapping[str, str]) -> None:
    """Has gRPC connect to the workers themselves where the environment names a proxy.

    It asks ``grpc_proxy``, ``https_proxy`` and ``http_proxy`` for one, even for 127.0.0.1, and
    leaves out the hosts in ``no_grpc_proxy``, or in ``no_proxy`` where that is not set
    (https://grpc.github.io/grpc/core/md_doc_environment_variables.html). Nothing but gRPC reads
    ``no_grpc_proxy``: downloads still go through the proxy.
    """
    hosts = [split_address(address)[0] for address in workers]
    present = environ.get("no_grpc_proxy", environ.get("no_proxy", ""))
    environ["no_grpc_proxy"] = ",".join(dict.fromkeys([*filter(None, present.split(",")), *hosts]))


def _mirrored(gpus: Sequence) -> StrategyChoice:
    devices = tf.config.list_logical_devices("GPU") if gpus else []
    kind = "GPUs"
    if not gpus:
        devices, kind = tf.config.list_logical_devices("CPU"), "logical CPU devices"
        if len(devices) < 2:
            raise ConfigurationError(
                "Expected GPUs for strategy='mirrored'. Received: none. "
                f"{_gpu_remedy()} strategy='one' trains on the CPU."
            )
    strategy = _mirrored_strategy(tuple(device.name for device in devices))
    return StrategyChoice(
        strategy, f"MirroredStrategy over {len(devices)} {kind}: all that are seen"
    )


@functools.cache
def _mirrored_strategy(devices: tuple[str, ...]) -> tf.distribute.MirroredStrategy:
    """Returns the strategy of some devices, one in a process: the collectives of a second one begin
    with the same numbers, under which the devices wait for the shapes of the first (TensorFlow
    2.21).
    """
    return tf.distribute.MirroredStrategy(list(devices))


def _tpu(environ: Mapping[str, str], timeout: float) -> StrategyChoice:
    # On a TPU VM the name must be "local" (googlecolab/colabtools#4699).
    name = environ.get("TPU_NAME") or "local"
    made: queue.SimpleQueue = queue.SimpleQueue()

    def make() -> None:
        try:
            made.put(_connect_tpu(name))
        except Exception as error:  # Raised by TensorFlow, a socket or Google's client.
            made.put(error)

    # In a thread, because TensorFlow waits forever for an address that does not answer.
    threading.Thread(target=make, daemon=True).start()
    try:
        strategy = made.get(timeout=timeout)
    except queue.Empty:
        strategy = TimeoutError(f"nothing within {timeout:g} s")
    if isinstance(strategy, Exception):
        reason = " ".join(str(strategy).split())[:200]
        remedy = "Use strategy='one' to train without it."
        if "ConfigureDistributedTPU" in str(strategy):
            remedy = (
                "This TensorFlow has no TPU kernels: pip install 'digits-trainer[tpu]' (and remove "
                f"tensorflow). {remedy}"
            )
        raise ConfigurationError(
            f"Expected a TPU that answers, by the name {name}. Received: {reason}. {remedy}"
        ) from strategy
    return StrategyChoice(
        strategy, f"TPUStrategy over {strategy.num_replicas_in_sync} cores of the TPU {name}"
    )


def _connect_tpu(name: str) -> tf.distribute.TPUStrategy:
    resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=name)
    if name != "local":
        tf.config.experimental_connect_to_cluster(resolver)
    tf.tpu.experimental.initialize_tpu_system(resolver)
    return tf.distribute.TPUStrategy(resolver)
